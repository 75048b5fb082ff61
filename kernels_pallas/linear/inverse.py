"""The inverse of a unit lower triangular matrix, chunk by chunk.

The Neumann product (I - L)(I + L^2)(I + L^4)... that many kernels use loses
every digit for repeated keys, whose powers of L grow like binomials while the
inverse stays small. Substitution inside 16 x 16 blocks and then doubling,
[[X, 0], [M, Y]]^-1 = [[X', 0], [-Y' M X', Y']], never forms those powers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.linear import chunk

BLOCK = 16
_MATMUL = functools.partial(jnp.matmul, precision="highest")


def unit_lower_inverse(
  lower: jax.Array,
  *,
  matmul: Callable[[jax.Array, jax.Array], jax.Array] = _MATMUL,
) -> jax.Array:
  """`(I + lower)^-1`.

  Args:
    lower: `[..., C, C]`, strictly lower triangular; C is a power of two of
      16 or more, or less than 16.
    matmul: how products are made.

  Returns:
    `[..., C, C]`, unit lower triangular.
  """
  size = lower.shape[-1]
  row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  block = min(BLOCK, size)
  x = _substitute(lower, row, column, block, matmul)
  while block < size:
    # The rows of every odd block, the columns of the even one before it.
    pair = _together(row, column, 2 * block) & ~_together(row, column, block)
    corner = jnp.where(pair, lower, 0.0)
    product = matmul(corner, x)
    x = x - matmul(x, product)
    block *= 2
  return x


def _together(row, column, block):
  """Which pairs lie in one diagonal block."""
  return chunk.block(row, block) == chunk.block(column, block)


def _substitute(lower, row, column, block, matmul):
  """Inverts the diagonal blocks, all at once, a column at a time."""
  size = lower.shape[-1]
  dtype = lower.dtype
  count = size // block
  batch = lower.shape[:-2]
  same = _together(row, column, block)
  # Each row's own diagonal block, [.., C, block], by a product with zeros and
  # ones, which is exact: a TPU slices lanes badly.
  place = jax.lax.broadcasted_iota(jnp.int32, (size, block), 0)
  fold = (
    place - block * chunk.block(place, block)
    == jax.lax.broadcasted_iota(jnp.int32, (size, block), 1)
  ).astype(dtype)
  own = matmul(jnp.where(same, lower, 0.0), fold)
  x = jnp.broadcast_to(fold, own.shape)
  for j in range(block - 1):
    # Row j of every block is final: take its multiple from those below.
    final = x.reshape(*batch, count, block, block)[..., j : j + 1, :]
    final = jnp.broadcast_to(final, (*batch, count, block, block))
    x = x - own[..., j : j + 1] * final.reshape(own.shape)
  if count == 1:
    return x
  return jnp.where(same, matmul(x, fold.T), 0.0)
