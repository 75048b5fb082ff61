"""NorMuon against a numpy float64 version written from the formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim

KELLER = [(3.4445, -4.7750, 2.0315)] * 5


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def polar(x):
  """Keller's five steps on one matrix, by its singular values."""
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  s = s / np.linalg.norm(s)
  for a, b, c in KELLER:
    s = a * s + b * s**3 + c * s**5
  return (u * s) @ vt


def reference(grads, *, beta, b2, nesterov):
  """The updates for one kernel (in, out), unscaled, and the last v."""
  m, v, out = 0.0, 0.0, []
  for g in grads:
    m = beta * m + (1 - beta) * g
    o = polar(beta * m + (1 - beta) * g if nesterov else m)
    # One number per output neuron, a column of the kernel.
    v = b2 * v + (1 - b2) * np.mean(o**2, axis=0)
    even = o / (np.sqrt(v) + 1e-10)
    out.append(even * np.linalg.norm(o) / np.linalg.norm(even))
  return out, v


def run(tx, grads):
  """All updates and the last state, in float64."""
  with jax.enable_x64(True):
    grads = jax.tree.map(jnp.asarray, grads)
    state = tx.init(grads[0])
    update = jax.jit(tx.update)
    out = []
    for g in grads:
      u, state = update(g, state)
      out.append(jax.tree.map(np.asarray, u))
    return out, jax.tree.map(np.asarray, state)


def transformation(**kwargs):
  kwargs = dict(shape_scale=None, coefficients="keller") | kwargs
  return optim.scale_by_normuon(ns_dtype="float64", **kwargs)


class NormuonTest(parameterized.TestCase):
  @parameterized.product(
    shape=[(64, 256), (256, 64), (5, 3)], nesterov=[True, False]
  )
  def test_is_the_published_loop(self, shape, nesterov):
    grads = [normal(i, *shape) for i in range(3)]
    want, v = reference(grads, beta=0.9, b2=0.8, nesterov=nesterov)
    tx = transformation(momentum=0.9, b2=0.8, nesterov=nesterov)
    got, state = run(tx, [{"w": g} for g in grads])
    for u, w in zip(got, want, strict=True):
      np.testing.assert_allclose(u["w"], w, atol=1e-11)
    np.testing.assert_allclose(state.second_moment["w"], v[None], rtol=1e-9)
    self.assertEqual(state.count, len(grads))

  def test_stacked_layers_are_separate_matrices(self):
    grads = [normal(i, 3, 6, 10) for i in range(2)]
    got, state = run(transformation(), [{"w": g} for g in grads])
    self.assertEqual(state.second_moment["w"].shape, (3, 1, 10))
    for layer in range(3):
      want, _ = reference(
        [g[layer] for g in grads], beta=0.95, b2=0.95, nesterov=True
      )
      np.testing.assert_allclose(got[-1]["w"][layer], want[-1], atol=1e-11)

  @parameterized.named_parameters(
    ("heads", (8, 2, 3), optim.MatrixAxes(0, 2), (1, 2, 3)),
    ("merged_inputs", (2, 3, 8), optim.MatrixAxes((0, 1), 2), (1, 1, 8)),
    ("input_blocks", (6, 8), optim.MatrixAxes(0, 1, 3), (3, 8)),
    ("sizes", (6, 8), optim.MatrixAxes(0, 1, (4, 2), (3, 5)), (2, 8)),
    ("transposed", (6, 8), optim.MatrixAxes(1, 0), (6, 1)),
  )
  def test_each_block_has_its_own_moments(self, shape, axes, moments):
    grads = [normal(i, *shape) for i in range(2)]
    tx = transformation(matrix_axes={"w": axes})
    got, state = run(tx, [{"w": g} for g in grads])
    self.assertEqual(state.second_moment["w"].shape, moments)

    def blocks(x):
      if x.ndim == 3 and axes.outputs == 2 and axes.inputs == 0:
        return [x[:, h] for h in range(2)]
      if x.ndim == 3:
        return [x.reshape(6, 8)]
      if axes.inputs == 1:
        return [x.T]
      if axes.input_blocks == 3:
        return np.split(x, 3)
      return [y for r in np.split(x, [4]) for y in np.split(r, [3], axis=1)]

    for i, block in enumerate(blocks(got[-1]["w"])):
      want, _ = reference(
        [blocks(g)[i] for g in grads], beta=0.95, b2=0.95, nesterov=True
      )
      np.testing.assert_allclose(block, want[-1], atol=1e-11)

  def test_evens_out_neurons_at_muons_size(self):
    g = normal(0, 64, 16) * np.geomspace(1, 1e-2, 16)
    grads = [{"w": g + 0.01 * normal(i, 64, 16)} for i in range(5)]
    got, _ = run(transformation(shape_scale="rms"), grads)
    muon, _ = run(
      optim.scale_by_muon(coefficients="keller", ns_dtype="float64"), grads
    )
    spread = lambda x: np.ptp(np.log(np.linalg.norm(x, axis=0)))
    size = lambda x: np.sqrt(np.mean(x**2))
    u, plain = got[-1]["w"], muon[-1]["w"]
    self.assertAlmostEqual(size(u), size(plain), places=12)
    self.assertLess(spread(u), 0.3 * spread(plain))

  def test_a_dead_neuron_stays_dead(self):
    g = normal(0, 8, 6)
    g[:, 2] = 0
    got, _ = run(transformation(), [{"w": g}] * 2)
    np.testing.assert_array_equal(got[-1]["w"][:, 2], 0)

  @parameterized.parameters(
    ({"b2": 1.0}, "b2"), ({"eps": -1.0}, "eps"), ({"momentum": 1.5}, "momentum")
  )
  def test_refuses(self, arguments, name):
    with self.assertRaisesRegex(ValueError, name):
      optim.scale_by_normuon(**arguments)

  def test_cautious_decay_and_fallback(self):
    params = {"w": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    grads = jax.tree.map(jnp.ones_like, params)
    grads["w"] = grads["w"].at[0].set(-1)
    step = {}
    for wd in (0.0, 0.5):
      tx = optim.normuon(
        0.1, weight_decay=wd, cautious=True, fallback=optax.set_to_zero()
      )
      step[wd], _ = tx.update(grads, tx.init(params), params)
    decay = np.asarray(step[0.0]["w"] - step[0.5]["w"])
    shrinks = np.asarray(step[0.0]["w"]) <= 0
    self.assertEqual(set(shrinks.ravel()), {True, False})
    np.testing.assert_allclose(decay, 0.05 * shrinks, atol=1e-6)
    np.testing.assert_array_equal(step[0.5]["bias"], 0)


if __name__ == "__main__":
  absltest.main()
