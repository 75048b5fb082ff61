"""What a block of keys and values is pooled to, and for whom."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import products
from kernels_pallas.sparse import blocks as block_lists
from kernels_pallas.sparse import problem


def split(x: jax.Array, size: int) -> jax.Array:
  """`[..., N * size, width]` to `[..., N, size, width]`."""
  *batch, length, width = x.shape
  return x.reshape(*batch, length // size, size, width)


def mean(x: jax.Array, lengths: jax.Array) -> jax.Array:
  """Means over the first `lengths` rows of each block, 0 for none.

  Args:
    x: `[..., N, size, width]`, zero beyond the length.
    lengths: int `[..., N]`.

  Returns:
    `[..., N, width]`, at least float32: a bfloat16 sum of 64 values would
    lose three bits.
  """
  total = jnp.sum(x, axis=-2, dtype=jnp.promote_types(x.dtype, jnp.float32))
  return total / jnp.maximum(lengths, 1)[..., None].astype(total.dtype)


def finite_rows(x: jax.Array) -> jax.Array:
  """Which rows are finite: bool `[..., N, size]` of `[..., N, size, width]`."""
  return jnp.all(jnp.isfinite(x), axis=-1)


def mean_of(x: jax.Array, which: jax.Array) -> jax.Array:
  """Means over some rows of each block, 0 for none and where they overflow.

  Args:
    x: `[..., N, size, width]`.
    which: bool `[..., N, size]`.

  Returns:
    `[..., N, width]`, at least float32.
  """
  x = jnp.where(which[..., None], x, 0)
  average = mean(x, jnp.sum(which, axis=-1))
  return jnp.where(jnp.isfinite(average), average, 0)


def centred(x: jax.Array, average: jax.Array, lengths: jax.Array) -> jax.Array:
  """`x` less its block's mean, 0 beyond the length: `[..., N, size, width]`.

  Also 0 in blocks whose mean is NaN: their score is, and here they would make
  NaN what does not see them.
  """
  real = jnp.arange(x.shape[-2]) < lengths[..., None]
  real = real[..., None] & ~jnp.isnan(average)[..., None, :]
  return jnp.where(real, x - average[..., None, :], 0)


def contained(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Makes values that overflowed 0, and the keys of their blocks NaN.

  A weight of 0 times infinity would be NaN for queries that do not see the
  block; a key of NaN is so only for those that do.

  Args:
    key: `[B, G, N, K]`.
    value: `[B, G, N, ...]`.
  """
  axes = tuple(range(3, value.ndim))
  overflowed = ~jnp.all(jnp.isfinite(value), axis=axes)
  spread = lambda x: jnp.expand_dims(overflowed, tuple(range(3, x.ndim)))
  key = jnp.where(spread(key), jnp.nan, key)
  return key, jnp.where(spread(value), 0, value)


def tail(exact: problem.Exact, options: problem.Options) -> problem.Tail | None:
  """The pooled keys of a problem, None for the tail "drop".

  Differentiable in `exact.k` and `exact.v`. Every statistic is centred before
  it is multiplied, so that nothing cancels.

  Args:
    exact: the problem; keys and values are 0 beyond their block's length.
    options: the static choices.

  Returns:
    The `Tail`.
  """
  if options.tail == "drop":
    return None
  lengths = exact.lengths
  k, v = (split(x, options.block_kv) for x in (exact.k, exact.v))
  mean_k, mean_v = contained(mean(k, lengths), mean(v, lengths))
  pooled = problem.Tail(mean_k, mean_v, bias(exact, options, mean_k.dtype))
  if exact.kv_segments is not None:
    segments, _ = block_segments(exact, options.block_kv)
    pooled = pooled._replace(segments=segments)
  if options.tail == "mean":
    return pooled
  deviation = centred(k.astype(mean_k.dtype), mean_k, lengths)
  if options.tail == "mean_var":
    return pooled._replace(variance=mean(jnp.square(deviation), lengths))
  values = v.astype(mean_v.dtype)
  if options.tail == "mean_global" and not options.causal:
    total = jnp.sum(lengths, axis=-1).astype(mean_k.dtype)
    slope = products.einsum("bgnsk,bgnsv->bgkv", deviation, values)
    slope = slope / jnp.maximum(total, 1)[..., None, None]
    return pooled._replace(slope=slope[:, :, None])
  local = products.einsum("bgnsk,bgnsv->bgnkv", deviation, values)
  if options.tail == "mean_local":
    count = jnp.maximum(lengths, 1).astype(mean_k.dtype)[..., None, None]
    key, local = contained(pooled.k, local / count)
    return pooled._replace(k=key, local=local)
  # Only what every query of the block may see: the blocks wholly before it.
  before = blocks_before(exact.counts.shape[2], lengths.shape[2], options)
  first = lambda x: jnp.pad(
    jnp.cumsum(x, axis=2), ((0, 0), (0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 3)
  )
  slope = first(local)[:, :, before]
  total = first(lengths)[:, :, before].astype(slope.dtype)
  return pooled._replace(slope=slope / jnp.maximum(total, 1)[..., None, None])


def blocks_before(
  num_q: int, num_kv: int, options: problem.Options
) -> jax.Array:
  """How many key blocks lie wholly before each query block: int `[NQ]`."""
  starts = jnp.arange(num_q) * options.block_q
  return jnp.minimum(starts // options.block_kv, num_kv)


def bias(
  exact: problem.Exact, options: problem.Options, dtype: jnp.dtype
) -> jax.Array:
  """`Tail.bias`: `[B, H, NQ, NK]` in `dtype`."""
  num_q, num_kv = exact.counts.shape[2], exact.lengths.shape[2]
  repeat = exact.counts.shape[1] // exact.lengths.shape[1]
  lengths = jnp.repeat(exact.lengths, repeat, axis=1)[:, :, None]
  hidden = block_lists.membership(exact.indices, exact.counts, num_kv)
  hidden = hidden | (lengths == 0)
  if options.causal:
    before = blocks_before(num_q, num_kv, options)
    hidden = hidden | (jnp.arange(num_kv) >= before[:, None])
  if exact.kv_segments is not None:
    _, mixed = block_segments(exact, options.block_kv)
    hidden = hidden | mixed[:, None, None]
  log = jnp.log(jnp.maximum(lengths, 1).astype(dtype))
  return jnp.where(hidden, problem.MASKED, log)


def block_segments(
  exact: problem.Exact, block_kv: int
) -> tuple[jax.Array, jax.Array]:
  """The segment of each key block, and whether it has several: `[B, NK]`.

  Keys beyond the end repeat the last one's segment.
  """
  ids = exact.kv_segments.reshape(exact.kv_segments.shape[0], -1, block_kv)
  low, high = jnp.min(ids, axis=-1), jnp.max(ids, axis=-1)
  return low, low != high
