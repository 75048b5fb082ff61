"""GaLore against NumPy float64 and, where they are the same, optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim
from tests.optim.low_rank import reference

STEPS = 5


def run(tx, grads):
  """Updates of a list of gradient trees, in float64."""
  params = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, grads[0]))
  state, update, out = tx.init(params), jax.jit(tx.update), []
  for g in grads:
    updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
    out.append(updates)
  return out, state


def expected(grads, rank, interval, on_refresh="keep", scale=0.25):
  subspace = reference.Subspace(rank, interval, on_refresh)
  out = []
  for g in grads:
    p, _, direction = subspace(reference.upright(g))
    u = scale * p @ direction
    out.append(u if g.shape[0] <= g.shape[1] else u.T)
  return out


class GaloreTest(parameterized.TestCase):
  @parameterized.product(
    basis=("eigh", "svd"), on_refresh=("keep", "reset", "rotate")
  )
  def test_equals_numpy(self, basis, on_refresh):
    wide = reference.gradients(0, STEPS, 16, 64)
    tall = reference.gradients(1, STEPS, 64, 16)
    stack = reference.gradients(2, STEPS, 2, 64, 16)
    with jax.enable_x64(True):
      got, _ = run(
        optim.scale_by_galore(
          rank=4, update_interval=2, basis=basis, on_refresh=on_refresh
        ),
        [
          {"wide": a, "tall": b, "stack": c}
          for a, b, c in zip(wide, tall, stack, strict=True)
        ],
      )
    args = (4, 2, on_refresh)
    want = {
      "wide": expected(wide, *args),
      "tall": expected(tall, *args),
      "stack": np.stack(
        [expected([g[i] for g in stack], *args) for i in range(2)], axis=1
      ),
    }
    for t in range(STEPS):
      for name, updates in want.items():
        # Entries are about 0.1; gaps between eigenvalues cost some digits.
        np.testing.assert_allclose(got[t][name], updates[t], atol=1e-9)

  def test_equals_optax_on_square_matrices(self):
    # There the two agree on the side, and signs matter only to moments that
    # outlive a basis.
    grads = [{"w": g} for g in reference.gradients(0, 4, 24, 24)]
    with jax.enable_x64(True):
      got, _ = run(optim.scale_by_galore(rank=6, scale=0.3), grads)
      want, _ = run(
        optax.contrib.scale_by_galore(
          rank=6, scale=0.3, base_optimizer=optax.scale_by_adam(eps=1e-6)
        ),
        grads,
      )
    for a, b in zip(got, want, strict=True):
      # Entries are about 0.2; optax has its bases in float32.
      np.testing.assert_allclose(a["w"], b["w"], atol=1e-5)

  def test_float32_is_float64_rounded(self):
    grads = [{"w": g} for g in reference.gradients(0, 3, 12, 20)]
    tx = optim.scale_by_galore(rank=3)
    narrow = jax.tree.map(lambda g: g.astype(np.float32), grads)
    got, state = run(tx, narrow)
    with jax.enable_x64(True):
      want, _ = run(tx, jax.tree.map(np.float64, narrow))
    self.assertEqual(state.mu["w"].dtype, jnp.float32)
    for a, b in zip(got, want, strict=True):
      # Entries are about 0.1 and eigenvalues a few percent apart, so their
      # vectors keep about five digits.
      np.testing.assert_allclose(a["w"], b["w"], atol=1e-4)

  def test_at_full_rank_the_update_is_adam_in_a_rotated_space(self):
    # Rotation invariant parts of it: a constant gradient gives signs in the
    # basis, whose norm does not depend on the basis.
    g = reference.gradients(0, 1, 8, 12)[0]
    with jax.enable_x64(True):
      got, _ = run(optim.scale_by_galore(rank=8, scale=1.0), [{"w": g}] * 3)
    for u in got:
      np.testing.assert_allclose(np.linalg.norm(u["w"]), 96**0.5, rtol=1e-3)

  def test_state_bytes(self):
    for shape in ((3, 64, 256), (3, 256, 64)):
      params = {"w": jnp.zeros(shape)}
      got = optim.state_bytes(optim.scale_by_galore(rank=16), params)["state"]
      # 2 r L + r S per layer; the counter and two sums of weights.
      self.assertEqual(got, 4 * 3 * (2 * 16 * 256 + 16 * 64) + 12)

  def test_bfloat16_parameters_have_float32_state(self):
    tx = optim.scale_by_galore(rank=2)
    g = jnp.asarray(reference.gradients(0, 1, 6, 9)[0], jnp.bfloat16)
    (got,), state = run(tx, [{"w": g}])
    self.assertEqual(got["w"].dtype, jnp.bfloat16)
    for x in (state.projector["w"], state.mu["w"], state.nu["w"]):
      self.assertEqual(x.dtype, jnp.float32)
    want = expected([np.asarray(g, np.float64)], 2, 200)[0]
    # One rounding to bfloat16.
    np.testing.assert_allclose(
      np.float64(got["w"]), want, rtol=2.0**-8, atol=1e-5
    )

  @parameterized.parameters(
    (dict(update_interval=0), "update_interval must be a whole number"),
    (dict(update_interval=2.5), "update_interval must be a whole number"),
    (dict(basis="qr"), "basis must be one of"),
    (dict(on_refresh="drop"), "on_refresh must be one of"),
    (dict(b1=1.0), "b1 must be in"),
    (dict(b2=-0.1), "b2 must be in"),
    (dict(eps=-1.0), "eps must be at least 0"),
    (dict(learning_rate=-1.0), "learning_rate must be at least 0"),
    (dict(weight_decay=-1.0), "weight_decay must be at least 0"),
  )
  def test_arguments_out_of_range(self, kwargs, message):
    for factory in (optim.galore, optim.fira):
      with self.assertRaisesRegex(ValueError, message):
        factory(**{"learning_rate": 0.1, **kwargs})


if __name__ == "__main__":
  absltest.main()
