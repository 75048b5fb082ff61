"""Between the public layout and chunks of heads.

Public arrays are `[B, T, heads, .]`; the chunk algebra takes `[N, B, G, R, C,
.]`: N chunks of C tokens in front, since a scan walks them, and R = H / G
value heads beside the key head that they share, which has R = 1.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import padding
from kernels_pallas.linear import chunk, problem


def pad(inputs: problem.Inputs, multiple: int) -> problem.Inputs:
  """Pads T with tokens that change neither a state nor a gradient.

  Zero keys, values and weights add nothing, log gates of zero decay nothing
  (with momentum, beta = 0 also keeps it out of the state), and the segment
  of the last token goes on.
  """
  widen = functools.partial(padding.to_multiple, axis=1, multiple=multiple)
  tokens = inputs._replace(state=None, segments=None)
  segments = inputs.segments
  if segments is not None:
    segments = widen(segments, mode="edge")
  return jax.tree.map(widen, tokens)._replace(
    state=inputs.state, segments=segments
  )


def chunks(x: jax.Array, size: int, groups: int) -> jax.Array:
  """`[B, T, heads, .]` to `[N, B, groups, heads / groups, C, .]`."""
  return heads_first(pieces(x, size, groups))


def pieces(x: jax.Array, size: int, groups: int) -> jax.Array:
  """`[B, T, heads, .]` to `[N, B, C, groups, heads / groups, .]`.

  No element of a token moves: the cheap part of `chunks`, whose other part,
  `heads_first`, a scan may do to one chunk at a time, in cache.
  """
  b, t, heads, width = x.shape
  x = x.reshape(b, t // size, size, groups, heads // groups, width)
  return jnp.moveaxis(x, 1, 0)


def heads_first(x: jax.Array) -> jax.Array:
  """`[.., C, G, R, .]` to `[.., G, R, C, .]`."""
  return jnp.moveaxis(x, -4, -2)


def tokens_first(x: jax.Array) -> jax.Array:
  """The inverse of `heads_first`."""
  return jnp.moveaxis(x, -2, -4)


def tokens(x: jax.Array, length: int) -> jax.Array:
  """The inverse of `pieces`, cut to `length` tokens."""
  n, b, size, groups, repeat, width = x.shape
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(b, n * size, groups * repeat, width)[:, :length]


def gates(inputs: problem.Inputs, size: int, groups: int) -> chunk.Gates:
  """The gates as columns `[N, B, G, R, C, 1]` (per channel `[.., C, K]`)."""

  def column(x):
    if x is None:
      return None
    return chunks(x if x.ndim == 4 else x[..., None], size, groups)

  return chunk.Gates(
    column(inputs.log_decay),
    column(inputs.log_momentum),
    column(inputs.beta),
    column(inputs.eta),
  )


def segments(ids: jax.Array | None, size: int) -> chunk.Segments | None:
  """`[B, T]` ordinals to columns `[N, B, 1, 1, C, 1]` and what enters each."""
  if ids is None:
    return None
  b, t = ids.shape
  last = ids[:, size - 1 :: size][:, :-1]
  entering = jnp.concatenate([jnp.zeros((b, 1), ids.dtype), last], axis=1)
  columns = ids.reshape(b, t // size, size).transpose(1, 0, 2)
  return chunk.Segments(
    columns[:, :, None, None, :, None],
    entering.T[:, :, None, None, None, None],
  )


def state(x: jax.Array, groups: int) -> jax.Array:
  """`[B, H, K, V]` to `[B, G, R, K, V]`."""
  b, heads, *rest = x.shape
  return x.reshape(b, groups, heads // groups, *rest)
