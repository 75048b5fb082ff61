"""Idempotence of quantization and the statistics of stochastic rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxlib_ext import quantization
from jaxlib_ext.quantization import rounding

FORMATS = (
  "int8",
  "int4:32",
  "int2:16",
  "float8_e4m3fn",
  "float8_e5m2:32",
  "mxfp8",
  "mxfp4",
  "nvfp4",
  "e3m2:32",
  "e2m3",
  "e3m0:16",
  "e7m0",
)


class IdempotenceTest(parameterized.TestCase):
  @parameterized.product(name=FORMATS, stochastic=(False, True))
  @pytest.mark.slow
  def test_a_thousand_times(self, name, stochastic):
    rng = np.random.default_rng(0)
    # Columns of very different sizes, and groups within one too.
    x = rng.standard_normal((70, 48)) * 10.0 ** rng.uniform(-9, 9, (1, 48))
    x[:32] *= 10.0 ** rng.uniform(-6, 2, (1, 48))

    def again(carry, key):
      q, same = carry
      new = quantization.quantize(
        q.dequantize(), name, key=key if stochastic else None
      )
      equal = [
        jnp.all(a == b)
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(new), strict=True)
      ]
      return (new, same & jnp.all(jnp.stack(equal))), None

    @jax.jit
    def run(x, keys):
      key = keys[0] if stochastic else None
      first = quantization.quantize(x, name, key=key)
      carry = (first, jnp.array(True))
      (last, same), _ = jax.lax.scan(again, carry, keys)
      return first, last, same

    first, last, same = run(
      x.astype(np.float32), jax.random.split(jax.random.key(1), 1000)
    )
    self.assertTrue(bool(same))
    np.testing.assert_array_equal(first.dequantize(), last.dequantize())


class StochasticTest(parameterized.TestCase):
  @parameterized.parameters(
    "int8", "int4:32", "float8_e4m3fn", "float8_e5m2:32", "mxfp8", "mxfp4",
    "nvfp4", "e3m2:32",
  )  # fmt: skip
  def test_unbiased(self, name):
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    # Subnormals of the small floats, and the values just above them.
    x[:16] *= 2e-3
    n = 4000
    draws = jax.jit(
      jax.vmap(lambda k: quantization.quantize(x, name, key=k).dequantize())
    )(jax.random.split(jax.random.key(2), n))
    draws = np.asarray(draws, np.float64)
    fmt = quantization.Format.parse(name)
    block = fmt.block or 64
    # The largest of a group is not rounded at random: it fixes the scale. In
    # nvfp4 nothing near it is either, where the scale was rounded down.
    peak = np.abs(x).reshape(-1, block, 8).max(axis=1).repeat(block, axis=0)
    free = np.abs(x) < peak * (0.93 if name == "nvfp4" else 1)
    error = (draws.mean(axis=0) - x)[free]
    # The step between the neighbours of each element, from one draw's scale.
    q = quantization.quantize(x, name)
    scale = np.asarray(q.scales, np.float64).repeat(block, axis=0)
    if q.matrix_scale is not None:
      scale = scale * np.asarray(q.matrix_scale)
    if name.startswith("mx"):  # The stored scale may be half of this.
      scale = 2.0 ** np.ceil(np.log2(peak.astype(np.float64) / fmt.max))
    step = scale
    if not fmt.is_integer:
      exponent = np.floor(np.log2(np.abs(x / scale)))
      exponent = np.maximum(exponent, fmt.min_exponent) - fmt.mantissa_bits
      step = scale * 2.0**exponent
    step, part = step[free], (np.abs(x) / step % 1)[free]
    # Five and a half deviations of the mean, the random numbers' resolution,
    # and a few draws for elements so close to the grid that few draws move.
    allowed = 5.5 * np.sqrt(part * (1 - part) / n) + 2.0**-15 + 5 / n
    np.testing.assert_array_less(np.abs(error), allowed * step)
    # And there is something to be unbiased about.
    self.assertGreater(np.mean((draws != draws[0]).any(axis=0)[free]), 0.9)

  def test_elements_are_independent(self):
    keys = jax.random.split(jax.random.key(3), 400)
    u = np.asarray(jax.vmap(lambda k: rounding.uniform(k, (16, 24)))(keys))
    u = u.reshape(400, -1) - 0.5
    # Correlations of 400 draws have a deviation of 1/20; of 73536 pairs none
    # should pass 5.5 of them, and their mean square should be 1/400.
    c = np.corrcoef(u.T)
    off = c[np.triu_indices_from(c, 1)]
    self.assertLess(np.abs(off).max(), 5.5 / 20)
    np.testing.assert_allclose(np.mean(off**2), 1 / 400, rtol=0.05)

  def test_uniform(self):
    n = 2**20
    u = np.asarray(rounding.uniform(jax.random.key(4), (n // 64, 64)))
    self.assertGreater(u.min(), 0)
    self.assertLess(u.max(), 1)
    counts = np.histogram(u, bins=256, range=(0, 1))[0]
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    # Of 255 degrees of freedom: mean 255, deviation 22.6.
    self.assertLess(abs(chi2 - 255), 5 * 22.6)
    v = np.asarray(rounding.uniform(jax.random.key(5), (n // 64, 64)))
    for lag in (0, 1, 2, 63, 64, 65, 4096):
      pair = np.mean((u.ravel()[: n - lag] - 0.5) * (v.ravel()[lag:] - 0.5))
      self.assertLess(abs(pair), 5 / 12 / np.sqrt(n - lag))
      if lag:
        pair = np.mean((u.ravel()[: n - lag] - 0.5) * (u.ravel()[lag:] - 0.5))
        self.assertLess(abs(pair), 5 / 12 / np.sqrt(n - lag))

  def test_keys(self):
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)

    def codes(key):
      return np.asarray(quantization.quantize(x, "int4:32", key=key).codes)

    one = codes(jax.random.key(0))
    np.testing.assert_array_equal(one, codes(jax.random.key(0)))
    np.testing.assert_array_equal(one, codes(jax.random.PRNGKey(0)))
    self.assertGreater(np.mean(one != codes(jax.random.key(1))), 0.1)

  def test_sharding_changes_nothing(self):
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    mesh = jax.make_mesh(
      (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec("a", "b")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    f = jax.jit(
      lambda x: quantization.quantize(x, "nvfp4", key=jax.random.key(0))
    )
    for a, b in zip(
      jax.tree.leaves(f(x)), jax.tree.leaves(f(sharded)), strict=True
    ):
      np.testing.assert_array_equal(
        np.asarray(a, np.float32), np.asarray(b, np.float32)
      )


if __name__ == "__main__":
  absltest.main()
