"""Checks of arguments that every family of kernels has."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def floating(name: str, x: Any) -> jax.Array:
  """`x` as an array; TypeError unless it is floating."""
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name} must be floating, got {x.dtype}")
  return x


def shaped(
  name: str, x: Any, wanted: tuple[int, ...], letters: str
) -> jax.Array:
  """`x` as a floating array; ValueError unless its shape is `wanted`."""
  x = floating(name, x)
  check_shape(name, x, wanted, letters)
  return x


def check_shape(
  name: str, x: Any, wanted: tuple[int, ...], letters: str
) -> None:
  """ValueError unless the shape of `x` is `wanted`."""
  if jnp.shape(x) != wanted:
    raise ValueError(
      f"{name} must have the shape [{letters}] = {list(wanted)}, got "
      f"{list(jnp.shape(x))}"
    )


def check_integers(name: str, x: Any) -> None:
  """TypeError unless `x` is of an integer dtype."""
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"{name} must be integers, got {dtype}")


def known(x: Any) -> bool:
  """Whether the values of `x` can be looked at here and now."""
  if isinstance(x, jax.core.Tracer):
    return False
  return getattr(x, "is_fully_addressable", True)


def check_scale(scale: Any, key_size: int) -> float:
  """`scale` as a float, K**-0.5 for None."""
  if scale is None:
    return key_size**-0.5
  if isinstance(scale, bool) or not isinstance(
    scale, int | float | np.integer | np.floating
  ):
    raise TypeError(
      "scale must be a Python number (multiply q for a traced one), got "
      f"{type(scale).__name__}"
    )
  return float(scale)
