"""Against singular value decompositions in numpy float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import optim
from optim.orthogonal import polar, schedules

# The schedules as published, five steps each.
KELLER = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
  (8.156554524902461, -22.48329292557795, 15.878769915207462),
  (4.042929935166739, -2.808917465908714, 0.5000178451051316),
  (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
  (3.285753657755655, -2.3681294933425376, 0.46449024233002655),
  (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
DION = [
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
]
TABLES = {
  "keller": (KELLER, 1.0),
  "polar_express": (POLAR_EXPRESS, 1.02),
  "dion": (DION, 1.0),
}
SHAPES = [(8, 8), (5, 17), (17, 5), (1, 6), (6, 1), (3, 7, 12), (2, 3, 9, 4)]


def matrix(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def spread_matrix(m, n, values, seed=0):
  """A matrix with the given singular values."""
  u = np.linalg.qr(matrix((m, m), seed))[0]
  v = np.linalg.qr(matrix((n, n), seed + 1))[0]
  return (u[:, : len(values)] * values) @ v[: len(values)]


def reference(x, table, divisor):
  """Composes the scalar polynomials on the singular values."""
  x = np.asarray(x, np.float64)
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  s = s / (divisor * np.linalg.norm(x, axis=(-2, -1))[..., None])
  for a, b, c in table:
    s = a * s + b * s**3 + c * s**5
  return (u * s[..., None, :]) @ vt


def polar_factor(x):
  u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  return u @ vt


class NewtonSchulzTest(parameterized.TestCase):
  @parameterized.product(name=list(TABLES), shape=SHAPES)
  def test_float32_is_the_composed_polynomial(self, name, shape):
    x = jnp.asarray(matrix(shape), jnp.float32)
    y = optim.newton_schulz(
      x, coefficients=name, dtype=jnp.float32, precision="highest"
    )
    self.assertEqual((y.shape, y.dtype), (x.shape, x.dtype))
    # Slopes of up to 1000 amplify float32's 6e-8 of the input.
    np.testing.assert_allclose(y, reference(x, *TABLES[name]), atol=1e-4)

  @parameterized.product(name=list(TABLES), shape=[(16, 16), (24, 64)])
  def test_float64_is_the_composed_polynomial(self, name, shape):
    with jax.enable_x64(True):
      x = jnp.asarray(matrix(shape))
      y = optim.newton_schulz(x, coefficients=name, dtype=jnp.float64)
      self.assertEqual(y.dtype, jnp.float64)
      np.testing.assert_allclose(y, reference(x, *TABLES[name]), atol=1e-12)

  @parameterized.parameters(*TABLES)
  def test_bfloat16_keeps_the_range(self, name):
    values = np.geomspace(1, 0.1, 32)
    x = jnp.asarray(spread_matrix(32, 96, values), jnp.float32)
    y = np.asarray(optim.newton_schulz(x, coefficients=name))
    got = np.linalg.svd(y.astype(np.float64), compute_uv=False)
    want = np.linalg.svd(reference(x, *TABLES[name]), compute_uv=False)
    # Each step rounds entries by 2^-8 relative, and the steps' slopes at
    # values near 1 are below 1: a few roundings of a spectral norm near 1.
    self.assertLess(abs(got.max() - want.max()), 0.02)
    self.assertLess(abs(got.min() - want.min()), 0.02)

  def test_polar_express_bfloat16_range_at_model_size(self):
    x = jnp.asarray(matrix((256, 688)), jnp.float32)
    y = np.asarray(optim.newton_schulz(x), np.float64)
    got = np.linalg.svd(y, compute_uv=False)
    # 0.859 and 1.141 are the schedule's own; bfloat16 blurs the edges.
    self.assertGreater(got.min(), 0.85)
    self.assertLess(got.max(), 1.15)

  @parameterized.parameters(*SHAPES)
  def test_exact_is_the_polar_factor(self, *shape):
    x = jnp.asarray(matrix(shape), jnp.float32)
    y = optim.newton_schulz(x, coefficients="exact")
    # Perturbing x by 6e-8 moves its factor by that over the least singular
    # value (here above 0.05), and the steps round a dozen times.
    np.testing.assert_allclose(y, polar_factor(x), atol=1e-5)
    with jax.enable_x64(True):
      x = jnp.asarray(matrix(shape))
      y = optim.newton_schulz(x, coefficients="exact")
      np.testing.assert_allclose(y, polar_factor(x), atol=1e-12)

  def test_exact_reaches_small_singular_values(self):
    x = jnp.asarray(
      spread_matrix(12, 20, np.geomspace(1, 1e-5, 12)), jnp.float32
    )
    y = optim.newton_schulz(x, coefficients="exact")
    got = np.linalg.svd(np.asarray(y, np.float64), compute_uv=False)
    np.testing.assert_allclose(got, 1, atol=2e-6)

  @parameterized.parameters(1e-30, 1e-34, 1e-9, 1e9, 1e30, 8e37)
  def test_scale_does_not_matter(self, scale):
    x = matrix((6, 9)).astype(np.float32)
    want = optim.newton_schulz(x, dtype=jnp.float32)
    got = optim.newton_schulz(np.float32(scale) * x, dtype=jnp.float32)
    np.testing.assert_allclose(got, want, atol=1e-4)

  @parameterized.parameters(*schedules.NAMES)
  def test_zero_matrices_give_zero_beside_others(self, name):
    x = jnp.asarray(matrix((3, 4, 6)), jnp.float32).at[1].set(0)
    y = optim.newton_schulz(x, coefficients=name)
    np.testing.assert_array_equal(y[1], 0)
    self.assertGreater(np.abs(y[0]).max(), 0.1)
    self.assertGreater(np.abs(y[2]).max(), 0.1)

  @parameterized.parameters(jnp.bfloat16, jnp.float16, jnp.float32)
  def test_dtype_is_the_inputs(self, dtype):
    y = optim.newton_schulz(jnp.asarray(matrix((4, 6)), dtype))
    self.assertEqual(y.dtype, dtype)
    self.assertFalse(y.weak_type)

  def test_own_coefficients(self):
    x = jnp.asarray(matrix((4, 6)), jnp.float32)
    table = [(2, -1.5, 0.5)] * 12
    run = functools.partial(optim.newton_schulz, dtype=jnp.float32)
    y = run(x, coefficients=table)
    np.testing.assert_allclose(y, reference(x, table, 1.0), atol=1e-5)
    traced = jax.jit(lambda t: run(x, coefficients=t))(
      jnp.asarray(table, jnp.float32)
    )
    np.testing.assert_allclose(traced, y, atol=1e-6)

  @pytest.mark.slow
  def test_a_list_of_leaves_is_each_leaf_alone(self):
    shapes = [(4, 6), (3, 6, 4), (2, 2, 4, 6), (5, 5), (6, 5)]
    xs = [jnp.asarray(matrix(s, i), jnp.float32) for i, s in enumerate(shapes)]
    xs[2] = xs[2].astype(jnp.bfloat16)
    got = polar.newton_schulz_list(xs, dtype=jnp.float32)
    for x, y in zip(xs, got, strict=True):
      alone = optim.newton_schulz(x.astype(jnp.float32), dtype=jnp.float32)
      np.testing.assert_allclose(y, alone, atol=1e-5)

  def test_chunks_do_not_change_values(self):
    x = jnp.asarray(matrix((7, 4, 6)), jnp.float32)
    whole = optim.newton_schulz(x, dtype=jnp.float32)
    for elements in (1, 2 * 24, 4 * 24):
      with absltest.mock.patch.object(polar, "_CHUNK_ELEMENTS", elements):
        split = optim.newton_schulz(x, dtype=jnp.float32)
      np.testing.assert_allclose(split, whole, atol=1e-5)

  def test_gradient_is_that_of_the_composed_polynomial(self):
    weights = np.arange(15.0).reshape(3, 5)
    x, direction = matrix((3, 5)), matrix((3, 5), 3)
    with jax.enable_x64(True):
      f = lambda x: jnp.sum(weights * optim.newton_schulz(x, dtype="float64"))
      g = np.asarray(jax.grad(f)(jnp.asarray(x)))
    h = 1e-6
    ahead, behind = (
      reference(x + s * direction, POLAR_EXPRESS, 1.02) for s in (h, -h)
    )
    want = np.sum((ahead - behind) / (2 * h) * weights)
    # Central differences err by h² times a third derivative, about 1e6.
    np.testing.assert_allclose(np.sum(g * direction), want, rtol=1e-7)

  @pytest.mark.usefixtures("full_optimization")
  def test_exact_survives_a_norm_that_rounds_up(self):
    for seed in range(50):
      x = jnp.asarray(matrix((1, 7), seed), jnp.float32)
      y = optim.newton_schulz(x, coefficients="exact")
      np.testing.assert_allclose(y, polar_factor(x), atol=1e-6)


class ScheduleTest(parameterized.TestCase):
  def test_polar_express_is_the_published_table(self):
    np.testing.assert_allclose(
      schedules.polar_express_coefficients(5), POLAR_EXPRESS, rtol=1e-12
    )

  def test_raw_polar_express_is_the_published_table(self):
    got = schedules.polar_express_coefficients(
      5, cushion=0.02407327424182761, safety=1.0
    )
    want = [
      (8.28721201814563, -23.595886519098837, 17.300387312530933),
      (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
      (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
      (3.3184196573706015, -2.488488024314874, 0.51004894012372),
      (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
    np.testing.assert_allclose(got, want, rtol=1e-7)

  def test_each_quintic_is_minimax(self):
    """A dense grid finds four alternating extremes of one size."""
    for lower, upper in [(0.02, 1.0), (0.3, 1.5), (0.9, 1.1)]:
      a, b, c = schedules._minimax_quintic(lower, upper)
      x = np.linspace(lower, upper, 200_001)
      error = a * x + b * x**3 + c * x**5 - 1
      peaks = [error[0], error[-1]]
      inner = (np.diff(np.sign(np.diff(error))) != 0).nonzero()[0] + 1
      peaks[1:1] = list(error[inner])
      self.assertLen(peaks, 4)
      # 1e-9: the peaks sit between grid points of spacing 1e-5.
      np.testing.assert_allclose(
        np.abs(peaks), np.abs(error).max(), rtol=1e-5, atol=1e-12
      )
      self.assertTrue(np.all(np.diff(np.sign(peaks)) != 0))

  @parameterized.parameters(1, 2, 3, 4, 6, 7, 8, 10)
  def test_any_number_of_steps_brings_values_to_one(self, steps):
    table = schedules.polar_express_coefficients(steps)
    self.assertEqual(table.shape, (steps, 3))
    s = np.geomspace(1e-3, 1, 1000) / 1.02
    for a, b, c in table:
      s = a * s + b * s**3 + c * s**5
    if steps > 1:
      # One more step never widens the range that one fewer reaches.
      fewer = np.geomspace(1e-3, 1, 1000) / 1.02
      for a, b, c in schedules.polar_express_coefficients(steps - 1):
        fewer = a * fewer + b * fewer**3 + c * fewer**5
      self.assertLess(np.abs(s - 1).max(), np.abs(fewer - 1).max() + 1e-9)
    if steps >= 8:
      self.assertLess(np.abs(s - 1).max(), 1e-2)

  def test_dion_repeats_its_last_triplet(self):
    x = jnp.asarray(matrix((4, 9)), jnp.float32)
    y = optim.newton_schulz(x, coefficients="dion", steps=8, dtype="float32")
    want = reference(x, DION + DION[-1:] * 3, 1.0)
    np.testing.assert_allclose(y, want, atol=1e-4)

  @parameterized.named_parameters(
    ("vector", dict(x=jnp.ones(3)), "two or more dimensions"),
    ("integers", dict(x=jnp.ones((3, 3), int)), "floating"),
    ("unknown", dict(coefficients="polar_expres"), "polar_express"),
    ("shape", dict(coefficients=np.ones((5, 2))), r"\[5, 2\]"),
    ("flat", dict(coefficients=(1.0, 2.0, 3.0)), r"\[3\]"),
    ("empty", dict(coefficients=np.ones((0, 3))), "steps >= 1"),
    ("no_steps", dict(steps=0), "at least 1, got 0"),
    ("negative", dict(steps=-2, coefficients="keller"), "got -2"),
    ("mismatch", dict(steps=2, coefficients=np.ones((3, 3))), "3 rows"),
    ("truncated", dict(steps=3, coefficients="dion"), "at least 5"),
    ("exact_steps", dict(steps=3, coefficients="exact"), "own number"),
    ("dtype", dict(dtype=jnp.int32), "floating"),
  )
  def test_refuses(self, arguments, message):
    x = arguments.pop("x", jnp.ones((3, 4)))
    with self.assertRaisesRegex(ValueError, message):
      optim.newton_schulz(x, **arguments)


if __name__ == "__main__":
  absltest.main()
