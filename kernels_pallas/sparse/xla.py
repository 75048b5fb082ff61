"""Block-sparse attention in plain JAX: gathered blocks, any platform.

A scan over query blocks gathers the keys and values of each one's list and
computes one softmax over them, so memory grows with T and with the longest
list, not with T x S. The backward pass computes the probabilities again and
adds what flows into keys and values where it was gathered from. Lists as long
as there are blocks gather nothing: all keys are there, and lists are masks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import meshes
from kernels_pallas.sparse import blocks as block_lists
from kernels_pallas.sparse import core, pooled, problem, statistics

# Keys that one step and head gathers, which a cache should hold; where all
# keys are there anyway, queries of a step.
_GATHERED = 2048
_QUERIES = 128


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, jax.Array]:
  """As `core.run`; `options.interpret` is ignored."""
  return core.run(_forward, _backward, inputs, options)


class _Step(NamedTuple):
  """n query blocks of every head: `[B, G, R, n, ...]`, R = H / G.

  Attributes:
    q: `[B, G, R, n, block_q, K]`.
    indices: int32 `[B, G, R, n, M]`; of complete lists, 0, 1, ...
    meant: bool `[B, G, R, n, M]`, which of them are listed.
    number: int32 `[n]`, which query blocks.
  """

  q: jax.Array
  indices: jax.Array
  meant: jax.Array
  number: jax.Array


def _forward(exact, tail, options):
  blocks = _blocks(exact, options)

  def body(_, step):
    k, v = (_gather(x, step.indices) for x in blocks)
    scores = _scores(step, k, exact, options)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _dot(weights.astype(v.dtype), v, 5, 4) / total
    return None, (out, top + jnp.log(total))

  _, (out, lse) = jax.lax.scan(body, None, _steps(exact))
  exact_part = _join(out, exact), _join(lse, exact)[..., 0]
  if tail is None:
    return exact_part
  return core.merge([exact_part, pooled.forward(exact, tail, options)])


def _backward(exact, options, lse, g, delta):
  blocks = _blocks(exact, options)
  rows = lambda x: _per_row(x, exact)
  per_row = rows(lse[..., None]), rows(g), rows(delta[..., None])
  zero = tuple(jnp.zeros(x.shape, lse.dtype) for x in blocks)
  *zero, _ = meshes.vary_alike((*zero, lse))

  def body(total, xs):
    step, xs = xs
    lse, g, delta = (_queries(x, exact) for x in xs)
    k, v = (_gather(x, step.indices) for x in blocks)
    probs = jnp.exp(_scores(step, k, exact, options) - lse)
    inner = _dot(g.astype(v.dtype), v, 5, 5)
    dscores = (probs * (inner - delta) * options.scale).astype(k.dtype)
    dq = _dot(dscores, k, 5, 4)
    dk = _dot(dscores, _queries(step.q, exact), 4, 4)
    dv = _dot(probs.astype(v.dtype), g.astype(v.dtype), 4, 4)
    total = tuple(
      _scatter_add(x, step.indices, dx)
      for x, dx in zip(total, (dk, dv), strict=True)
    )
    return total, dq

  total, dq = jax.lax.scan(body, tuple(zero), (_steps(exact), per_row))
  whole = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
  return _join(dq, exact), *(whole(x) for x in total)


def _complete(exact):
  """Whether lists are as long as there are blocks."""
  return exact.indices.shape[3] == exact.lengths.shape[2]


def _queries(x, exact):
  """[B, G, R, n, block_q, .] as it meets keys.

  Queries of a list meet its own keys; those of complete lists all meet the
  same, and are one matrix, [B, G, 1, 1, R * n * block_q, .].
  """
  if not _complete(exact):
    return x
  return x.reshape(*x.shape[:2], 1, 1, -1, x.shape[-1])


def _scores(step, k, exact, options):
  """Masked scores, queries as `_queries` has them, by the keys of k."""
  q = _queries(step.q, exact)
  scores = _dot(q, k, 5, 5) * options.scale
  visible = _visible(step, exact, options)
  if _complete(exact):
    visible = jnp.broadcast_to(visible, (*step.q.shape[:5], visible.shape[-1]))
    visible = _queries(visible, exact)
  return jnp.where(visible, scores, problem.MASKED)


def _visible(step, exact, options):
  """Which keys each query sees: [B, G, R, n, block_q or 1, M * block_kv]."""
  b, g, r, n, longest = step.indices.shape
  offset = jnp.arange(options.block_kv)
  lengths = _pick(exact.lengths, step.indices)
  visible = (offset < lengths[..., None]) & step.meant[..., None]
  flat = lambda x: x.reshape(b, g, r, n, 1, longest * options.block_kv)
  visible = flat(visible)
  if not options.causal and exact.q_segments is None and exact.bands is None:
    return visible
  column = step.indices[..., None] * options.block_kv + offset
  row = step.number[:, None] * options.block_q + jnp.arange(options.block_q)
  far = row[..., None] - flat(column)
  if options.causal:
    visible = visible & (far >= 0)
  if exact.q_segments is not None:
    ids = exact.kv_segments.reshape(b, 1, -1, options.block_kv)
    ids = jnp.broadcast_to(ids, (b, g, *ids.shape[2:]))
    own = exact.q_segments[:, row][:, None, None, ..., None]
    visible = visible & (own == flat(_pick(ids, step.indices)))
  if exact.bands is not None:
    per_head = lambda x: x.reshape(1, g, r, 1, 1, 1)
    inside = flat(column) < per_head(exact.sink_tokens)
    for band in range(exact.bands.shape[1]):
      low, high = (per_head(exact.bands[:, band, x]) for x in range(2))
      inside = inside | ((far >= low) & (far <= high))
    visible = visible & inside
  return visible


def _pick(x, indices):
  """x [B, G, NK, ..] at [B, G, ..] of block numbers."""
  return jax.vmap(jax.vmap(lambda a, i: a[i]))(x, indices)


def _gather(x, indices):
  """[B, G, NK, block_kv, w] to [B, G, R, n, M * block_kv, w].

  Complete lists need no copy: [B, G, 1, 1, NK * block_kv, w].
  """
  if indices.shape[-1] == x.shape[2]:
    return x.reshape(*x.shape[:2], 1, 1, -1, x.shape[-1])
  x = _pick(x, indices)
  return x.reshape(*x.shape[:4], -1, x.shape[-1])


def _scatter_add(total, indices, x):
  """Adds what `_gather` would have given to where it was gathered from.

  What pads a list is masked, and adds zeros to its last block.
  """
  if indices.shape[-1] == total.shape[2]:
    return total + x.reshape(total.shape)
  x = x.reshape(*indices.shape, -1, x.shape[-1])
  add = lambda a, i, dx: a.at[i].add(dx)
  return jax.vmap(jax.vmap(add))(total, indices, x)


def _dot(a, b, a_axis, b_axis):
  """[B, G, R, n, ., .] by the same, contracting one axis of each."""
  batch = tuple(range(4))
  return jax.lax.dot_general(
    a,
    b,
    (((a_axis,), (b_axis,)), (batch, batch)),
    precision="highest",
    preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
  )


def _blocks(exact, options):
  """Keys and values, `[B, G, NK, block_kv, .]`."""
  return tuple(
    statistics.split(x, options.block_kv) for x in (exact.k, exact.v)
  )


def _per_step(exact):
  """How many query blocks a step takes: a divisor of NQ."""
  b, h, num_q, longest = exact.indices.shape
  if _complete(exact):
    rows = h // exact.k.shape[1] * exact.q.shape[2] // num_q
    most = max(1, _QUERIES // rows)
  else:
    keys = longest * exact.k.shape[2] // exact.lengths.shape[2]
    most = max(1, _GATHERED // keys)
  return max(n for n in range(1, min(num_q, most) + 1) if num_q % n == 0)


def _per_row(x, exact):
  """[B, H, NQ * block_q, w] to [steps, B, G, R, n, block_q, w]."""
  n = _per_step(exact)
  b, h, num_q = exact.counts.shape
  g = exact.k.shape[1]
  x = x.reshape(b, g, h // g, num_q // n, n, -1, x.shape[-1])
  return jnp.moveaxis(x, 3, 0)


def _steps(exact):
  n = _per_step(exact)
  b, h, num_q, longest = exact.indices.shape
  g = exact.k.shape[1]
  indices = exact.indices
  if _complete(exact):
    meant = block_lists.membership(indices, exact.counts, longest)
    indices = jnp.broadcast_to(jnp.arange(longest), indices.shape)
  else:
    meant = jnp.arange(longest) < exact.counts[..., None]
  lists = lambda x: jnp.moveaxis(
    x.reshape(b, g, h // g, num_q // n, n, longest), 3, 0
  )
  return _Step(
    q=_per_row(exact.q, exact),
    indices=lists(indices),
    meant=lists(meant),
    number=jnp.arange(num_q).reshape(-1, n),
  )


def _join(x, exact):
  """[steps, B, G, .., w] of rows in order to [B, H, NQ * block_q, w]."""
  b, h, num_q = exact.counts.shape
  n, g = _per_step(exact), exact.k.shape[1]
  x = x.reshape(num_q // n, b, g, h // g, n, -1, x.shape[-1])
  return jnp.moveaxis(x, 0, 3).reshape(b, h, exact.q.shape[2], x.shape[-1])
