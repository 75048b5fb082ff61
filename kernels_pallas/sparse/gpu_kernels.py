"""The Pallas kernels of block-sparse attention on GPUs.

Query heads that share a key head are rows of it one after another, so that
there is one kind of head: block `n` of a head's queries is block `n % NQ` of
query head `n // NQ` of the group. A program has a tile of queries (of keys,
for the gradients of keys and values) and walks the tiles of the blocks in its
list. No two programs write to the same place, so results do not depend on
their order.

Scores and log-partitions are to base 2 in here, as the hardware's exponential
is.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import products
from kernels_pallas.sparse import problem
from kernels_pallas.sparse.gpu_data import (
  Data,
  Lists,
  Parts,
  Pooled,
  Rows,
  split,
)
from kernels_pallas.sparse.gpu_plan import Plan, Tile

_LOG2E = math.log2(math.e)
# Columns of K at a time of the first-order term.
_WIDTH = 64

# To memory, of what arrays are outside of the kernels.
Ref = Any


def forward(
  data: Data,
  lists: Lists,
  tail: Pooled | None,
  out_ref: Ref,
  lse_ref: Ref,
  *,
  plan: Plan,
  tile: Tile,
) -> None:
  """A tile of queries: one online softmax over keys, then pooled keys.

  Args:
    data: refs of one head; and so the others.
    lists: of key blocks.
    tail: pooled keys or None.
    out_ref: `[rows, V]`.
    lse_ref: `[rows]`.
    plan: the plan.
    tile: the sizes.
  """
  at = _own_queries(plan, tile)
  q = _read(data.q, at.rows)

  def step(n, carry):
    key = _listed_keys(lists, at.block, n, plan, tile)
    scores = _scores(data, plan, (at, key), q, _read(data.k, key.rows))
    return _meet(carry, scores, _read(data.v, key.rows), plan)

  carry = (
    jnp.zeros(out_ref.shape, plan.wide),
    jnp.full(lse_ref.shape, problem.MASKED, plan.wide),
    jnp.zeros(lse_ref.shape, plan.wide),
  )
  count = lists.counts[at.block] * (plan.options.block_kv // tile.keys)
  carry = lax.fori_loop(0, count, step, carry)
  if tail is not None:
    carry = _meet_pooled(data, tail, plan, at, q, carry)
  out, top, total = carry
  lse = top / _LOG2E + jnp.log(total)
  seen = ~(top <= problem.MASKED / 2)  # NaN is.
  lse_ref[...] = jnp.where(seen, lse, problem.MASKED)
  out_ref[...] = out / total[:, None]


def backward_queries(
  data: Data, lists: Lists, rows: Rows, dq_ref: Ref, *, plan: Plan, tile: Tile
) -> None:
  """dq `[rows, K]` of a tile of queries, as `forward`."""
  at = _own_queries(plan, tile)
  q, g = _read(data.q, at.rows), _read(rows.g, at.rows)
  lse = rows.lse[at.rows] * _LOG2E
  delta = rows.delta[at.rows]

  def step(n, dq):
    key = _listed_keys(lists, at.block, n, plan, tile)
    k = _read(data.k, key.rows)
    scores = _scores(data, plan, (at, key), q, k)
    probs = jnp.exp2(scores - lse[:, None])
    inner = _dot(g, _read(data.v, key.rows), tb=True)
    dscores = probs * (inner - delta[:, None])
    return dq + _dot(split(dscores, plan), k)

  count = lists.counts[at.block] * (plan.options.block_kv // tile.keys)
  dq = lax.fori_loop(0, count, step, jnp.zeros(dq_ref.shape, plan.wide))
  dq_ref[...] = dq * plan.options.scale


def backward_keys(
  data: Data,
  lists: Lists,
  rows: Rows,
  dk_ref: Ref,
  dv_ref: Ref,
  *,
  plan: Plan,
  tile: Tile,
) -> None:
  """dk `[keys, K]` and dv `[keys, V]` of a tile of keys, all transposed."""
  parts = plan.options.block_kv // tile.keys
  block, part = _div(pl.program_id(0), parts)
  key = _keys(plan, tile, block, part)
  k, v = _read(data.k, key.rows), _read(data.v, key.rows)
  parts = plan.options.block_q // tile.rows
  group = pl.program_id(1)

  def step(n, carry):
    dk, dv = carry
    slot, part = _div(n, parts)
    at = _queries(plan, tile, group, lists.indices[block, slot], part)
    q, g = _read(data.q, at.rows), _read(rows.g, at.rows)
    scores = _scores(data, plan, (at, key), q, k, turned=True)
    lse = rows.lse[at.rows] * _LOG2E
    probs = jnp.exp2(scores - lse[None, :])
    dv = dv + _dot(split(probs, plan), g)
    inner = _dot(v, g, tb=True)
    dscores = probs * (inner - rows.delta[at.rows][None, :])
    return dk + _dot(split(dscores, plan), q), dv

  carry = tuple(jnp.zeros(ref.shape, plan.wide) for ref in (dk_ref, dv_ref))
  dk, dv = lax.fori_loop(0, lists.counts[block] * parts, step, carry)
  dk_ref[...] = dk * plan.options.scale
  dv_ref[...] = dv


class _Queries(NamedTuple):
  """A tile of queries.

  Attributes:
    rows: where the tile is in a head's array.
    block: number of its block there.
    head: which query head.
    inside: number of its block in that head.
    position: its first token.
  """

  rows: Any
  block: Any
  head: Any
  inside: Any
  position: Any


class _Keys(NamedTuple):
  """A tile of keys: where, the number of its block, and its first token."""

  rows: Any
  block: Any
  position: Any


def _own_queries(plan, tile):
  parts = plan.options.block_q // tile.rows
  own = _div(pl.program_id(0), parts)
  return _queries(plan, tile, pl.program_id(1), *own)


def _queries(plan, tile, group, block, part):
  size = plan.options.block_q
  start = block * size + part * tile.rows
  head, inside = group, block
  if plan.repeat > 1:
    head, inside = _div(block, plan.num_q)
    head += group * plan.repeat
  position = inside * size + part * tile.rows
  return _Queries(pl.ds(start, tile.rows), block, head, inside, position)


def _listed_keys(lists, row, n, plan, tile):
  """The n-th tile of a list."""
  slot, part = _div(n, plan.options.block_kv // tile.keys)
  return _keys(plan, tile, lists.indices[row, slot], part)


def _keys(plan, tile, block, part):
  start = block * plan.options.block_kv + part * tile.keys
  return _Keys(pl.ds(start, tile.keys), block, start)


def _div(n, parts: int):
  """Quotient and remainder; no division where there is one part."""
  if parts == 1:
    return n, 0
  parts = jnp.int32(parts)
  return lax.div(n, parts), lax.rem(n, parts)


def _read(refs, *where) -> Parts:
  return tuple(ref[where] for ref in refs)


def _dot(a: Parts, b: Parts, **how) -> jax.Array:
  """A product of sums, less what float32 would lose; the smallest first."""
  many = len(a)
  return sum(
    products.dot(a[i], b[n - i], **how)
    for n in reversed(range(many))
    for i in range(n + 1)
  )


def _scores(data, plan, at, q, k, *, turned=False):
  """Scores of the queries and keys at `at`, `MASKED` where not seen.

  Args:
    data: the refs.
    plan: the plan.
    at: a `_Queries` and a `_Keys`.
    q: `[rows, K]`.
    k: `[keys, K]`.
    turned: whether to transpose.

  Returns:
    `[rows, keys]`, or `[keys, rows]`.
  """
  a, b = (k, q) if turned else (q, k)
  scores = _dot(a, b, tb=True) * (plan.options.scale * _LOG2E)
  masks = _masks(data, plan, *at, turned)
  if not masks:
    return scores
  visible = functools.reduce(jnp.logical_and, masks)
  return jnp.where(visible, scores, problem.MASKED)


def _masks(data, plan, at, key, turned):
  """Which query sees which key: the masks that the problem has."""
  along_q = lambda x: x[None, :] if turned else x[:, None]
  along_k = lambda x: x[:, None] if turned else x[None, :]
  numbers = lambda x: jnp.arange(x.size, dtype=jnp.int32)
  row = along_q(at.position + numbers(at.rows))
  column = along_k(key.position + numbers(key.rows))
  masks = []
  if data.lengths is not None:
    end = key.block * plan.options.block_kv + data.lengths[key.block]
    masks.append(column < end)
  if plan.options.causal:
    masks.append(row >= column)
  if data.q_segments is not None:
    own = data.q_segments[pl.ds(at.position, at.rows.size)]
    masks.append(along_q(own) == along_k(data.kv_segments[key.rows]))
  if data.bands is not None:
    far = row - column
    inside = column < data.sink_tokens[at.head]
    for n in range(data.bands.shape[1]):
      low, high = data.bands[at.head, n, 0], data.bands[at.head, n, 1]
      inside |= (far >= low) & (far <= high)
    masks.append(inside)
  return masks


def _meet(carry, scores, v, plan):
  """The online softmax meets more keys.

  Args:
    carry: out `[rows, V]`, top `[rows]`, total `[rows]`, and any other totals
      of the weights of such keys.
    scores: `[rows, keys]`.
    v: `[keys, V]`.
    plan: the plan.

  Returns:
    The carry, relative to the new top.
  """
  out, top, *totals = carry
  new = jnp.maximum(top, jnp.max(scores, axis=1))
  shrink = jnp.exp2(top - new)
  weights = jnp.exp2(scores - new[:, None])
  more = jnp.sum(weights, axis=1)
  out = out * shrink[:, None] + _dot(split(weights, plan), v)
  return (out, new, *(total * shrink + more for total in totals))


def _meet_pooled(data, tail, plan, at, q, carry):
  """The online softmax meets the pooled keys."""
  options, pooled = plan.options, plan.pooled
  if tail.segments is not None:
    own = data.q_segments[pl.ds(at.position, at.rows.size)][:, None]

  def step(n, carry):
    some = pl.ds(n * pooled, pooled)
    scores = _dot(q, _read(tail.k, some), tb=True) * options.scale
    if tail.variance is not None:
      squares = _read(tail.squares, at.rows)
      cumulant = _dot(squares, _read(tail.variance, some), tb=True)
      cumulant *= options.scale**2 / 2
      scores += jnp.minimum(cumulant, problem.MAX_CUMULANT)
    bias = tail.bias[at.block, some][None, :]
    visible = bias > problem.MASKED / 2
    if tail.segments is not None:
      visible &= own == tail.segments[some][None, :]
    scores = jnp.where(visible, (scores + bias) * _LOG2E, problem.MASKED)
    return _meet(carry, scores, _read(tail.v, some), plan)

  count = tail.k[0].shape[0] // pooled
  if options.causal:
    # Those behind the queries are not visible.
    before, _ = _div(at.inside * options.block_q, options.block_kv)
    before, _ = _div(before + pooled - 1, pooled)
    count = jnp.minimum(count, before)
  if tail.slope is None:
    return lax.fori_loop(0, count, step, carry)
  carry = (*carry, jnp.zeros_like(carry[1]))
  out, top, total, share = lax.fori_loop(0, count, step, carry)
  use = at.inside if tail.slope[0].shape[0] > 1 else 0
  share = (share * options.scale)[:, None]
  width = min(plan.key_size, _WIDTH)

  def first_order(n, out):
    some = pl.ds(n * width, width)
    q = sum(x.astype(plan.wide) for x in _read(data.q, at.rows, some)[::-1])
    return out + _dot(split(share * q, plan), _read(tail.slope, use, some))

  # A few columns at a time: all of them would fill the registers.
  out = lax.fori_loop(0, plan.key_size // width, first_order, out)
  return out, top, total
