"""SWAN against float64 singular value decompositions of torch weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def swan_of_torch_weight(g, *, center=False):
  """One direction for a torch weight (out, in), whose rows are outputs."""
  if center:
    g = g - np.mean(g, axis=1, keepdims=True)
  h = np.zeros_like(g)
  for i, row in enumerate(g):
    deviation = np.sqrt(np.mean(row**2))
    if deviation > 1e-12:
      h[i] = row / deviation
  u, s, vt = np.linalg.svd(h, full_matrices=False)
  # The inverse root of H Hᵀ where it has one.
  whitened = (u * (s > 1e-9 * s[0])) @ vt
  return whitened * np.linalg.norm(h) / np.linalg.norm(whitened)


def direction(g, **kwargs):
  tx = optim.scale_by_swan(**kwargs)
  tree = {"w": jnp.asarray(g, jnp.float32)}
  out, state = jax.jit(tx.update)(tree, tx.init(tree))
  assert not jax.tree.leaves(state)
  return np.asarray(out["w"], np.float64)


class SwanTest(parameterized.TestCase):
  # Entries of up to 4 after a dozen float32 products of sums of up to 256
  # terms; what rounding adds to a Gaussian's singular values, 1/6 of the
  # largest at least here, is hardly amplified.
  atol = 2e-5

  @parameterized.product(
    shape=[(64, 256), (256, 64), (3, 12, 20)], center=[False, True]
  )
  def test_is_the_formula(self, shape, center):
    g = normal(0, *shape)
    got = direction(g, center=center).reshape(-1, *shape[-2:])
    for x, y in zip(g.reshape(got.shape), got, strict=True):
      want = swan_of_torch_weight(x.T, center=center).T
      np.testing.assert_allclose(y, want, rtol=2e-5, atol=self.atol)
      self.assertAlmostEqual(np.sqrt(np.mean(y**2)), 1, places=5)

  def test_rows_may_be_inputs(self):
    g = normal(0, 12, 20)
    got = direction(g, rows="inputs")
    np.testing.assert_allclose(got, swan_of_torch_weight(g), atol=self.atol)
    self.assertGreater(np.abs(got - direction(g)).max(), 0.05)

  @parameterized.parameters((12, 12), (6, 12))
  def test_centred_rows_of_full_rank_no_more(self, *shape):
    """The mean of each output's entries is 0: a rank less, and no noise."""
    g = normal(1, *shape)
    got = direction(g, center=True)
    want = swan_of_torch_weight(g.T, center=True).T
    # Singular values of a square Gaussian are down to 1/50 of the largest.
    np.testing.assert_allclose(got, want, atol=10 * self.atol)
    np.testing.assert_allclose(np.sum(got, axis=0), 0, atol=self.atol)

  @parameterized.parameters(False, True)
  def test_units_without_a_gradient_stay_still(self, center):
    g = normal(0, 12, 20)
    g[:, 3] = 0
    g[:, 5] = 0.7 if center else 0
    got = direction(g, center=center)
    want = swan_of_torch_weight(np.float64(np.float32(g)).T, center=center).T
    np.testing.assert_array_equal(got[:, [3, 5]], 0)
    np.testing.assert_allclose(got, want, atol=2 * self.atol)

  @parameterized.parameters(1e-30, 1e-12, 1e30)
  def test_the_scale_does_not_matter(self, size):
    g = normal(0, 12, 20)
    got = direction(-size * g)
    np.testing.assert_allclose(got, -direction(g), atol=self.atol)

  def test_at_the_cost_of_muon(self):
    g = normal(0, 12, 20)
    got = direction(g, coefficients="polar_express", ns_dtype="bfloat16")
    want = swan_of_torch_weight(g.T).T
    # Singular values in [0.86, 1.14] before their norm is restored.
    self.assertGreater(np.vdot(got, want) / got.size, 0.98)
    self.assertAlmostEqual(np.sqrt(np.mean(got**2)), 1, places=5)

  def test_steps(self):
    params = {"w": normal(0, 12, 20), "norm": normal(1, 20)}
    grads = [{"w": normal(i, 12, 20), "norm": normal(i, 20)} for i in (2, 3, 4)]
    tx = optim.swan(0.1, weight_decay=0.3, alpha=0.5, fallback=optax.sgd(1.0))
    got = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = tx.init(got)
    update = jax.jit(tx.update)
    w = params["w"]
    for g in grads:
      updates, state = update(g, state, got)
      got = optax.apply_updates(got, updates)
      w = w - 0.1 * (0.5 * swan_of_torch_weight(g["w"].T).T + 0.3 * w)
    np.testing.assert_allclose(got["w"], w, atol=self.atol)
    norm = params["norm"] - sum(g["norm"] for g in grads)
    np.testing.assert_allclose(got["norm"], norm, atol=1e-6)
    self.assertEmpty(jax.tree.leaves(state))

  def test_heads_by_matrix_axes(self):
    g = normal(0, 12, 2, 5)
    got = direction(g, matrix_axes={"w": (0, (1, 2))})
    flat = swan_of_torch_weight(g.reshape(12, 10).T).T
    np.testing.assert_allclose(got, flat.reshape(g.shape), atol=self.atol)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "rows must be.*'out'"):
      optim.swan(0.1, rows="out")
    with self.assertRaisesRegex(ValueError, "SWAN needs matrices.*'b'"):
      optim.swan(0.1, labels={"b": "matrix"}).init({"b": jnp.ones(3)})
    with self.assertRaisesRegex(ValueError, "alpha must be at least 0"):
      optim.swan(0.1, alpha=-1.0)
    with self.assertRaisesRegex(ValueError, "'w' is of the dtype int32"):
      optim.swan(0.1).init({"w": jnp.ones((2, 2), jnp.int32)})


if __name__ == "__main__":
  absltest.main()
