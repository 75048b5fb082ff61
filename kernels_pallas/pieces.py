"""Float32 products from bfloat16 pieces, for matrix units.

A TPU's multiply bfloat16; a float32 product in full precision is six of theirs,
of three pieces of each operand. Fewer do where an operand needs one piece
only, or where the product is of what was rounded to bfloat16 before.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import products


def head(x: jax.Array) -> jax.Array:
  """Float32 `x`, rounded to the digits of bfloat16.

  By integer operations, which no compiler simplifies away as it may a
  conversion there and back.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) + np.int32(2**15)
  bits &= np.int32(-(2**16))
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def split(x: jax.Array, count: int) -> list[jax.Array]:
  """Float32 as the sum of bfloat16 pieces: three hold every bit, two 16."""
  out = []
  for _ in range(count):
    piece = head(x)
    out.append(piece.astype(jnp.bfloat16))
    x = x - piece
  return out


def operands(
  x: jax.Array, count: int, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, ...]:
  """What a GPU's matrix units multiply instead of `x`, the largest first.

  They keep 11 bits of float32. Three parts of bfloat16 have 24 in all, and
  products of them are exact in float32.

  Args:
    x: any array, float32 for several parts.
    count: how many parts add up to it.
    dtype: of a single part.
  """
  return (x.astype(dtype),) if count == 1 else tuple(split(x, count))


@jax.custom_vjp
def mask_dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """As `products.mask_dot`, in three exact products.

  Args:
    a: `[M, K]`, float32, or bool if b is not.
    b: `[K, N]`, likewise.

  Returns:
    `[M, N]`.
  """
  return _mask_dot(a, b)


def _mask_dot(a, b, **how):
  left = a.dtype == jnp.bool_
  mask, x = (a, b) if left else (b, a)
  if x.dtype != jnp.float32:  # float64, in the interpreter.
    mask = mask.astype(x.dtype)
    return products.dot(*((mask, x) if left else (x, mask)), **how)
  mask = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
  dot = functools.partial(products.dot, **how, precision="default")
  return sum(
    dot(mask, piece) if left else dot(piece, mask) for piece in split(x, 3)
  )


def _mask_dot_forward(a, b):
  return _mask_dot(a, b), (a, b)


def _mask_dot_backward(operands, dout):
  a, b = operands
  if a.dtype == jnp.bool_:
    return None, _mask_dot(a, dout, ta=True)
  return _mask_dot(dout, b, tb=True), None


mask_dot.defvjp(_mask_dot_forward, _mask_dot_backward)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a @ b` of float32 matrices to 16 bits, in three products."""
  a, low_a = split(a, 2)
  b, low_b = split(b, 2)
  dot = functools.partial(products.dot, precision="default")
  return dot(a, b) + (dot(a, low_b) + dot(low_a, b))
