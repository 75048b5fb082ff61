"""The bodies of the TPU kernels: one row of lists of one head."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.sparse import problem, tpu_walk

NOWHERE = tpu_walk.NOWHERE


class Where(NamedTuple):
  """What masks need to know; None where nothing depends on it.

  Attributes:
    lengths: int32 `[1, NK]` in scalar memory, of the head's key blocks.
    bands: int32 `[1, 2 N + 1]` in scalar memory: the head's sink tokens, then
      low and high of each band.
    own_ids: int32 `[1, size]`, segments of the grid step's own block.
    listed_ids: int32 `[blocks, size]`, of all blocks that lists name.
  """

  lengths: Any
  bands: Any
  own_ids: Any
  listed_ids: Any


class Pooled(NamedTuple):
  """The pooled keys of a head, in chunks of C, for one block of queries.

  Attributes:
    k: `[N, C, K]`.
    v: `[N, C, V]`.
    bias: `[N, C]`, `MASKED` where a pooled key is not met.
    segments: int32 `[N, C]` or None.
    variance: `[N, C, K]` or None.
    slope: `[K, V]` or None.
  """

  k: Any
  v: Any
  bias: Any
  segments: Any
  variance: Any
  slope: Any


def _dot(a, b, plan, *, tb=False):
  """`a @ b`, or `a @ b.T`, in `plan.wide`."""
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (1 if tb else 0,)), ((), ())),
    precision=plan.precision,
    preferred_element_type=plan.wide,
  )


def _visible(query, key, query_ids, key_ids, bands, plan):
  """Whether queries see keys, by positions along one axis each."""
  # Later than every query is a key that does not exist.
  visible = key <= query if plan.causal else key < NOWHERE
  if plan.segments:
    visible = visible & (query_ids == key_ids)
  if plan.bands is not None:
    far = query - key
    inside = key < bands[0, 0]
    for band in range(plan.bands):
      low, high = bands[0, 1 + 2 * band], bands[0, 2 + 2 * band]
      inside = inside | ((far >= low) & (far <= high))
    visible = visible & inside
  return visible


def _column(row):
  """`[1, n]` to `[n, 1]`."""
  return None if row is None else jnp.transpose(row)


def _read(ref):
  return None if ref is None else ref[...]


def forward(
  lists, where, q, pooled, sources, out, lse, scratch, *, plan
) -> None:
  """Attention of one block of queries.

  Args:
    lists: a `tpu_walk.Lists` of key blocks.
    where: a `Where`.
    q: `[block_q, K]`.
    pooled: a `Pooled` or None.
    sources: keys and values in HBM, or both in one array.
    out: `[block_q, V]`, written.
    lse: `[1, block_q]`, written.
    scratch: a `tpu_walk.Scratch` with the totals top `[block_q, 1]`, total
      `[block_q, 1]` and sum `[block_q, V]`.
    plan: of the call.
  """
  b, h, i = (pl.program_id(axis) for axis in range(3))
  head = b, jax.lax.div(h, h.dtype.type(plan.repeat))
  walk = tpu_walk.Walk(lists, sources, scratch, head, head)
  walk.begin(i == 0)
  top, total, values = scratch.totals
  top[...] = jnp.full_like(top, problem.MASKED)
  total[...] = jnp.zeros_like(total)
  values[...] = jnp.zeros_like(values)
  ids = _column(_read(where.own_ids))
  queries = q[...]

  def meet(scores, v):
    new = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - new)
    fade = jnp.exp(top[...] - new)
    top[...] = new
    total[...] = fade * total[...] + jnp.sum(weights, axis=1, keepdims=True)
    values[...] = fade * values[...] + _dot(weights.astype(v.dtype), v, plan)

  if pooled is not None:
    # First, while the first keys are on their way.
    @pl.loop(0, plan.pooled_steps)
    def _(step):
      meet(_pooled_scores(queries, ids, pooled, step, plan), pooled.v[step])

    pooled_top, pooled_total = top[...], total[...]
  row = i * plan.block_q + _iota(plan.block_q, 0)

  def body(step, half):
    k, v = walk.read(0, half), walk.read(-1, half)
    column = walk.positions(step, plan.block_kv, where.lengths)
    key_ids = walk.ids(step, where.listed_ids)
    visible = _visible(row, column, ids, key_ids, where.bands, plan)
    scores = _dot(queries, k, plan, tb=True) * plan.scale
    meet(jnp.where(visible, scores, problem.MASKED), v)

  walk.each(i + 1 == plan.num_q, body)
  result = values[...] / total[...]
  if plan.slopes:
    share = pooled_total * jnp.exp(pooled_top - top[...]) / total[...]
    first = _dot(queries, pooled.slope[...], plan)
    result = result + plan.scale * share * first
  out[...] = result
  lse[...] = jnp.transpose(top[...] + jnp.log(total[...]))


def _iota(size, axis):
  shape = (size, 1) if axis == 0 else (1, size)
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _pooled_scores(q, ids, pooled, step, plan):
  """`[block_q, C]`, `MASKED` where a query does not meet a pooled key."""
  scores = _dot(q, pooled.k[step], plan, tb=True) * plan.scale
  if pooled.variance is not None:
    squares = jnp.square(q.astype(plan.wide)).astype(q.dtype)
    cumulant = _dot(squares, pooled.variance[step], plan, tb=True)
    cumulant = cumulant * (plan.scale**2 / 2)
    scores = scores + jnp.minimum(cumulant, problem.MAX_CUMULANT)
  chunk = pl.ds(step, 1)
  bias = pooled.bias[chunk, :]
  visible = bias > problem.MASKED / 2
  if plan.segments:
    visible = visible & (ids == pooled.segments[chunk, :])
  return jnp.where(visible, scores + bias, problem.MASKED)


def _pair(scores, inner, lse, delta, visible, plan):
  """Probabilities, and the cotangents of the scores before their scale."""
  scores = jnp.where(visible, scores * plan.scale, problem.MASKED)
  probs = jnp.exp(scores - lse)
  return probs, probs * (inner - delta) * plan.scale


def queries_backward(
  lists, where, q, g, rows, sources, dq, scratch, *, plan
) -> None:
  """The cotangent of one block of queries.

  Args:
    lists: a `tpu_walk.Lists` of key blocks.
    where: a `Where`.
    q: `[block_q, K]`.
    g: `[block_q, V]`, the output's cotangent.
    rows: `[2, block_q]`, lse and delta.
    sources: as for `forward`.
    dq: `[block_q, K]`, written.
    scratch: a `tpu_walk.Scratch` with one total `[block_q, K]`.
    plan: of the call.
  """
  b, h, i = (pl.program_id(axis) for axis in range(3))
  head = b, jax.lax.div(h, h.dtype.type(plan.repeat))
  walk = tpu_walk.Walk(lists, sources, scratch, head, head)
  walk.begin(i == 0)
  (total,) = scratch.totals
  total[...] = jnp.zeros_like(total)
  ids = _column(_read(where.own_ids))
  queries, cotangents = q[...], g[...]
  lse, delta = (_column(rows[n : n + 1, : plan.block_q]) for n in range(2))
  row = i * plan.block_q + _iota(plan.block_q, 0)

  def body(step, half):
    k, v = walk.read(0, half), walk.read(-1, half)
    column = walk.positions(step, plan.block_kv, where.lengths)
    key_ids = walk.ids(step, where.listed_ids)
    visible = _visible(row, column, ids, key_ids, where.bands, plan)
    scores = _dot(queries, k, plan, tb=True)
    inner = _dot(cotangents, v, plan, tb=True)
    _, dscores = _pair(scores, inner, lse, delta, visible, plan)
    total[...] += _dot(dscores.astype(k.dtype), k, plan)

  walk.each(i + 1 == plan.num_q, body)
  dq[...] = total[...]


def keys_backward(
  lists, where, k, v, sources, dk, dv, scratch, *, plan
) -> None:
  """What one query head adds to the cotangents of one block of keys.

  The query heads of a key head follow each other in the grid. Scores have
  keys in rows here and the gathered queries in columns.

  Args:
    lists: a `tpu_walk.Lists` of the query blocks that list the key block.
    where: a `Where`.
    k: `[block_kv, K]`.
    v: `[block_kv, V]`.
    sources: queries and the output's cotangents in HBM, or both in one array,
      then lse and delta `[.., 2, block_q]`.
    dk: `[block_kv, K]`, written after the last head.
    dv: `[block_kv, V]`, likewise.
    scratch: a `tpu_walk.Scratch` with totals of their shapes.
    plan: of the call.
  """
  b, group, j, r = (pl.program_id(axis) for axis in range(4))
  first_head = group * plan.repeat
  wraps = r + 1 == plan.repeat
  following = jnp.where(wraps, first_head, first_head + r + 1)
  walk = tpu_walk.Walk(
    lists, sources, scratch, (b, first_head + r), (b, following)
  )
  walk.begin((j == 0) & (r == 0))

  @pl.when(r == 0)
  def _():
    for total in scratch.totals:
      total[...] = jnp.zeros_like(total)

  keys, values = k[...], v[...]
  ids = _column(_read(where.own_ids))
  offset = _iota(plan.block_kv, 0)
  row = jnp.where(
    offset < where.lengths[0, j], offset + j * plan.block_kv, NOWHERE
  )

  def body(step, half):
    q, g = walk.read(0, half), walk.read(-2, half)
    rows = scratch.buffers[-1][half][:, :, : plan.block_q]
    lse, delta = (
      jnp.concatenate([rows[p, n : n + 1] for p in range(walk.parts)], axis=1)
      for n in range(2)
    )
    column = walk.positions(step, plan.block_q)
    query_ids = walk.ids(step, where.listed_ids)
    visible = _visible(column, row, query_ids, ids, where.bands, plan)
    visible = visible & (column < NOWHERE)
    scores = _dot(keys, q, plan, tb=True)
    inner = _dot(values, g, plan, tb=True)
    probs, dscores = _pair(scores, inner, lse, delta, visible, plan)
    total_k, total_v = scratch.totals
    total_k[...] += _dot(dscores.astype(q.dtype), q, plan)
    total_v[...] += _dot(probs.astype(g.dtype), g, plan)

  walk.each(wraps & (j + 1 == plan.num_kv), body)

  @pl.when(wraps)
  def _():
    for total, ref in zip(scratch.totals, (dk, dv), strict=True):
      ref[...] = total[...]
