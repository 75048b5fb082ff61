"""SinkGD against the loop of its paper on torch weights, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def sinkhorn(g, iterations=5):
  """SR-Sinkhorn of a torch weight (out, in): m rows, n columns."""
  m, n = g.shape
  x = g.copy()
  for _ in range(iterations):
    for i in range(m):
      x[i] *= np.sqrt(n) / (np.linalg.norm(x[i]) or 1)
    for j in range(n):
      x[:, j] *= np.sqrt(m) / (np.linalg.norm(x[:, j]) or 1)
  return x


def direction(g, **kwargs):
  tx = optim.scale_by_sinkgd(**kwargs)
  tree = {"w": jnp.asarray(g, jnp.float32)}
  out, state = jax.jit(tx.update)(tree, tx.init(tree))
  assert not jax.tree.leaves(state)
  return np.asarray(out["w"], np.float64)


class SinkgdTest(parameterized.TestCase):
  # Entries of up to 4 after ten divisions, each with a sum of squares.
  atol = 1e-5

  @parameterized.product(
    shape=[(64, 256), (256, 64), (3, 12, 20)], iterations=[1, 5]
  )
  def test_is_the_published_loop(self, shape, iterations):
    # Outputs and inputs of very different sizes.
    g = normal(0, *shape) * np.exp(normal(1, shape[-1]))
    g *= np.exp(normal(2, shape[-2]))[:, None]
    got = direction(g, iterations=iterations).reshape(-1, *shape[-2:])
    for x, y in zip(g.reshape(got.shape), got, strict=True):
      want = sinkhorn(x.T, iterations).T
      np.testing.assert_allclose(y, want, rtol=1e-5, atol=self.atol)

  def test_rows_may_be_inputs(self):
    g = normal(0, 12, 20)
    got = direction(g, rows="inputs", iterations=1)
    np.testing.assert_allclose(got, sinkhorn(g, 1), atol=self.atol)
    # The last division is over the outputs of each input.
    np.testing.assert_allclose(np.mean(got**2, axis=0), 1, atol=1e-5)
    got = direction(g, iterations=1)
    np.testing.assert_allclose(np.mean(got**2, axis=1), 1, atol=1e-5)

  def test_root_mean_squares_are_1(self):
    got = direction(normal(0, 12, 20), iterations=50)
    for axis in (None, 0, 1):
      np.testing.assert_allclose(np.mean(got**2, axis=axis), 1, atol=1e-4)

  def test_units_without_a_gradient_stay_still(self):
    g = normal(0, 12, 20)
    g[:, 3] = 0
    g[4] = 0
    got = direction(g)
    np.testing.assert_array_equal(got[:, 3], 0)
    np.testing.assert_array_equal(got[4], 0)
    np.testing.assert_allclose(got, sinkhorn(g.T).T, atol=self.atol)

  @parameterized.parameters(1e-30, 1e-12, 1e30)
  def test_the_scale_does_not_matter(self, size):
    g = normal(0, 12, 20)
    got = direction(-size * g)
    np.testing.assert_allclose(got, -direction(g), atol=self.atol)

  @parameterized.parameters({}, {"alpha": 0.5})
  def test_steps(self, **kwargs):
    params = {"w": normal(0, 12, 20), "norm": normal(1, 20)}
    grads = [{"w": normal(i, 12, 20), "norm": normal(i, 20)} for i in (2, 3, 4)]
    tx = optim.sinkgd(0.1, weight_decay=0.3, fallback=optax.sgd(1.0), **kwargs)
    got = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = tx.init(got)
    update = jax.jit(tx.update)
    w, alpha = params["w"], kwargs.get("alpha", 0.05)
    for g in grads:
      updates, state = update(g, state, got)
      got = optax.apply_updates(got, updates)
      w = w - 0.1 * (alpha * sinkhorn(g["w"].T).T + 0.3 * w)
    np.testing.assert_allclose(got["w"], w, atol=self.atol)
    norm = params["norm"] - sum(g["norm"] for g in grads)
    np.testing.assert_allclose(got["norm"], norm, atol=1e-6)
    self.assertEmpty(jax.tree.leaves(state))

  def test_refuses(self):
    for bad in (0, 2.5, True):
      with self.assertRaisesRegex(ValueError, "iterations must be a whole"):
        optim.sinkgd(0.1, iterations=bad)
    with self.assertRaisesRegex(ValueError, "rows must be.*'out'"):
      optim.sinkgd(0.1, rows="out")
    with self.assertRaisesRegex(ValueError, "SinkGD needs matrices.*'b'"):
      optim.sinkgd(0.1, labels={"b": "matrix"}).init({"b": jnp.ones(3)})
    with self.assertRaisesRegex(ValueError, "alpha must be at least 0"):
      optim.sinkgd(0.1, alpha=-1.0)


if __name__ == "__main__":
  absltest.main()
