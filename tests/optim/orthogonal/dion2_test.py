"""Dion2 against a step-by-step numpy float64 version of its algorithm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def polar(x):
  u, _, vt = np.linalg.svd(x, full_matrices=False)
  return u @ vt


def reference_step(m, g, count, decay, by_row):
  """One kernel: direction and momentum; lines are rows or columns."""
  m = m + g
  lines = m if by_row else m.T
  largest = np.argsort(-np.abs(lines).sum(axis=1))[:count]
  update = np.zeros_like(lines)
  update[largest] = polar(lines[largest])
  lines = lines.copy()
  lines[largest] *= decay
  return (update, lines) if by_row else (update.T, lines.T)


class Dion2Test(parameterized.TestCase):
  @parameterized.parameters(
    # The shorter side; of a square one the outputs, columns of a JAX kernel.
    ((64, 256), 0.25, None, True),
    ((256, 64), 0.25, None, False),
    ((2, 3, 16, 16), 0.3, None, False),
    ((2, 16, 24), 0.5, "outputs", False),
    ((2, 24, 16), 0.5, "inputs", True),
    ((8, 6), 0.01, None, False),
  )
  def test_is_the_published_loop(self, shape, fraction, along, by_row):
    grads = [normal(i, *shape) for i in range(1, 4)]
    tx = optim.scale_by_dion2(
      fraction=fraction,
      decay=0.8,
      along=along,
      coefficients="exact",
      shape_scale="spectral",
    )
    state = tx.init(float32({"w": grads[0]}))
    update = jax.jit(tx.update)
    got = []
    for g in grads:
      updates, state = update(float32({"w": g}), state)
      got.append(np.asarray(updates["w"]))
    scale = (shape[-1] / shape[-2]) ** 0.5
    side = shape[-2] if by_row else shape[-1]
    count = max(1, round(fraction * side))
    for index in np.ndindex(shape[:-2]):
      m = np.zeros(shape[-2:])
      for g, u in zip(grads, got, strict=True):
        want, m = reference_step(m, g[index], count, 0.8, by_row)
        # Rounding times the condition number of the lines, below 1e2.
        np.testing.assert_allclose(u[index], scale * want, atol=3e-5)
      np.testing.assert_allclose(state.momentum["w"][index], m, atol=1e-5)

  def test_every_line_gets_its_turn(self):
    # Rows that are not applied grow until they are the largest.
    g = float32({"w": normal(0, 8, 32) * np.logspace(0, -0.5, 8)[:, None]})
    tx = optim.scale_by_dion2(fraction=0.25, decay=0.5)
    state, moved = tx.init(g), np.zeros(8)
    update = jax.jit(tx.update)
    for _ in range(20):
      updates, state = update(g, state)
      rows = np.any(np.asarray(updates["w"]) != 0, axis=1)
      self.assertEqual(rows.sum(), 2)
      moved += rows
    self.assertTrue(np.all(moved >= 1), moved)

  def test_all_lines_are_muon_without_nesterov(self):
    # With the whole matrix and decay β, M is Muon's momentum before its
    # decay, times a factor that orthogonalising removes.
    grads = [float32({"w": normal(i, 24, 16)}) for i in range(3)]
    ours = optim.scale_by_dion2(
      fraction=1.0, decay=0.9, coefficients="exact", shape_scale="rms"
    )
    muon = optim.scale_by_muon(
      momentum=0.9, nesterov=False, coefficients="exact"
    )
    states = [ours.init(grads[0]), muon.init(grads[0])]
    for g in grads:
      got, states[0] = jax.jit(ours.update)(g, states[0])
      want, states[1] = jax.jit(muon.update)(g, states[1])
      np.testing.assert_allclose(got["w"], want["w"], atol=2e-5)

  def test_narrow_gradients_keep_a_wide_momentum(self):
    tx = optim.scale_by_dion2(fraction=0.5)
    update = jax.jit(tx.update)
    states = [tx.init(float32({"w": normal(0, 8, 6)}))] * 2
    for i in range(2):
      narrow = {"w": jnp.asarray(normal(i, 8, 6), jnp.bfloat16)}
      updates, states[0] = update(narrow, states[0])
      _, states[1] = update(float32(narrow), states[1])
      self.assertEqual(updates["w"].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(*(s.momentum["w"] for s in states))

  def test_size_of_updates(self):
    g = float32({"w": normal(0, 64, 128)})
    tx = optim.scale_by_dion2(coefficients="exact")
    updates, _ = jax.jit(tx.update)(g, tx.init(g))
    rms = float(jnp.sqrt(jnp.mean(updates["w"] ** 2)))
    np.testing.assert_allclose(rms, 0.2 * 0.25**0.5, rtol=1e-4)

  def test_bad_arguments(self):
    for name, value in (
      ("fraction", 0.0),
      ("fraction", 1.5),
      ("decay", 1.0),
      ("along", "rows"),
      ("shape_scale", "unit"),
    ):
      with self.assertRaisesRegex(ValueError, name):
        optim.dion2(0.1, **{name: value})


if __name__ == "__main__":
  absltest.main()
