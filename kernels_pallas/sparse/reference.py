"""Block-sparse attention by its definition, in memory of T x S.

Written from the formulas of `problem`, independent of every other
implementation; JAX differentiates it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.sparse import problem


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, jax.Array]:
  """Attention with every score written down.

  Args:
    inputs: the problem.
    options: the static choices; `interpret` is ignored.

  Returns:
    The output `[B, T, H, V]` in v's dtype and the log-partition `[B, T, H]`,
    as `core.run`.
  """
  dtype = jnp.promote_types(inputs.q.dtype, jnp.float32)
  heads, groups = inputs.q.shape[2], inputs.k.shape[2]
  q = inputs.q.astype(dtype)
  k, v = (
    jnp.repeat(x.astype(dtype), heads // groups, axis=2)
    for x in (inputs.k, inputs.v)
  )
  lengths = None
  if inputs.lengths is not None:
    lengths = jnp.repeat(inputs.lengths, heads // groups, axis=1)
  one_head = lambda *x: _one_head(*x, options=options)
  per_head = jax.vmap(one_head, in_axes=(1, 1, 1, 0, 0, 0, None, 0, 0))
  per_batch = jax.vmap(per_head, in_axes=(0, 0, 0, 0, 0, 0, 0, None, None))
  with jax.default_matmul_precision("highest"):
    out, lse = per_batch(
      q,
      k,
      v,
      inputs.indices,
      inputs.counts,
      lengths,
      inputs.segments,
      inputs.bands,
      inputs.sink_tokens,
    )
  move = lambda x: jnp.moveaxis(x, 1, 2)
  return move(out).astype(inputs.v.dtype), move(lse)


def _one_head(
  q, k, v, indices, counts, lengths, segments, bands, sinks, *, options
):
  """q [T, K], k [S, K], v [S, V] to out [T, V], lse [T]."""
  t, s = q.shape[0], k.shape[0]
  num_kv = problem.num_blocks(s, options.block_kv)
  row, column = jnp.arange(t)[:, None], jnp.arange(s)
  block, offset = column // options.block_kv, column % options.block_kv
  if lengths is None:
    exists = jnp.ones(s, bool)
  else:
    exists = offset < lengths[block]
  own = jnp.ones((t, s), bool)
  if options.causal:
    own &= column <= row
  if segments is not None:
    own &= segments[:, None] == segments
  if bands is not None:
    far = (row - column)[..., None]
    inside = (far >= bands[:, 0]) & (far <= bands[:, 1])
    own &= jnp.any(inside, axis=-1) | (column < sinks)
  own &= exists

  meant = jnp.arange(indices.shape[1]) < counts[:, None]
  listed = meant[..., None] & (indices[..., None] == jnp.arange(num_kv))
  listed = jnp.any(listed, axis=1)[jnp.arange(t) // options.block_q]
  scores = options.scale * q @ k.T
  scores = jnp.where(own & listed[:, block], scores, problem.MASKED)
  values = v
  first = 0.0
  if options.tail != "drop":
    of_block = (block == jnp.arange(num_kv)[:, None]) & exists
    pooled, pooled_v, slopes = _pooled(q, k, v, of_block, own, options)
    # A query pools a block of which it sees every key that exists; causal,
    # only if its whole query block may.
    whole = ~jnp.any(of_block & ~own[:, None], axis=-1)
    if options.causal:
      start = row // options.block_q * options.block_q
      whole &= (jnp.arange(num_kv) + 1) * options.block_kv <= start
    whole &= ~listed & jnp.any(of_block, axis=-1)
    pooled = jnp.where(whole, pooled, problem.MASKED)
    scores = jnp.concatenate([scores, pooled], axis=1)
    values = jnp.concatenate([values, pooled_v])
  top = jnp.max(scores, axis=1, keepdims=True)
  weights = jnp.where(scores <= problem.MASKED / 2, 0.0, jnp.exp(scores - top))
  total = jnp.sum(weights, axis=1, keepdims=True)
  seen = total != 0
  total = jnp.where(seen, total, 1.0)
  if options.tail in ("mean_global", "mean_local"):
    # What overflowed is nothing to those who do not see it.
    slopes = jnp.where(weights[:, s:, None] == 0, 0.0, slopes)
    first = jnp.einsum("tj,tjv->tv", weights[:, s:], slopes)
  values = jnp.where(weights[..., None] == 0, 0.0, values)
  out = (jnp.einsum("tj,tjv->tv", weights, values) + first) / total
  lse = jnp.where(seen, top + jnp.log(total), problem.MASKED)
  return out, lse[:, 0]


def _pooled(q, k, v, of_block, own, options):
  """Scores [T, NK], values [NK, V], first-order values [T, NK, V] or None."""
  scale = options.scale
  members = of_block.astype(k.dtype)
  length = jnp.sum(members, axis=1)
  count = jnp.maximum(length, 1)[:, None]
  # A key may be NaN, which is its own block's only, and there the score's.
  of_block = of_block[..., None]
  mean_k = jnp.sum(jnp.where(of_block, k, 0.0), axis=1) / count
  mean_v = members @ v / count
  scores = scale * q @ mean_k.T + jnp.log(jnp.maximum(length, 1))
  deviation = jnp.where(of_block, k - mean_k[:, None], 0.0)
  deviation = jnp.where(jnp.isnan(deviation), 0.0, deviation)
  if options.tail == "mean_var":
    variance = jnp.sum(deviation**2, axis=1) / count
    cumulant = scale**2 / 2 * (q**2 @ variance.T)
    scores += jnp.minimum(cumulant, problem.MAX_CUMULANT)
  slopes = None
  if options.tail == "mean_local":
    matrices = jnp.einsum("jsk,sv->jkv", deviation, v) / count[..., None]
    slopes = scale * jnp.einsum("tk,jkv->tjv", q, matrices)
  if options.tail == "mean_global":
    matrices = jnp.einsum("jsk,sv->jkv", deviation, v)
    use = jnp.ones((q.shape[0], length.shape[0]))
    if options.causal:
      start = jnp.arange(q.shape[0]) // options.block_q * options.block_q
      ends = (jnp.arange(length.shape[0]) + 1) * options.block_kv
      use = ends <= start[:, None]
    use = use.astype(k.dtype)
    number = jnp.maximum(use @ length, 1)[:, None]
    slope = jnp.einsum("tj,jkv,tk->tv", use, matrices, q) / number
    slopes = scale * jnp.repeat(slope[:, None], length.shape[0], axis=1)
  return scores, mean_v, slopes
