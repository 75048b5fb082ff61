"""Tokens of a 1-, 2- or 3-D grid, ordered so that every tile is contiguous.

A block of consecutive tokens of an image in raster order is a thin strip, and
its mean stands for little; a block that is one tile of 8 x 8 patches, or 4 x
4 x 4 of a video, is a neighbourhood. Both directions are one transposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def tile(
  x: jax.Array,
  grid: Sequence[int],
  tile: Sequence[int],
  *,
  axis: int = 1,
  prefix: int = 0,
) -> jax.Array:
  """Tokens in raster order to tiles, one after another.

  Tiles follow each other in raster order, as do the tokens of each.

  Args:
    x: array of any dtype with `prefix + prod(grid)` tokens along `axis`, the
      last grid axis fastest.
    grid: tokens along each axis of the grid.
    tile: of one tile; each divides the grid's.
    axis: which axis of `x` holds the tokens.
    prefix: so many tokens in front (text, sinks) stay where they are.

  Returns:
    `x` with its tokens permuted.

  Raises:
    ValueError: a tile that does not divide the grid, or tokens that are not
      the grid's.
  """
  counts, axis = _check(x, grid, tile, axis, prefix)
  shape = [n for pair in zip(counts, tile, strict=True) for n in pair]
  d = len(counts)
  order = [*range(0, 2 * d, 2), *range(1, 2 * d, 2)]
  return _permute(x, shape, order, axis, prefix)


def untile(
  x: jax.Array,
  grid: Sequence[int],
  tile: Sequence[int],
  *,
  axis: int = 1,
  prefix: int = 0,
) -> jax.Array:
  """The inverse of `tile`, with the same arguments."""
  counts, axis = _check(x, grid, tile, axis, prefix)
  d = len(counts)
  order = [n for i in range(d) for n in (i, d + i)]
  return _permute(x, [*counts, *tile], order, axis, prefix)


def _check(x, grid, tile, axis, prefix) -> tuple[list[int], int]:
  """The tiles along each axis of the grid, and `axis` counted from 0."""
  grid, tile = tuple(grid), tuple(tile)
  if not grid or min(grid) < 1:
    raise ValueError(f"grid: got {grid}; allowed: axes of at least 1 token")
  if len(tile) != len(grid) or min(tile) < 1:
    raise ValueError(
      f"tile: got {tile}; allowed: {len(grid)} sizes of at least 1, as the "
      f"grid {grid} has axes"
    )
  if any(n % size for n, size in zip(grid, tile, strict=True)):
    raise ValueError(f"tile: got {tile}; allowed: divisors of the grid {grid}")
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"axis: got {axis}; allowed: an axis of shape {x.shape}")
  if prefix < 0:
    raise ValueError(f"prefix: got {prefix}; allowed: at least 0")
  tokens = x.shape[axis]
  if tokens != prefix + math.prod(grid):
    raise ValueError(
      f"x: got {tokens} tokens along axis {axis}; allowed: prefix={prefix} "
      f"and the {math.prod(grid)} of the grid {grid}"
    )
  counts = [n // size for n, size in zip(grid, tile, strict=True)]
  return counts, axis % x.ndim


def _permute(x, shape, order, axis, prefix):
  """Splits the tokens behind the prefix, and transposes their axes."""
  if prefix:
    front, x = jnp.split(x, [prefix], axis=axis)
  head, tail = x.shape[:axis], x.shape[axis + 1 :]
  y = x.reshape(*head, *shape, *tail)
  own = [axis + i for i in order]
  after = range(axis + len(order), y.ndim)
  y = y.transpose(*range(axis), *own, *after).reshape(x.shape)
  return jnp.concatenate([front, y], axis=axis) if prefix else y
