"""Dion against a step-by-step numpy float64 version of its algorithm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim
from optim.orthogonal import dion


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def paper_step(m, q, g, mu):
  """Algorithm 1 for a torch weight (out, in): direction, momentum, basis."""
  b = m + g
  p = np.linalg.qr(b @ q)[0]
  r = b.T @ p
  m = b - (1 - mu) * p @ r.T
  q = r / np.linalg.norm(r, axis=0)
  return p @ q.T, m, q


class DionTest(parameterized.TestCase):
  @parameterized.parameters(
    ((64, 256), 0.25), ((256, 64), 0.25), ((2, 3, 24, 16), 5), ((16, 16), 1.0)
  )
  def test_is_the_published_loop(self, shape, rank):
    grads = [normal(i, *shape) for i in range(1, 5)]
    tx = optim.scale_by_dion(rank=rank, momentum=0.9, shape_scale="spectral")
    state = tx.init(float32({"w": grads[0]}))
    start = np.asarray(state.basis["w"], np.float64)
    want_rank = rank if isinstance(rank, int) else round(rank * min(shape[-2:]))
    self.assertEqual(start.shape, (*shape[:-1], want_rank))
    update = jax.jit(tx.update)
    got = []
    for g in grads:
      updates, state = update(float32({"w": g}), state)
      got.append(np.asarray(updates["w"]))
    scale = (shape[-1] / shape[-2]) ** 0.5
    for index in np.ndindex(shape[:-2]):
      m, q = np.zeros(shape[-2:]).T, start[index]
      for g, u in zip(grads, got, strict=True):
        # A JAX kernel (in, out) is the torch weight (out, in) transposed.
        want, m, q = paper_step(m, q, g[index].T, mu=0.9)
        # The condition number of B Q, about 1e2 here, times float32 rounding.
        np.testing.assert_allclose(u[index], scale * want.T, atol=3e-5 * scale)
      np.testing.assert_allclose(state.momentum["w"][index], m.T, atol=3e-4)

  def test_what_the_rank_leaves_out_comes_later(self):
    # Half of what an update applies leaves the momentum, all else stays.
    tx = optim.scale_by_dion(rank=2, momentum=0.5)
    g = float32({"w": normal(0, 12, 8)})
    state = tx.init(g)
    update = jax.jit(tx.update)
    for _ in range(3):
      before = np.asarray(state.momentum["w"] + g["w"], np.float64)
      q = np.asarray(state.basis["w"], np.float64)
      _, state = update(g, state)
      p = np.linalg.qr(before.T @ q)[0]
      applied = before @ p @ p.T
      np.testing.assert_allclose(
        state.momentum["w"], before - 0.5 * applied, atol=1e-5
      )

  @parameterized.parameters(0.0, 1.0, 3.0, 6.0, 7.0)
  def test_orthonormal_columns_are_qrs(self, decades):
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(200, 32)))
    right, _ = np.linalg.qr(rng.normal(size=(32, 32)))
    x = (left * np.logspace(0, -decades, 32)) @ right
    y = np.asarray(
      jax.jit(dion.orthonormal_columns)(jnp.float32(x)), np.float64
    )
    if decades <= 3:
      want, r = np.linalg.qr(x)
      want = want * np.sign(np.diag(r))
      # Columns turn by rounding times the condition number.
      np.testing.assert_allclose(y, want, atol=1e-5 * 10**decades)
    gram = y.T @ y
    if decades <= 6:  # float32 still tells all columns apart
      np.testing.assert_allclose(gram, np.eye(32), atol=1e-5)
    self.assertLess(np.linalg.norm(gram, 2), 1 + 1e-5)

  def test_columns_of_all_scales_and_dependent_ones(self):
    x = normal(0, 40, 6) * [1e-30, 1, 1e30, 0, 1, 1]
    x[:, 5] = x[:, 4]
    y = np.asarray(jax.jit(dion.orthonormal_columns)(jnp.float32(x)))
    self.assertTrue(np.all(np.isfinite(y)))
    np.testing.assert_array_equal(y[:, 3], 0)
    keep = [0, 1, 2, 4]
    gram = y[:, keep].T @ y[:, keep]
    np.testing.assert_allclose(gram, np.eye(4), atol=2e-6)
    self.assertLess(np.linalg.norm(y[:, 5]), 1.001)

  def test_a_gradient_of_zeros_does_not_end_the_basis(self):
    tx = optim.scale_by_dion(rank=3)
    zero, g = float32({"w": np.zeros((8, 6))}), float32({"w": normal(0, 8, 6)})
    state = tx.init(g)
    updates, after = jax.jit(tx.update)(zero, state)
    np.testing.assert_array_equal(updates["w"], 0)
    np.testing.assert_array_equal(after.basis["w"], state.basis["w"])
    updates, _ = jax.jit(tx.update)(g, after)
    self.assertGreater(float(jnp.linalg.norm(updates["w"])), 0.1)

  def test_narrow_gradients_keep_a_wide_momentum(self):
    tx = optim.scale_by_dion(rank=3)
    update = jax.jit(tx.update)
    states = [tx.init(float32({"w": normal(0, 8, 6)}))] * 2
    for i in range(2):
      narrow = {"w": jnp.asarray(normal(i, 8, 6), jnp.bfloat16)}
      updates, states[0] = update(narrow, states[0])
      _, states[1] = update(float32(narrow), states[1])
      self.assertEqual(updates["w"].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(*(s.momentum["w"] for s in states))

  def test_size_of_updates(self):
    tx = optim.scale_by_dion(rank=16)
    g = float32({"w": normal(0, 128, 64)})
    state = tx.init(g)
    for _ in range(3):
      updates, state = jax.jit(tx.update)(g, state)
    rms = float(jnp.sqrt(jnp.mean(updates["w"] ** 2)))
    # Q's columns have norm 1 but are not orthogonal; the Frobenius norm of
    # Q Pᵀ is √r all the same, as P's columns are.
    np.testing.assert_allclose(rms, 0.2 * (16 / 64) ** 0.5, rtol=1e-4)

  def test_blocks_of_unequal_sizes(self):
    g = float32({"qkv": normal(0, 16, 24)})
    axes = {"qkv": optim.MatrixAxes(output_blocks=(16, 4, 4))}
    tx = optim.dion(0.1, rank=2, matrix_axes=axes, weight_decay=0.1)
    params = float32({"qkv": normal(1, 16, 24)})
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(g, state, params)
    params = optax.apply_updates(params, updates)
    self.assertEqual(params["qkv"].shape, (16, 24))
    self.assertTrue(np.all(np.isfinite(params["qkv"])))

  @parameterized.parameters(0, -1, 0.0, 1.5, True, "4")
  def test_bad_ranks(self, rank):
    with self.assertRaisesRegex(ValueError, "rank must be"):
      optim.dion(0.1, rank=rank)

  def test_a_rank_above_a_side_names_the_leaf(self):
    params = float32({"layers": {"up": np.ones((4, 32))}})
    with self.assertRaisesRegex(ValueError, "rank: 5 .*layers/up"):
      optim.dion(0.1, rank=5).init(params)

  def test_bad_arguments(self):
    for name, value in (("momentum", 1.0), ("shape_scale", "unit")):
      with self.assertRaisesRegex(ValueError, name):
        optim.dion(0.1, **{name: value})


if __name__ == "__main__":
  absltest.main()
