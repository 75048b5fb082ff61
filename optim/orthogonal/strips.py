"""Newton-Schulz where devices share matrices: each has some of the columns.

A step needs R = X Xᵀ [m, m], the sum over all columns. Its exchange and the
products [m, m] by [m, m], which every strip does again, are what strips cost.
Both are kept small:

- R and its polynomials are symmetric. Their blocks on and above the diagonal
  are computed, and exchanged in X's dtype; the others are mirrored.
- Where P = a + b R + c R² is a step, the next one's R is P R P. Every second
  step may predict it so, without an exchange. For one step, and as X itself is
  multiplied at every step, that keeps a known schedule's range in bfloat16
  too: the largest singular value is at most 0.02 above the direct form's (the
  tests say of what). `gram` says what happens otherwise.

The first step, whose a is the largest in the minimax schedules, is followed by
an exchange: a² is what rounding errors of R grow by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Blocks of a side: more spare more, of narrower products.
_MOST_BLOCKS = 8
_LEAST_BLOCK = 128


def _blocks(m: int) -> int:
  """Into how many blocks a side m is cut: a power of 2."""
  count = _MOST_BLOCKS
  while count > 1 and (m % count or m // count < _LEAST_BLOCK):
    count //= 2
  return count


def exchanges(steps: int, predict: bool) -> int:
  """How many of the steps add up Gram matrices: 1st, 2nd, 4th, ..., or all."""
  return 1 + steps // 2 if predict else steps


def entries(m: int) -> float:
  """Numbers of a symmetric [m, m] that are computed and exchanged."""
  blocks = _blocks(m)
  return m * m * (blocks + 1) / (2 * blocks)


def flops(m: int, n: int, steps: int, predict: bool) -> float:
  """Multiplications and additions of one strip [m, n] in all steps."""
  sums = exchanges(steps, predict)
  short = steps + 2 * (steps - sums)
  return 2 * (entries(m) * (sums * n + short * m) + steps * m * m * n)


def iterate(
  x: jax.Array,
  table: jax.Array,
  *,
  total: Callable[[jax.Array, Any], jax.Array],
  precision: Any,
  predict: bool,
) -> jax.Array:
  """Applies the polynomials of `table` to strips of matrices.

  Args:
    x: [s, m, n], some columns of each matrix.
    table: [steps, 3], in the accumulator's dtype.
    total: sums an array over the strips of a matrix, in its dtype; exchanges
      in the dtype given.
    precision: as in `jax.lax.dot_general`.
    predict: whether every second step predicts its Gram matrix.

  Returns:
    Like x, and in its dtype.
  """
  one = functools.partial(
    _iterate, table=table, total=total, precision=precision, predict=predict
  )
  return jax.vmap(one)(x)


def _iterate(x, table, total, precision, predict):
  wide, narrow = table.dtype, x.dtype
  dot = functools.partial(
    jnp.matmul, precision=precision, preferred_element_type=wide
  )
  whole = lambda upper: _mirror(upper.astype(narrow))
  square = lambda p, q: _upper(p, q, dot)
  gram = None
  for i, (a, b, c) in enumerate(table):
    if gram is None:
      gram = total(square(x, x.T), narrow)
    low = whole(gram)
    z = b * gram + c * square(low, low)
    step = whole(z)
    x = (a * x.astype(wide) + dot(step, x)).astype(narrow)
    if predict and i % 2:
      # P R P = a T + T Z for P = a + Z and T = R P = a R + R Z.
      product = a * gram + square(low, step)
      gram = a * product + square(whole(product), step)
    else:
      gram = None
  return x


def _upper(p, q, dot):
  """The blocks of a symmetric p q on and above the diagonal.

  Returns:
    [m / 2, m + m / blocks]: rows i of blocks, followed by rows blocks - 1 - i;
    [m, m] of one block.
  """
  m = p.shape[0]
  blocks = _blocks(m)
  starts = range(0, m, m // blocks)
  rows = [dot(p[i : i + m // blocks], q[:, i:]) for i in starts]
  if blocks == 1:
    return rows[0]
  half = blocks // 2
  pairs = zip(rows[:half], rows[: -half - 1 : -1], strict=True)
  return jnp.concatenate([jnp.concatenate(pair, axis=1) for pair in pairs])


def _mirror(upper):
  """The symmetric matrix of `_upper`."""
  half, width = upper.shape
  if half == width:
    return upper
  m = 2 * half
  size = width - m
  parts = [
    jnp.split(upper[i : i + size], [m - i], axis=1)
    for i in range(0, half, size)
  ]
  rows = [first for first, _ in parts] + [last for _, last in reversed(parts)]
  return functools.reduce(_bordered, reversed(rows))


def _bordered(inner, row):
  """[[row], [the transpose of row's rest, inner]]."""
  rest = row[:, row.shape[0] :]
  return jnp.concatenate([row, jnp.concatenate([rest.T, inner], axis=1)])
