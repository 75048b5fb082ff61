"""FRUGAL against NumPy float64, given what it chose at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim
from tests.optim.low_rank import reference

STEPS = 5
INTERVAL = 2


def run(tx, grads):
  """Updates, and the projectors used, step by step."""
  state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
  for g in grads:
    updates, state = update(g, state)
    out.append((updates, jax.tree.map(np.asarray, state.projector)))
  return out


class FrugalTest(parameterized.TestCase):
  def check(self, kind, grads, outside, **kwargs):
    """`grads`: stacks [layers, m, n]; `outside` in NumPy."""
    with jax.enable_x64(True):
      tx = optim.scale_by_frugal(
        projection=kind, update_interval=INTERVAL, **kwargs
      )
      steps = run(tx, [{"w": jnp.asarray(g)} for g in grads])
    adam = None
    for t, (g, (got, projector)) in enumerate(zip(grads, steps, strict=True)):
      p = projector["w"]
      if t % INTERVAL == 0:
        adam = reference.Adam(eps=1e-8)
      elif t:
        np.testing.assert_array_equal(p, steps[t - 1][1]["w"])
      want = outside(g)
      if kind == "columns":
        layers = np.arange(len(g))[:, None]
        chosen = p[..., 0]
        want[layers, chosen] = adam(g[layers, chosen])
      elif kind == "blocks":
        want[p] = adam(g[p])
      else:
        if g.shape[1] > g.shape[2]:
          p, low = np.swapaxes(p, 1, 2), g @ np.swapaxes(p, 1, 2)
          inside, up = low @ np.swapaxes(p, 1, 2), adam(low)
          up = up @ np.swapaxes(p, 1, 2)
        else:
          low = np.swapaxes(p, 1, 2) @ g
          inside, up = p @ low, p @ adam(low)
        want = up + outside(g - inside)
      np.testing.assert_allclose(got["w"], want, atol=1e-9)
    return [projector["w"] for _, projector in steps]

  def test_columns(self):
    grads = reference.gradients(0, STEPS, 2, 12, 20)
    chosen = self.check("columns", grads, np.sign)
    for p in chosen:
      self.assertEqual(p.shape, (2, 3, 1))
      for layer in p:
        self.assertLen(set(layer[:, 0]), 3)
        self.assertTrue(set(layer[:, 0]) <= set(range(12)))
    self.assertFalse(np.array_equal(chosen[1], chosen[2]))
    self.assertFalse(np.array_equal(chosen[0][0], chosen[0][1]))

  def test_blocks(self):
    grads = reference.gradients(0, STEPS, 6, 5, 4)
    chosen = self.check("blocks", grads, np.sign, density=0.5)
    for p in chosen:
      self.assertLen(set(p), 3)

  @parameterized.product(kind=("svd", "random"), shape=((8, 20), (20, 8)))
  def test_subspaces(self, kind, shape):
    grads = reference.gradients(0, STEPS, 2, *shape)
    chosen = self.check(
      kind, grads, lambda g: 0.1 * g, rest="sgd", rest_scale=0.1
    )
    self.assertGreater(np.abs(chosen[2] - chosen[1]).max(), 0.01)
    if kind == "svd":
      p = chosen[0][0] if shape[0] < shape[1] else chosen[0][0].T
      u = np.linalg.svd(reference.upright(grads[0][0]))[0][:, :2]
      np.testing.assert_allclose(p @ p.T, u @ u.T, atol=1e-9)

  def test_signs_of_the_rest_of_a_subspace(self):
    grads = reference.gradients(0, STEPS, 2, 8, 20)
    self.check("svd", grads, lambda g: 0.3 * np.sign(g), rest_scale=0.3)

  def test_rounding_errors_are_no_signs(self):
    # The whole space: nothing is left, but for rounding.
    g = jnp.asarray(reference.gradients(0, 1, 16, 16)[0], jnp.float32)
    for size in (1e-10, 1.0, 1e10):
      tx = optim.scale_by_frugal(projection="svd", density=1.0, rest_scale=1e3)
      got, _ = jax.jit(tx.update)({"w": size * g}, tx.init({"w": g}))
      self.assertLess(np.abs(got["w"]).max(), 20)

  def test_state_bytes(self):
    params = {"w": jnp.zeros((4, 64, 256))}

    def state(**kwargs):
      tx = optim.scale_by_frugal(density=0.25, **kwargs)
      # Without the counter, the key and two sums of weights.
      return optim.state_bytes(tx, params)["state"] - 20

    held = 2 * 4 * 64 * 256 // 4
    self.assertEqual(state(), 4 * (held + 4 * 16))
    self.assertEqual(state(projection="blocks"), 4 * (held + 1))
    for kind in ("random", "svd"):
      self.assertEqual(state(projection=kind), 4 * (held + 4 * 16 * 64))

  @parameterized.parameters(
    (dict(density=0.0), "density must be"),
    (dict(density=1.5), "density must be"),
    (dict(density=jnp.ones(())), "static_args"),
    (dict(projection="rows"), "projection must be one of"),
    (dict(rest="adam"), "rest must be one of"),
    (dict(rest_scale=-1.0), "rest_scale must be at least 0"),
    (dict(update_interval=0), "update_interval must be a whole number"),
  )
  def test_arguments_out_of_range(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      optim.frugal(0.1, **kwargs)

  def test_blocks_of_a_single_matrix_name_the_leaf(self):
    tx = optim.frugal(0.1, projection="blocks")
    with self.assertRaisesRegex(ValueError, r"'a/w'.*\(4, 5\)"):
      tx.init({"a": {"w": jnp.zeros((4, 5))}})


if __name__ == "__main__":
  absltest.main()
