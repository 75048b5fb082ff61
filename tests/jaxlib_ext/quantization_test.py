"""Values, grids, extremes and transformations of quantized arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxlib_ext import quantization

NATIVE = {
  "int8": np.arange(-127, 128),
  "int4": np.arange(-7, 8),
  "int2": np.arange(-1, 2),
  "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "float8_e5m2": ml_dtypes.float8_e5m2,
  "mxfp8": ml_dtypes.float8_e4m3fn,
  "mxfp4": ml_dtypes.float4_e2m1fn,
  "nvfp4": ml_dtypes.float4_e2m1fn,
}
FORMATS = (
  "int8",
  "int4:32",
  "int2:16",
  "float8_e4m3fn",
  "float8_e5m2:32",
  "mxfp8",
  "mxfp4",
  "nvfp4",
  "e2m1:32",
  "e3m2:32",
  "e2m3",
  "e3m0:16",
  "e1m2:16",
  "e7m0",
  "e4m3:24",
)
ROUNDINGS = (None, 5)


def grid_of(name: str) -> np.ndarray:
  """All values of a format, ascending, by listing them (float64)."""
  base = name.partition(":")[0]
  source = NATIVE.get(base)
  if isinstance(source, np.ndarray):
    return source.astype(np.float64)
  if source is not None:
    bits = np.arange(16 if "4" in base[2:] and "fp4" in base else 256)
    values = bits.astype(np.uint8).view(source).astype(np.float64)
    values = values[np.isfinite(values)]
  else:
    e, m = int(base[1]), int(base[3])
    bias = 2 ** (e - 1) - 1
    values = [
      2.0 ** (1 - bias) * f / 2**m if field == 0
      else 2.0 ** (field - bias) * (1 + f / 2**m)
      for field in range(2**e)
      for f in range(2**m)
    ]  # fmt: skip
    values = np.array(values)
  return np.unique(np.concatenate([values, -values]) + 0.0)


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
  """The nearest grid value; ties to the even multiple of the local step."""
  x = np.clip(x, grid[0], grid[-1])
  hi = np.searchsorted(grid, np.abs(x)).clip(1, len(grid) - 1)
  low, high = grid[hi - 1], grid[hi]
  below, above = np.abs(x) - low, high - np.abs(x)
  even_low = (low / (high - low)) % 2 == 0
  pick_low = (below < above) | ((below == above) & even_low)
  # + 0.0: no negative zeros.
  return np.sign(x) * np.where(pick_low, low, high) + 0.0


def expand(scales: np.ndarray, q: quantization.QTensor) -> np.ndarray:
  """One scale per element, by indexing."""
  block = q.format.block or q.shape[-2]
  return scales[..., np.arange(q.shape[-2]) // block, :]


def scales_of(q: quantization.QTensor) -> np.ndarray:
  scales = np.asarray(q.scales).astype(np.float64)
  if q.matrix_scale is not None:
    scales = scales * np.asarray(q.matrix_scale, np.float64)
  return expand(scales, q)


# One compilation for each format and shape, not one for each operation.
quantize = jax.jit(
  quantization.quantize, static_argnames=("fmt", "matrix_axes")
)
dequantize = jax.jit(lambda q: q.dequantize())


def sample(shape, seed=0, scale=1.0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (rng.standard_normal(shape) * scale).astype(np.float32)


def key_of(seed):
  return None if seed is None else jax.random.key(seed)


def assert_same_bits(tree, other):
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(
      np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
    )


class GridTest(parameterized.TestCase):
  @parameterized.parameters(*FORMATS)
  def test_codes_are_nearest_given_the_scale(self, name):
    x = sample((2, 77, 9), scale=0.3)
    q = quantize(x, name)
    self.assertEqual(q.codes.shape, x.shape)
    scales = scales_of(q)
    got = np.asarray(dequantize(q), np.float64)
    # float64 holds the quotient closely enough to break each tie truly:
    # a product of a grid midpoint and a scale has at most 24 bits.
    want = nearest(x.astype(np.float64) / scales, grid_of(name)) * scales
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(*FORMATS)
  def test_ties_and_every_grid_value(self, name):
    # One power-of-two scale: grid values and midpoints are exact inputs.
    grid = grid_of(name)
    grid = grid[grid >= 0]
    if grid[-1] > 2.0**120 or grid[1] < 2.0**-120:
      self.skipTest("midpoints leave float32")
    middle = (grid[1:] + grid[:-1]) / 2
    block = quantization.Format.parse(name).block
    size = block or len(grid) + len(middle)
    points = np.concatenate([grid, middle])
    points = np.resize(points, (-(-len(points) // (size - 1)), size - 1))
    points = np.concatenate([points, np.full((len(points), 1), grid[-1])], 1)
    x = points.reshape(-1, 1) if block else points.reshape(-1, 1)
    x = (x * np.resize([1, -1], x.shape[0])[:, None]).astype(np.float32)
    q = quantize(x, name)
    if name != "nvfp4":  # Its matrix scale is 1/448: block scales 448.
      np.testing.assert_array_equal(scales_of(q), 1.0)
    want = nearest(x.astype(np.float64) / scales_of(q), grid_of(name))
    got = np.asarray(dequantize(q), np.float64) / scales_of(q)
    np.testing.assert_array_equal(got, want)

  @parameterized.product(name=FORMATS, seed=ROUNDINGS)
  @pytest.mark.slow
  def test_error_bound(self, name, seed):
    x = sample((64, 33), seed=1).astype(np.float64)
    q = quantize(x.astype(np.float32), name, key=key_of(seed))
    x, scales, grid = x.astype(np.float32), scales_of(q), grid_of(name)
    if seed is not None and name.startswith("mx"):
      # Drawn under this scale, of which half may be stored.
      peak = np.abs(x).reshape(2, 32, 33).max(axis=1).astype(np.float64)
      scales = expand(2.0 ** np.ceil(np.log2(peak / grid[-1])), q)
    got = np.asarray(dequantize(q), np.float64)
    ratio = np.clip(np.abs(x / scales), 0, grid[-1])
    hi = np.searchsorted(grid, ratio).clip(1, len(grid) - 1)
    step = (grid[hi] - grid[hi - 1]) * scales
    # Beyond the largest value: what the scale's truncation, at most 2^-15 of
    # the magnitude, clips (nvfp4: half a unit of a 4-bit significand; mx to
    # nearest: half a step, where the largest magnitude rounds to half of what
    # it would take for the scale to stay).
    over = np.maximum(np.abs(x / scales) - grid[-1], 0) * scales
    limit = {"nvfp4": 1 / 16, "mxfp4": 1 / 7, "mxfp8": 16 / 464}
    limit = limit.get(name, 2.0**-15)
    np.testing.assert_array_less(over, np.abs(x) * limit + 1e-30)
    slack = over + (step if seed is not None else step / 2)
    peak = np.abs(ratio - grid[-1]) < grid[-1] / 16
    slack = np.where(peak & (name == "nvfp4"), over + step, slack)
    np.testing.assert_array_less(np.abs(got - x), slack * (1 + 1e-6) + 1e-30)

  @parameterized.parameters("int8", "int4:32", "float8_e4m3fn:16", "e3m2:32")
  def test_largest_magnitude_takes_the_largest_code(self, name):
    x = sample((64, 7))
    for seed in ROUNDINGS:
      q = quantize(x, name, key=key_of(seed))
      ratio = np.asarray(dequantize(q), np.float64) / scales_of(q)
      groups = ratio.reshape(64 // (q.format.block or 64), -1, 7)
      np.testing.assert_array_equal(
        np.abs(groups).max(axis=1), grid_of(name)[-1]
      )

  def test_bits_of_patterns(self):
    x = np.array([0.0, 0.0625, -0.0625, 0.25, 28, -28], np.float32)
    q = quantize(x, "e3m2")
    self.assertEqual(q.codes.dtype, jnp.uint8)
    np.testing.assert_array_equal(
      q.codes, [0, 0b000001, 0b100001, 0b000100, 0b011111, 0b111111]
    )


class ScaleTest(parameterized.TestCase):
  def test_mx_scales_are_the_least_power_of_two_that_does_not_clip(self):
    x = sample((96, 5), scale=100.0)
    for name, top in (("mxfp8", 448.0), ("mxfp4", 6.0)):
      q = quantize(x, name)
      self.assertEqual(q.scales.dtype, jnp.float8_e8m0fnu)
      peak = np.abs(x).reshape(3, 32, 5).max(axis=1).astype(np.float64)
      want = 2.0 ** np.ceil(np.log2(peak / top))
      kept = np.abs(np.asarray(dequantize(q))).reshape(3, 32, 5).max(axis=1)
      want = np.where(kept <= want * top / 2, want / 2, want)
      np.testing.assert_array_equal(np.asarray(q.scales, np.float64), want)

  def test_nvfp4_scales(self):
    x = sample((2, 64, 5))
    q = quantize(x, "nvfp4")
    self.assertEqual(q.scales.dtype, jnp.float8_e4m3fn)
    self.assertEqual(q.matrix_scale.shape, (2, 1, 1))
    peak = np.abs(x).reshape(2, 4, 16, 5).max(axis=2)
    matrix = np.asarray(q.matrix_scale)
    np.testing.assert_allclose(
      matrix[:, 0, 0], np.abs(x).max(axis=(1, 2)) / (6 * 448), rtol=2**-15
    )
    want = (peak / (6 * matrix)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(q.scales), want)


class ExtremesTest(parameterized.TestCase):
  @parameterized.product(name=FORMATS, seed=ROUNDINGS)
  def test_finite_stays_finite_and_requantizes_to_itself(self, name, seed):
    rng = np.random.default_rng(0)
    magnitudes = 10.0 ** rng.uniform(-44, 38, (96, 6))
    columns = [
      magnitudes * rng.choice([-1, 1], magnitudes.shape),
      np.zeros((96, 1)),
      np.full((96, 1), 3.4e38),
      np.full((96, 1), -1e-38),
      np.full((96, 1), 1.17549435e-38),
      np.eye(96, 1) * 1e-45,
    ]
    x = np.concatenate(columns, axis=1).astype(np.float32)
    q = quantize(x, name, key=key_of(seed))
    values = np.asarray(dequantize(q))
    self.assertTrue(np.isfinite(values).all())
    self.assertTrue((np.abs(values) <= np.float32(3.4e38)).all())
    self.assertFalse((np.signbit(values) & (values == 0)).any())
    np.testing.assert_array_equal(values[:, 6], 0)
    assert_same_bits(quantize(values, name, key=key_of(seed)), q)

  @parameterized.parameters(*FORMATS)
  def test_a_value_that_is_not_finite_shows(self, name):
    for bad in (np.nan, np.inf, -np.inf):
      # Large enough for XLA's vectorised reductions.
      x = sample((4096, 3))
      x[1234, 1] = bad
      values = np.asarray(dequantize(quantize(x, name)))
      self.assertFalse(np.isfinite(values[1234, 1]))
      if name != "nvfp4":
        self.assertTrue(np.isfinite(values[:, [0, 2]]).all())


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(*FORMATS)
  @pytest.mark.slow
  def test_shapes_and_bytes(self, name):
    fmt = quantization.Format.parse(name)
    for shape in ((50,), (50, 3), (2, 50, 3), (2, 2, 50, 3), (1, 1)):
      q = quantize(sample(shape), name)
      length = shape[-2] if len(shape) > 1 else shape[0]
      groups = -(-length // fmt.block) if fmt.block else 1
      want = shape[:-2] + (groups,) + shape[-1:] * (len(shape) > 1)
      self.assertEqual(q.shape, shape)
      self.assertEqual(q.scales.shape, want)
      self.assertEqual(q.dequantize(jnp.bfloat16).shape, shape)
      self.assertEqual(q.dequantize(jnp.bfloat16).dtype, jnp.bfloat16)

  @parameterized.parameters("int4", "e3m2", "float8_e5m2")
  def test_a_block_longer_than_the_axis_holds_it_once(self, name):
    # Padded to the block, 16 numbers would take gigabytes.
    for shape in ((16,), (16, 3), (2, 16, 3), (1, 1), (0, 3)):
      x = sample(shape)
      whole = quantize(x, f"{name}:16")
      for block in ("17", "999999999"):
        q = quantize(x, f"{name}:{block}")
        assert_same_bits(q.codes, whole.codes)
        assert_same_bits(q.scales, whole.scales)
        assert_same_bits(q.dequantize(), whole.dequantize())
        self.assertEqual(q.nbytes_packed, whole.nbytes_packed)

  def test_nbytes_packed(self):
    def nbytes(name):
      return quantize(np.ones((2, 64, 8)), name).nbytes_packed

    n = 2 * 64 * 8
    self.assertEqual(nbytes("int8"), n + 2 * 8 * 4)
    self.assertEqual(nbytes("int4:32"), n // 2 + n // 32 * 4)
    self.assertEqual(nbytes("int2:16"), n // 4 + n // 16 * 4)
    self.assertEqual(nbytes("mxfp8"), n + n // 32)
    self.assertEqual(nbytes("mxfp4"), n // 2 + n // 32)
    self.assertEqual(nbytes("nvfp4"), n // 2 + n // 16 + 2 * 4)
    self.assertEqual(nbytes("e3m2:32"), n * 6 // 8 + n // 32 * 4)

  @parameterized.parameters("int4:32", "mxfp4", "mxfp8", "nvfp4", "e3m2:16")
  @pytest.mark.slow
  def test_transformations(self, name):
    x = jnp.asarray(sample((3, 50, 4)))
    q = quantization.quantize(x, name)
    abstract = jax.eval_shape(lambda x: quantize(x, name), x)
    self.assertEqual(abstract.shape, q.shape)
    self.assertEqual(abstract.nbytes_packed, q.nbytes_packed)
    assert_same_bits(jax.jit(lambda x: quantize(x, name))(x), q)
    assert_same_bits(jax.vmap(lambda x: quantize(x, name))(x), q)
    one = quantize(x[1], name)
    assert_same_bits(jax.tree.map(lambda a: a[1], q), one)
    _, stacked = jax.lax.scan(lambda c, layer: (c, layer.dequantize()), None, q)
    np.testing.assert_array_equal(stacked, dequantize(q))

  def test_trees(self):
    params = {
      "embedding": jnp.ones((8, 4)),
      "layers": {"kernel": jnp.asarray(sample((2, 8, 8)))},
      "blocks": jnp.asarray(sample((2, 8, 8))),
      "norm": jnp.ones((4,)),
    }
    tree = quantization.quantize_tree(params, "int4:4", key=jax.random.key(0))
    self.assertTrue(quantization.is_qtensor(tree["layers"]["kernel"]))
    self.assertIs(tree["embedding"], params["embedding"])
    self.assertIs(tree["norm"], params["norm"])
    same = quantization.quantize_tree(
      {**params, "blocks": params["layers"]["kernel"]},
      "int4:4",
      key=jax.random.key(0),
    )
    self.assertTrue(
      (same["blocks"].codes != same["layers"]["kernel"].codes).any()
    )
    back = quantization.dequantize_tree(tree, jnp.bfloat16)
    self.assertEqual(back["blocks"].dtype, jnp.bfloat16)
    self.assertEqual(back["norm"].dtype, jnp.float32)
    again = quantization.quantize_tree(tree, "int4:4")
    assert_same_bits(again, tree)


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(*FORMATS)
  def test_names(self, name):
    fmt = quantization.Format.parse(name)
    self.assertEqual(str(fmt), name)
    self.assertEqual(quantization.Format.parse(str(fmt)), fmt)
    self.assertEqual(hash(quantization.Format.parse(name)), hash(fmt))
    grid = grid_of(name)
    self.assertEqual(fmt.max, grid[-1])
    self.assertEqual(2.0**fmt.min_step_exponent, grid[grid > 0][0])

  @parameterized.parameters(
    ("int5", "int"), ("int4:", "block"), ("int4:0", "block"),
    ("int4:-3", "block"), ("int4:3.5", "block"), ("e5m3", "at most 8 bits"),
    ("e0m3", "eXmY"), ("mxfp4:16", "fixed block"), ("", "allowed"),
    ("float8_e4m3", "'float8_e4m3fn'"), ("Int4:32", "'int4'"),
    (None, "allowed"), (4, "allowed"),
  )  # fmt: skip
  def test_errors(self, name, said):
    with self.assertRaisesRegex(ValueError, said):
      quantization.Format.parse(name)

  def test_bad_arrays(self):
    for x in (jnp.ones(()), jnp.ones((3, 3), jnp.int32)):
      with self.assertRaisesRegex(ValueError, "floating array"):
        quantize(x, "int8")


if __name__ == "__main__":
  absltest.main()
