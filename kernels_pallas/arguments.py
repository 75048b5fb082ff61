"""Checks of arguments that every family of kernels has."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def floating(name: str, x: Any) -> jax.Array:
  """`x` as an array; TypeError unless it is floating."""
  if x is None:
    raise TypeError(f"{name} must be an array, got None")
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name} must be floating, got {x.dtype}")
  return x


def ranked(name: str, x: Any, letters: str) -> jax.Array:
  """`x` as a floating array; ValueError unless it has an axis a letter."""
  x = floating(name, x)
  if x.ndim != letters.count(",") + 1:
    raise ValueError(
      f"{name} must have the shape [{letters}], got {list(x.shape)}"
    )
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


def known(x: Any) -> bool:
  """Whether the values of `x` can be looked at here and now."""
  if isinstance(x, jax.core.Tracer):
    return False
  return getattr(x, "is_fully_addressable", True)


def integers(name: str, x: Any) -> np.ndarray | jax.Array:
  """`x` as an array of integers of which none is cut to fewer bits.

  JAX cuts what it is given to 32 bits unless `jax_enable_x64` is set, so
  values are looked at before they become its arrays.

  Args:
    name: of the argument.
    x: an integer, nested sequences of them, or an array.

  Returns:
    A `jax.Array` as it is, all else as a NumPy array: of Python's ints where
    some need more than 64 bits.

  Raises:
    TypeError: for anything but integers.
  """
  if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
    x = jnp.asarray(x)
  elif not hasattr(x, "dtype"):
    x = _of_python(name, x)
  elif not isinstance(x, jax.Array):
    x = np.asarray(x)
  if x.dtype != object and not jnp.issubdtype(x.dtype, jnp.integer):
    raise TypeError(f"{name} must be integers, got {x.dtype}")
  return x


def _of_python(name: str, x: Any) -> np.ndarray:
  """An array of Python's or NumPy's integers, int64 where that holds them."""
  try:
    x = np.asarray(x, object)
  except ValueError as e:
    raise TypeError(f"{name} must be integers, got {x!r}") from e
  for entry in x.flat:
    if isinstance(entry, bool) or not isinstance(entry, int | np.integer):
      raise TypeError(
        f"{name} must be integers, got {type(entry).__name__} {entry!r}"
      )
  int64 = np.iinfo(np.int64)
  fits = all(int64.min <= entry <= int64.max for entry in x.flat)
  return x.astype(np.int64) if fits else x


def saturated(x: np.ndarray | jax.Array, most: int) -> np.ndarray | jax.Array:
  """Integers as int32, brought to -`most` and `most` where they lie beyond.

  Args:
    x: as `integers` returns them.
    most: at most 2^31 - 1.
  """
  xp = jnp if isinstance(x, jax.Array) else np
  if x.dtype == object:
    # Of a scalar of objects NumPy gives the object.
    x = np.asarray(np.maximum(np.minimum(x, most), -most))
  elif jnp.iinfo(x.dtype).max > most:
    x = xp.minimum(x, most)
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
      x = xp.maximum(x, -most)
  return x.astype(np.int32)


def renumbered(x: np.ndarray | jax.Array) -> jax.Array:
  """Labels as int32, equal within a row exactly where `x` is.

  Those that int32 holds stay as they are; others become ranks, or where only
  their dtype is known and has 32 bits, the int32 of the same bits.

  Args:
    x: as `integers` returns them, `[..., T]`.
  """
  if isinstance(x, np.ndarray):
    int32 = np.iinfo(np.int32)
    if x.size and not (int32.min <= x.min() and x.max() <= int32.max):
      x = np.unique(x, return_inverse=True)[1].reshape(x.shape)
    return jnp.asarray(x.astype(np.int32))
  if x.dtype == jnp.uint32:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
  if jnp.iinfo(x.dtype).bits <= 32:
    return x.astype(jnp.int32)
  order = jnp.argsort(x, axis=-1)
  ordered = jnp.take_along_axis(x, order, axis=-1)
  new = (ordered[..., 1:] != ordered[..., :-1]).astype(jnp.int32)
  before = [(0, 0)] * (x.ndim - 1) + [(1, 0)]
  rank = jnp.pad(jnp.cumsum(new, axis=-1, dtype=jnp.int32), before)
  return jnp.take_along_axis(rank, jnp.argsort(order, axis=-1), axis=-1)


def integer(
  name: str, x: Any, least: int, most: int | None = None, letters: str = ""
) -> int:
  """One Python or NumPy integer as an int; `letters` is what `most` is called.

  Raises:
    ValueError: unless it is one from `least` to `most`.
  """
  try:
    value = None if _is_bool(x) else operator.index(x)
  except TypeError:
    value = None
  if value is None or value < least or (most is not None and value > most):
    named = f"{letters} = {most}" if letters else most
    span = (
      f"of at least {least}" if most is None else f"from {least} to {named}"
    )
    raise ValueError(f"{name} must be an int {span}, got {x!r}")
  return value


def number(x: Any) -> float | None:
  """One Python or NumPy number as a float, None for anything else."""
  if isinstance(x, jax.core.Tracer) or _is_bool(x):
    return None
  if not isinstance(x, int | float):
    dtype = getattr(x, "dtype", None)
    if dtype is None or np.ndim(x) or not jnp.issubdtype(dtype, jnp.number):
      return None
    if jnp.issubdtype(dtype, jnp.complexfloating):
      return None
  try:
    return float(x)
  except OverflowError:  # An int beyond all floats.
    return math.inf if x > 0 else -math.inf


def _is_bool(x: Any) -> bool:
  return isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_


def check_range(name: str, x: Any, most: int, letters: str) -> None:
  """ValueError where known integers are not from 0 to `most`, the `letters`."""
  if not known(x):
    return
  values = np.asarray(x)
  low, high = int(values.min()), int(values.max())
  if low < 0 or high > most:
    raise ValueError(
      f"{name} must be from 0 to {letters} = {most}, got "
      f"{low if low < 0 else high}"
    )


def check_scale(scale: Any, key_size: int) -> float:
  """`scale` as a float, K**-0.5 for None.

  Raises:
    TypeError: unless it is one Python or NumPy number.
    ValueError: unless it is finite.
  """
  if scale is None:
    return key_size**-0.5
  value = number(scale)
  if value is None:
    raise TypeError(
      "scale must be a Python number (multiply q for a traced one), got "
      f"{type(scale).__name__}"
    )
  if not math.isfinite(value):
    raise ValueError(f"scale must be finite, got {scale!r}")
  return value
