"""What Adam's relatives have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def since_reset(count: jax.Array, every: Any) -> tuple[jax.Array, jax.Array]:
  """How many steps ago, and how many times, a reset took place.

  Args:
    count: int32, the steps before this one.
    every: a reset comes before step `every`, `2 every`, ... counted from 0; 0
      is never.

  Returns:
    Two int32 scalars, `count` and 0 before the first reset.
  """
  every = jnp.asarray(every, jnp.int32)
  period = jnp.where(every > 0, every, jnp.iinfo(jnp.int32).max)
  return count % period, count // period
