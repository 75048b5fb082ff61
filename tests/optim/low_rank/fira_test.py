"""Fira against NumPy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim
from tests.optim.low_rank import reference
from tests.optim.low_rank.galore_test import run

STEPS = 5


def expected(grads, rank, interval, released, limit):
  subspace, norm, out = reference.Subspace(rank, interval), 0.0, []
  subspace.adam.released = released
  for t, g in enumerate(grads, 1):
    x = reference.upright(g)
    p, r, psi = subspace(x)
    s = x - (0.25 if released else 1) * p @ r
    s = s * (np.linalg.norm(psi, axis=0) / np.linalg.norm(r, axis=0))
    # The release limits norms without the bias correction.
    c = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) if released else 1
    if limit:
      s, norm = reference.limited(s / c, norm, limit)
      s = s * c
    u = 0.25 * p @ psi + s
    out.append(u if g.shape[0] <= g.shape[1] else u.T)
  return out


class FiraTest(parameterized.TestCase):
  @parameterized.parameters((False, 1.01), (True, 1.01), (False, None))
  def test_equals_numpy(self, released, limit):
    wide = reference.gradients(0, STEPS, 12, 48)
    wide[2] *= 10  # for the limiter
    tall = reference.gradients(1, STEPS, 48, 12)
    stack = reference.gradients(2, STEPS, 2, 12, 48)
    with jax.enable_x64(True):
      got, state = run(
        optim.scale_by_fira(
          rank=4, update_interval=2, released=released, growth_limit=limit
        ),
        [
          {"wide": a, "tall": b, "stack": c}
          for a, b, c in zip(wide, tall, stack, strict=True)
        ],
      )
    self.assertEqual(state.norm["stack"].shape, (2,))
    args = (4, 2, released, limit)
    want = {
      "wide": expected(wide, *args),
      "tall": expected(tall, *args),
      "stack": np.stack(
        [expected([g[i] for g in stack], *args) for i in range(2)], axis=1
      ),
    }
    for t in range(STEPS):
      for name, updates in want.items():
        np.testing.assert_allclose(got[t][name], updates[t], atol=1e-8)

  def test_the_residual_is_orthogonal_to_the_subspace(self):
    g = reference.gradients(0, 1, 12, 48)[0]
    with jax.enable_x64(True):
      (got,), state = run(optim.scale_by_fira(rank=4), [{"w": g}])
      p = np.asarray(state.galore.projector["w"])
      inside = run(optim.scale_by_galore(rank=4), [{"w": g}])[0][0]
    outside = np.asarray(got["w"]) - np.asarray(inside["w"])
    np.testing.assert_allclose(p.T @ outside, 0, atol=1e-12)

  def test_a_step_without_gradients_does_not_stop_the_residual(self):
    g = reference.gradients(0, 1, 6, 9)[0]
    tx = optim.scale_by_fira(rank=2)
    got, _ = run(tx, [{"w": np.float32(x)} for x in (g, 0 * g, g)])
    self.assertGreater(np.linalg.norm(got[2]["w"]), 1.0)

  def test_state_bytes(self):
    params = {"w": jnp.zeros((3, 64, 256))}
    got = optim.state_bytes(optim.scale_by_fira(rank=16), params)["state"]
    # 2 r L + r S + 1 per layer; the counter and two sums of weights.
    self.assertEqual(got, 4 * 3 * (2 * 16 * 256 + 16 * 64 + 1) + 12)

  def test_a_limit_below_1_is_refused(self):
    with self.assertRaisesRegex(ValueError, "growth_limit must be at least 1"):
      optim.fira(0.1, growth_limit=0.9)


if __name__ == "__main__":
  absltest.main()
