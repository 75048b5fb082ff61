"""An order among computations that have none."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def after(x: jax.Array, earlier: jax.Array | None) -> jax.Array:
  """x, which on a CPU waits until `earlier` has been computed.

  For stacks of matrices that are factored one stack after another. jaxlib
  0.10 divides the factorizations of a stack (QR, Cholesky, eigenvalues) among
  the threads of XLA's pool and waits for them on one of these threads: as many
  stacks at once as there are threads stand still for ever.

  The order is made of data: barriers and control dependencies are gone by the
  time that XLA:CPU starts whatever has its operands.

  Args:
    x: real floating array.
    earlier: real floating array of at least one number, or None, which
      changes nothing.

  Returns:
    x.
  """
  if earlier is None:
    return x
  never = earlier[(0,) * earlier.ndim] > jnp.inf
  return jax.lax.platform_dependent(
    x, never, cpu=lambda x, never: jnp.where(never, 0, x), default=_first
  )


def _first(x, never):
  del never
  return x
