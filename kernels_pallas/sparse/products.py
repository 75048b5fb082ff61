"""Products of statistics, as exact as their dtype on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
  """`jnp.einsum` of float32 operands in float32.

  By default accelerators round such operands to bfloat16 or TF32.
  """
  return jnp.einsum(spec, *operands, precision="highest")
