"""Number formats of quantized arrays and the parser of their names."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

import jax.numpy as jnp

_NAMES = (
  "int8",
  "int4",
  "int2",
  "float8_e4m3fn",
  "float8_e5m2",
  "e2m1",
  "e3m2",
  "e2m3",
  "mxfp8",
  "mxfp4",
  "nvfp4",
)
_FORMS = (
  '"int8", "int4", "int2", "float8_e4m3fn", "float8_e5m2", a minifloat '
  '"eXmY" of at most 8 bits with X >= 1 (each also with ":<block>", as in '
  '"int4:32"), "mxfp8", "mxfp4", "nvfp4"'
)


@dataclasses.dataclass(frozen=True)
class Format:
  """How the elements of a quantized array and their scales are stored.

  Made by `Format.parse`; hashable, so it can be static under `jax.jit`.

  Attributes:
    name: what `parse` takes to give this format again.
    block: elements that share one scale, along the contraction axis; None
      for one scale per output channel.
    scale: what a scale is: "float32", "e8m0" (a power of two) or "e4m3"
      (beside one float32 scale per matrix).
    exponent_bits: of an element; 0 for integers.
    mantissa_bits: explicit ones of a float; of an integer all but the sign.
    max: the largest magnitude an element takes; grids are symmetric.
    dtype: of the stored codes. Formats that XLA has no (safe) type for are
      bit patterns in uint8.
  """

  name: str
  block: int | None
  scale: str
  exponent_bits: int
  mantissa_bits: int
  max: float
  dtype: Any

  @staticmethod
  def parse(text: str) -> Format:
    """The format called `text`, such as "int4:32", "e3m2:32" or "nvfp4".

    Args:
      text: `name` or `name:block`; without a block there is one scale per
        output channel. "mxfp8", "mxfp4" and "nvfp4" fix their own blocks.

    Raises:
      ValueError: no such format; the message names the nearest ones.
    """
    if not isinstance(text, str):
      raise ValueError(f"format: got {text!r}; allowed: {_FORMS}")
    if text in _FIXED:
      return _FIXED[text]
    base, colon, block_text = text.partition(":")
    block = None
    if colon:
      # isdecimal alone lets other scripts' digits through.
      if not re.fullmatch(r"[1-9][0-9]{0,8}", block_text):
        raise ValueError(
          f"format: got {text!r}, whose block {block_text!r} is not a "
          "positive integer"
        )
      block = int(block_text)
    if base in _FIXED:
      raise ValueError(
        f"format: got {text!r}; {base!r} has a fixed block of "
        f"{_FIXED[base].block} and takes none"
      )
    if base in _ELEMENTS:
      return Format(text, block, "float32", *_ELEMENTS[base])
    match = re.fullmatch(r"e([1-7])m([0-6])", base)
    if match:
      e, m = int(match[1]), int(match[2])
      if 1 + e + m <= 8:
        return Format(text, block, "float32", *_minifloat(e, m))
    near = difflib.get_close_matches(base, _NAMES) or _NAMES
    raise ValueError(
      f"format: got {text!r}; allowed: {_FORMS}; nearest: "
      f"{', '.join(map(repr, near))}"
    )

  def __str__(self) -> str:
    return self.name

  @property
  def is_integer(self) -> bool:
    return self.exponent_bits == 0

  @property
  def bits(self) -> int:
    """Of one element, sign included."""
    return 1 + self.exponent_bits + self.mantissa_bits

  @property
  def scale_bits(self) -> int:
    """Of one scale (an nvfp4 matrix has 32 more)."""
    return 32 if self.scale == "float32" else 8

  @property
  def min_exponent(self) -> int:
    """The exponent below which a float's grid is evenly spaced."""
    return 2 - 2 ** (self.exponent_bits - 1) if self.exponent_bits > 1 else 1

  @property
  def min_step_exponent(self) -> int:
    """log2 of the finest grid step, which is also the least positive code."""
    return 0 if self.is_integer else self.min_exponent - self.mantissa_bits

  @property
  def is_bit_pattern(self) -> bool:
    """Whether codes are sign, exponent and mantissa bits in a uint8."""
    return self.dtype == jnp.uint8


def _minifloat(e: int, m: int) -> tuple[int, int, float, Any]:
  """A float all of whose codes are numbers (arXiv 2311.12359, section 3)."""
  bias = 2 ** (e - 1) - 1
  top = 2.0 ** (2**e - 1 - bias) * (2 - 2.0**-m)
  dtype = jnp.float4_e2m1fn if (e, m) == (2, 1) else jnp.uint8
  return e, m, top, jnp.dtype(dtype)


# exponent bits, mantissa bits, largest magnitude, storage. The integers leave
# out their lowest code to be symmetric. XLA's CPU compiler aborts the process
# on a concatenation of int2 (jax 0.10.2 and 0.12.0), so int2 is kept in int4.
_ELEMENTS = {
  "int8": (0, 7, 127.0, jnp.dtype(jnp.int8)),
  "int4": (0, 3, 7.0, jnp.dtype(jnp.int4)),
  "int2": (0, 1, 1.0, jnp.dtype(jnp.int4)),
  "float8_e4m3fn": (4, 3, 448.0, jnp.dtype(jnp.float8_e4m3fn)),
  "float8_e5m2": (5, 2, 57344.0, jnp.dtype(jnp.float8_e5m2)),
}

_FIXED = {
  "mxfp8": Format("mxfp8", 32, "e8m0", *_ELEMENTS["float8_e4m3fn"]),
  "mxfp4": Format("mxfp4", 32, "e8m0", *_minifloat(2, 1)),
  "nvfp4": Format("nvfp4", 16, "e4m3", *_minifloat(2, 1)),
}
