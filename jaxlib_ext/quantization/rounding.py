"""Rounding to the grids of small formats, and the bits to do it at random."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_ext.quantization import formats

# Random numbers are odd multiples of 2^-15: they stay 2^-15 away from 0 and 1,
# so a value that is on the grid but for the last bits of a division (no
# backend owes an exact one) is never moved off it. The expectation is right to
# 2^-15 of a grid step.
_UNIFORM_BITS = 14


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 in which each input bit moves each output bit.

  Two xor-shift-multiply rounds with the multipliers of the well-known
  "lowbias32" search by C. Wellons.
  """
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random numbers in (0, 1), one per element, cheap enough to fuse.

  Threefry's 20 rounds per element take many times as long as quantizing the
  element. Here threefry gives 64 bits per call, and each element hashes its
  own position with them, twice, since one keyed hash of a counter would give
  two keys shifted copies of one sequence. Depends on positions alone, so
  sharding changes no number. For rounding only: it is no general generator.

  Args:
    key: a PRNG key.
    shape: of the result; of the product of the dimensions only the lowest 32
      bits tell elements apart.

  Returns:
    float32 [*shape], odd multiples of 2^-15.
  """
  words = jax.random.bits(key, (2,), jnp.uint32)
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index = index + iota * np.uint32(stride)
  bits = _mix(_mix(index ^ words[0]) ^ words[1])
  # int32 first: float conversions of unsigned integers are slow on x86.
  top = (bits >> (32 - _UNIFORM_BITS)).astype(jnp.int32)
  return top.astype(jnp.float32) * 2.0**-_UNIFORM_BITS + 2.0 ** -(
    _UNIFORM_BITS + 1
  )


def _step_exponent(magnitude: jax.Array, fmt: formats.Format) -> jax.Array:
  """floor(log2 magnitude), no lower than where the grid turns even."""
  bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
  return jnp.maximum((bits >> 23) - 127, fmt.min_exponent)


def power_of_two(exponent: jax.Array) -> jax.Array:
  """2^exponent as float32, exactly, for int32 in [-126, 127]; 0 for -127."""
  return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


class Divisor(NamedTuple):
  """A scale as `rest` · 2^`exponent`: no factor's reciprocal is subnormal.

  XLA divides by a broadcast array by multiplying with its reciprocal, which
  every CPU and TPU flushes to zero for a scale above 2^126.

  Attributes:
    exponent: int32 in [-126, 126].
    rest: float32 in [1, 4).
    reciprocal: of `rest`, rounded.
  """

  exponent: Any
  rest: Any
  reciprocal: Any


ONE = Divisor(np.int32(0), np.float32(1), np.float32(1))


def divisor(scales: jax.Array) -> Divisor:
  """Splits positive float32 scales that are not subnormal."""
  field = jax.lax.bitcast_convert_type(scales, jnp.int32) >> 23
  exponent = jnp.clip(field - 127, -126, 126)
  rest = scales * power_of_two(-exponent)
  return Divisor(exponent, rest, 1 / rest)


def to_grid(
  x: jax.Array,
  fmt: formats.Format,
  noise: jax.Array | None,
  by: Divisor = ONE,
) -> jax.Array:
  """Rounds x / scale to values of the format's grid, clipping at its ends.

  To nearest, it is the nearest of the grid's values times the scale, exactly:
  which side of the middle x is on is found without a division, from products
  of few bits. Subnormal x count in full, also where arithmetic flushes them.

  Args:
    x: float32; NaN becomes the largest value.
    fmt: whose grid to take.
    noise: `uniform` of x's shape to round up with the probability that is
      the distance from the lower neighbour in steps; None for the nearest
      value, ties going to the even multiple of the step.
    by: the scale, whose significand has at most 16 bits (20 if the grid's
      have at most 4), in a shape that broadcasts to x's.

  Returns:
    float32 like x, without negative zeros.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  low = bits & np.int32(0x7FFFFFFF)
  # A subnormal number is its bits, as an integer, times 2^-149.
  subnormal = low < 1 << 23
  magnitude = jnp.where(
    subnormal,
    low.astype(jnp.float32),
    jax.lax.bitcast_convert_type(low, jnp.float32),
  )
  exponent = jnp.where(subnormal, -149 - by.exponent, -by.exponent)
  # 2^-127 comes out as 0, which so small a share of a scale rounds to.
  magnitude = magnitude * power_of_two(jnp.maximum(exponent, -127))
  top = np.float32(fmt.max)
  ratio = magnitude * by.reciprocal
  number = ratio == ratio
  ratio = jnp.where(ratio <= top, ratio, top)
  magnitude = jnp.minimum(magnitude, top * by.rest)
  if fmt.is_integer:
    rounded = _round(magnitude, by.rest, ratio, noise)
  else:
    exponent = _step_exponent(ratio, fmt) - fmt.mantissa_bits
    steps = power_of_two(-exponent)
    rounded = _round(magnitude * steps, by.rest, ratio * steps, noise)
    rounded = rounded * power_of_two(exponent)
  # What is divided by NaN has no sign, so that it has none the next time.
  negative = (bits < 0) & number & (rounded > 0)
  return jnp.where(negative, -rounded, rounded)


def _round(x, scale, ratio, noise):
  """x / scale, which is about `ratio`, to a whole number."""
  if noise is not None:
    return jnp.floor(ratio + noise)
  below = jnp.floor(ratio)
  # The sign of the difference is right, `below` or not where it is off by one:
  # the product is exact.
  above_middle = x - (below + 0.5) * scale
  even = 2 * jax.lax.round(
    0.5 * below + 0.25, jax.lax.RoundingMethod.TO_NEAREST_EVEN
  )
  nearest = jnp.where(above_middle == 0, even, below)
  return jnp.where(above_middle > 0, below + 1, nearest)


def encode(values: jax.Array, fmt: formats.Format) -> jax.Array:
  """Stores float32 values that are on the grid in the format's dtype."""
  if not fmt.is_bit_pattern:
    return values.astype(fmt.dtype)
  magnitude = jnp.abs(values)
  exponent = _step_exponent(magnitude, fmt)
  step = power_of_two(fmt.mantissa_bits - exponent)
  # A normal number's leading bit carries into the exponent field by itself.
  pattern = (magnitude * step).astype(jnp.int32) + (
    (exponent - fmt.min_exponent) << fmt.mantissa_bits
  )
  sign = (values < 0).astype(jnp.int32) << (fmt.bits - 1)
  return (pattern | sign).astype(jnp.uint8)


def decode(codes: jax.Array, fmt: formats.Format) -> jax.Array:
  """The float32 values of codes, without their scales."""
  if not fmt.is_bit_pattern:
    return codes.astype(jnp.float32)
  m = fmt.mantissa_bits
  pattern = codes.astype(jnp.int32) & (2 ** (fmt.bits - 1) - 1)
  field, mantissa = pattern >> m, pattern & (2**m - 1)
  significand = jnp.where(field > 0, mantissa + 2**m, mantissa)
  exponent = jnp.maximum(field, 1) - 1 + fmt.min_step_exponent
  magnitude = significand.astype(jnp.float32) * power_of_two(exponent)
  return jnp.where(codes >> (fmt.bits - 1) > 0, -magnitude, magnitude)
