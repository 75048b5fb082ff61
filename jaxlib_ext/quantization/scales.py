"""Scales of groups of elements, chosen so that requantizing changes nothing.

Each choice depends on a group's largest magnitude only, and gives the same
scale again for what the group is rounded to. Products of a code and its scale
are exact in float32: scales keep few significant bits, and are never so small
that a product would be subnormal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_ext.quantization import formats, rounding

_E4M3 = formats.Format.parse("float8_e4m3fn")
_NVFP4_MIN = 2.0**_E4M3.min_exponent
# The step between float32 numbers of 16 significant bits, as bits.
_UNIT = np.int32(1 << 8)
_E8M0_BAD = (0, 255)


def float32_scale(absmax: jax.Array, top: float, least: float) -> jax.Array:
  """The largest s of 16 significant bits with s·top <= absmax.

  Then absmax / s is at least top, and is clipped to it, and s·top (exact:
  `top` has at most 7 significant bits) gives s again. Tries the neighbours
  too, as the quotient may be off by one in either direction.

  Args:
    absmax: float32.
    top: what the largest magnitude becomes.
    least: of all scales; groups that would need a smaller one, groups of
      zeros for example, share it.

  Returns:
    float32 like absmax, NaN where absmax is not finite.
  """
  bits = jax.lax.bitcast_convert_type(absmax / top, jnp.int32) & -_UNIT
  scale = jax.lax.bitcast_convert_type(bits - _UNIT, jnp.float32)
  for candidate in (bits, bits + _UNIT):
    candidate = jax.lax.bitcast_convert_type(candidate, jnp.float32)
    scale = jnp.where(candidate * top <= absmax, candidate, scale)
  scale = jnp.where(absmax >= least * top, scale, least)
  return jnp.where(jnp.isfinite(absmax), scale, jnp.nan)


def e8m0_exponent(absmax: jax.Array, fmt: formats.Format) -> jax.Array:
  """The least k, from `least_exponent` up, with max·2^k >= absmax; int32.

  127 where absmax is not finite, which takes max·2^k out of float32's range.
  """
  bits = jax.lax.bitcast_convert_type(absmax, jnp.int32)
  top = int(np.float32(fmt.max).view(np.int32))
  # Adding one less than a whole exponent rounds up what exceeds the top's
  # mantissa.
  exponent = (bits - top + (1 << 23) - 1) >> 23
  exponent = jnp.maximum(exponent, least_exponent(fmt))
  return jnp.where(jnp.isfinite(absmax), exponent, 127)


def least_exponent(fmt: formats.Format) -> int:
  """The least exponent of a scale that is normal, as are its products."""
  return -126 - min(fmt.min_step_exponent, 0)


def nvfp4_scale(
  absmax: jax.Array, matrix_scale: jax.Array, top: float
) -> tuple[jax.Array, jax.Array]:
  """The nearest e4m3 multiple of the matrix scale, and whether it is free.

  A free scale holds on requantization only if the largest element of its
  block is rounded to `top`. Scales are kept normal numbers of e4m3: a block
  that would need less takes the least, which holds in any case.

  Returns:
    float32 scales that are e4m3 values, bool; both like absmax.
  """
  ideal = absmax / (matrix_scale * top)
  scale = rounding.to_grid(ideal, _E4M3, None)
  free = (scale >= _NVFP4_MIN) & jnp.isfinite(ideal)
  return jnp.maximum(scale, _NVFP4_MIN), free


def nvfp4_matrix_scale(absmax: jax.Array, fmt: formats.Format) -> jax.Array:
  """The float32 scale under which the largest block scale is 448."""
  least = 2.0 ** (least_exponent(fmt) - _E4M3.min_exponent)
  return float32_scale(absmax, fmt.max * _E4M3.max, least)


def is_unset(scales: jax.Array) -> jax.Array:
  """True where a scale is what zeroing an array of scales leaves.

  No quantized array has such scales, so a QTensor that was multiplied by 0 or
  made by `zeros_like` can be told from one. e8m0 has no zero: it becomes NaN
  or 2^-127 there.
  """
  if scales.dtype == jnp.float8_e8m0fnu:
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint8)
    return (bits == _E8M0_BAD[0]) | (bits == _E8M0_BAD[1])
  return scales.astype(jnp.float32) == 0
