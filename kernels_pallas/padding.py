"""Arrays widened to whole blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def to_multiple(
  x: jax.Array, axis: int, multiple: int, **how: Any
) -> jax.Array:
  """Widens an axis at its end to the next multiple.

  Args:
    x: any array.
    axis: not negative.
    multiple: of the size to reach.
    **how: as for `jnp.pad`, which fills with zeros by default.
  """
  extra = -x.shape[axis] % multiple
  if not extra:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, extra)
  return jnp.pad(x, widths, **how)


def last_axes(x: jax.Array, *sizes: int, **how: Any) -> jax.Array:
  """Widens the last axes at their ends to `sizes`.

  Args:
    x: any array.
    *sizes: of the last axes, none less than it is.
    **how: as for `jnp.pad`.
  """
  kept = x.ndim - len(sizes)
  widths = [(0, 0)] * kept + [
    (0, size - n) for size, n in zip(sizes, x.shape[kept:], strict=True)
  ]
  return jnp.pad(x, widths, **how)
