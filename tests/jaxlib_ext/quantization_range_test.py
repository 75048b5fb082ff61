"""All of float32 in every format, beside a slow float64 reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxlib_ext import quantization
from tests.jaxlib_ext import quantization_test as common

MINIFLOATS = [
  f"e{e}m{m}" for e in range(1, 8) for m in range(7) if 1 + e + m <= 8
]
NAMES = (
  "int8",
  "int4",
  "int2",
  "float8_e4m3fn",
  "float8_e5m2",
  "mxfp8",
  "mxfp4",
  "nvfp4",
  *MINIFLOATS,
)
# One of each kind: the largest code below 4, between, far above; blocks that
# divide the length and one that does not.
QUICK = ("int2", "int8:16", "int4:20", "float8_e4m3fn", "e1m0:16", "e1m6",
         "e3m2:16", "e7m0", "mxfp8", "mxfp4", "nvfp4")  # fmt: skip
LARGEST = float(np.finfo(np.float32).max)
TINY = 2.0**-126


def patterns(seed: int) -> np.ndarray:
  """[96, 30] finite float32 from random bits, each column of another kind."""
  rng = np.random.default_rng(seed)
  bits = rng.integers(0, 2**32, (96, 30), dtype=np.uint64).astype(np.uint32)
  # Columns of one binade each, from subnormals to the largest, then of two.
  field = [0, 1, 2, 3, 8, 60, 127, 200, 250, 251, 252, 253, 254]
  for column, exponent in enumerate(field):
    keep = bits[:, column] & np.uint32(0x807FFFFF)
    bits[:, column] = keep | np.uint32(exponent << 23)
    mixed = bits[:, column].copy()
    mixed[::3] &= np.uint32(0x807FFFFF)  # Some subnormal.
    bits[:, column + 13] = mixed
  x = bits.view(np.float32)
  x = np.where(np.isfinite(x), x, np.float32(1))
  x[:, 26] = LARGEST * rng.choice([-1, 1], 96)
  x[:, 27] = 0
  # Ties and their neighbours, under a scale of 1 or so.
  x[:, 28] = rng.integers(-13, 14, 96) / 2
  x[:, 29] = np.nextafter(x[:, 28], np.float32(np.inf))
  return x.astype(np.float32)


def least_scale(fmt: quantization.Format) -> float:
  """The least whose products with codes, and itself, are not subnormal."""
  return TINY / min(2.0**fmt.min_step_exponent, 1.0)


def scale_of(peak: np.ndarray, fmt: quantization.Format) -> np.ndarray:
  """The largest of 16 significant bits that does not raise the peak."""
  least = least_scale(fmt)
  step = 2.0 ** (np.floor(np.log2(np.maximum(peak / fmt.max, least))) - 15)
  return np.maximum(np.floor(peak / fmt.max / step) * step, least)


def middle_rule(x: np.ndarray, values: np.ndarray) -> np.ndarray:
  """The nearest of ascending values >= 0, every other one being even.

  All in float64, where the values and their middles are exact.
  """
  high = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
  low = high - 1
  middle = (values[low] + values[high]) / 2
  even = np.where(low % 2 == 0, low, high)
  pick = np.where(x < middle, low, np.where(x > middle, high, even))
  return values[pick]


def reference(x: np.ndarray, q: quantization.QTensor, name: str):
  """Nearest values, and the values around each element: float64."""
  grid = common.grid_of(name)
  grid = grid[grid >= 0]
  scales = np.broadcast_to(common.scales_of(q), x.shape)
  near, below, above = (np.zeros(x.shape) for _ in range(3))
  size = np.abs(x.astype(np.float64))
  for where in np.ndindex(x.shape):
    values = grid * scales[where]
    values = values[values <= LARGEST]
    near[where] = middle_rule(size[where], values)
    i = np.searchsorted(values, size[where], "right")
    below[where] = values[i - 1]
    exact = values[i - 1] == size[where]
    above[where] = values[min(i - exact, len(values) - 1)]
  return near, below, above


def check(name: str, seed: int, quantize):
  fmt = quantization.Format.parse(name)
  x = patterns(seed)
  q = quantize(x, name)
  got = np.asarray(q.dequantize(), np.float64)
  near, _, _ = reference(x, q, name)
  peak = np.abs(x.astype(np.float64)).max(axis=0)
  if fmt.scale == "float32" and fmt.block is None:
    np.testing.assert_array_equal(np.asarray(q.scales)[0], scale_of(peak, fmt))
  if name == "nvfp4":
    # The largest of a block goes to the largest code.
    top = np.isclose(np.abs(got), 6 * common.scales_of(q), rtol=1e-6)
    near = np.where(top, np.abs(got), near)
  np.testing.assert_array_equal(np.abs(got), near)
  assert np.all((np.sign(got) == np.sign(x)) | (got == 0))
  # Bound of the formats' definitions alone, where the scale is free: half a
  # step, which the scale's 16 bits lengthen by 2^-15, or half of 2^-126.
  if fmt.scale == "float32" and fmt.block is None:
    scale = np.maximum(peak / fmt.max, least_scale(fmt))
    ratio = np.abs(x) / scale
    step = np.ones_like(ratio)
    if not fmt.is_integer:
      exponent = np.floor(np.log2(np.maximum(ratio, 2.0**fmt.min_exponent)))
      step = 2.0 ** (exponent - fmt.mantissa_bits)
    slack = (step / 2 + 2.0**-15 * ratio) * scale * (1 + 2.0**-15)
    np.testing.assert_array_less(np.abs(got - x), slack * (1 + 1e-9))
  common.assert_same_bits(quantize(np.asarray(q.dequantize()), name), q)
  # At random: one of the two neighbours, and the same on requantization.
  key = jax.random.key(seed)
  q = quantize(x, name, key=key)
  got = np.asarray(q.dequantize(), np.float64)
  if not name.startswith("mx"):  # Drawn under twice the stored scale at times.
    _, below, above = reference(x, q, name)
    around = (np.abs(got) == below) | (np.abs(got) == above)
    if name == "nvfp4":
      around |= np.isclose(np.abs(got), 6 * common.scales_of(q), rtol=1e-6)
    assert around.all()
  for other in (key, jax.random.key(seed + 1)):
    again = quantize(np.asarray(q.dequantize()), name, key=other)
    common.assert_same_bits(again, q)
    common.assert_same_bits(quantize(q, name, key=other), q)


class RangeTest(parameterized.TestCase):
  @parameterized.parameters(*QUICK)
  def test_all_of_float32(self, name):
    check(name, 0, common.quantize)

  @parameterized.parameters("int2", "e1m2:16", "mxfp4")
  def test_without_jit(self, name):
    x = patterns(1)
    for key in (None, jax.random.key(0)):
      q = quantization.quantize(x, name, key=key)
      common.assert_same_bits(common.quantize(x, name, key=key), q)
      common.assert_same_bits(quantization.quantize(q, name, key=key), q)

  @parameterized.parameters(*NAMES, *(f"{n}:32" for n in NAMES[:5]))
  @pytest.mark.slow
  def test_all_of_float32_in_every_format(self, name):
    for seed in range(2, 5):
      check(name, seed, common.quantize)

  @parameterized.parameters("int2", "e1m2", "e2m1")
  def test_large_values_of_the_issue(self, name):
    for value in (8.6e37, 1.7e38, 3.4e38):
      q = quantization.quantize(jnp.full((4, 1), value), name)
      np.testing.assert_allclose(q.dequantize(), value, rtol=2.0**-15)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_narrow_inputs(self, dtype):
    x = jnp.asarray(patterns(0)).astype(dtype)
    x = jnp.where(jnp.isfinite(x), x, 1)
    # NumPy converts what is subnormal too.
    wide = np.asarray(x).astype(np.float32)
    for name in ("int2", "int8:16", "mxfp8"):
      common.assert_same_bits(
        common.quantize(x, name), common.quantize(wide, name)
      )

  @parameterized.parameters("int2", "int4:16", "e4m3", "mxfp4", "nvfp4")
  def test_not_finite_requantizes_to_itself(self, name):
    x = common.sample((48, 5))
    x[3, 0], x[4, 1], x[5, 2], x[6, 2] = np.nan, -np.inf, np.inf, -np.nan
    for key in (None, jax.random.key(0)):
      q = common.quantize(x, name, key=key)
      common.assert_same_bits(
        common.quantize(np.asarray(q.dequantize()), name, key=key), q
      )

  def test_float64_inputs(self):
    with jax.enable_x64(True):
      x = patterns(0).astype(np.float64) * (1 + 1e-12)
      x = np.clip(x, -LARGEST, LARGEST)
      x[0, 27], x[1, 27] = 1e-320, -1e-300
      for name in ("int2", "e1m2:16", "nvfp4"):
        common.assert_same_bits(
          quantization.quantize(jnp.asarray(x), name),
          quantization.quantize(x.astype(np.float32), name),
        )
      q = quantization.quantize(jnp.full((4, 1), 1e300), "int8")
      self.assertTrue(np.isnan(q.dequantize()).all())

  @parameterized.product(
    name=("int2", "e1m2", "int8", "e4m3"), size=(LARGEST, TINY * 0.75, 1e-37)
  )
  def test_unbiased_at_the_ends(self, name, size):
    # Shares of the largest magnitude, which itself fixes the scale. At the
    # lower end the step is 2^-126, of which these are parts.
    share = np.linspace(-1, 1, 65)[:, None]
    x = (share * size).astype(np.float32)
    n = 2000
    draws = jax.jit(
      jax.vmap(lambda k: quantization.quantize(x, name, key=k).dequantize())
    )(jax.random.split(jax.random.key(7), n))
    q = common.quantize(x, name)
    _, below, above = reference(x, q, name)
    mean = np.asarray(draws, np.float64).mean(axis=0)
    step = above - below
    part = np.abs(x.astype(np.float64)) - below
    part = np.divide(part, step, where=step > 0, out=np.zeros_like(step))
    # Five and a half deviations of the mean of n draws, their resolution, the
    # scale's truncation, a few draws where few move.
    spread = np.sqrt(part * (1 - part).clip(0) / n)
    allowed = (5.5 * spread + 2.0**-15 + 5 / n) * step + 2.0**-15 * np.abs(x)
    np.testing.assert_array_less(np.abs(mean - x), allowed + 1e-60)


if __name__ == "__main__":
  absltest.main()
