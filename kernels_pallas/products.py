"""Products of matrices, as exact as their dtype on every platform.

By default accelerators round float32 operands to bfloat16 or TF32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

MaskDot = Callable[[jax.Array, jax.Array], jax.Array]


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
  """`jnp.einsum` of float32 operands in float32."""
  return jnp.einsum(spec, *operands, precision="highest")


def dot(
  a: jax.Array,
  b: jax.Array,
  *,
  ta: bool = False,
  tb: bool = False,
  precision: jax.lax.PrecisionLike = "highest",
) -> jax.Array:
  """`a @ b` of the last two axes, either transposed, leading axes broadcast.

  The result is at least float32.
  """
  if b.ndim == 2 and not ta:
    # One product of all rows, rather than a batch with copies of b.
    return jax.lax.dot_general(
      a,
      b,
      (((a.ndim - 1,), (1 if tb else 0,)), ((), ())),
      precision=precision,
      preferred_element_type=_at_least_float32(a, b),
    )
  batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
  a = jnp.broadcast_to(a, (*batch, *a.shape[-2:]))
  b = jnp.broadcast_to(b, (*batch, *b.shape[-2:]))
  n = len(batch)
  axes = tuple(range(n))
  contract = ((n if ta else n + 1,), (n + 1 if tb else n,))
  return jax.lax.dot_general(
    a,
    b,
    (contract, (axes, axes)),
    precision=precision,
    preferred_element_type=_at_least_float32(a, b),
  )


def mask_dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """`dot` where one of the two is a mask: bool, of zeros and ones."""
  dtype = b.dtype if a.dtype == jnp.bool_ else a.dtype
  return dot(a.astype(dtype), b.astype(dtype))


def _at_least_float32(a, b):
  return jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
