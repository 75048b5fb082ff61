"""APOLLO and APOLLO-Mini against NumPy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim
from tests.optim.low_rank import reference
from tests.optim.low_rank.galore_test import run

STEPS = 5
NAMES = ("stack", "tall", "wide")


def drawn(number, place, shape, rank):
  """The projection that the docstring describes, its smaller side first."""
  key = jax.random.fold_in(jax.random.key(3), number)
  key = jax.random.fold_in(key, place)
  *batch, m, n = shape
  size = (*batch, m, rank) if m <= n else (*batch, rank, n)
  p = np.asarray(jax.random.normal(key, size, jnp.float64)) / rank**0.5
  return p if m <= n else np.swapaxes(p, -1, -2)


def expected(grads, projections, scale, whole):
  adam, norm, out = reference.Adam(), 0.0, []
  for t, g in enumerate(grads):
    x = reference.upright(g)
    r = projections[t // 2].T @ x
    psi = adam(r)
    axis = None if whole else 0
    s = np.linalg.norm(psi, axis=axis) / np.linalg.norm(r, axis=axis)
    u, norm = reference.limited(s * x, norm)
    out.append(scale**0.5 * (u if g.shape[0] <= g.shape[1] else u.T))
  return out


class ApolloTest(parameterized.TestCase):
  @parameterized.parameters((4, 1.0, "channel"), (1, 128.0, "tensor"))
  def test_equals_numpy(self, rank, scale, granularity):
    grads = {
      "stack": reference.gradients(2, STEPS, 2, 12, 48),
      "tall": reference.gradients(1, STEPS, 48, 12),
      "wide": reference.gradients(0, STEPS, 12, 48),
    }
    grads["wide"][2] *= 10  # for the limiter
    with jax.enable_x64(True):
      got, _ = run(
        optim.scale_by_apollo(
          rank=rank,
          update_interval=2,
          scale=scale,
          granularity=granularity,
          seed=3,
        ),
        [{name: grads[name][t] for name in NAMES} for t in range(STEPS)],
      )
      projections = {
        name: [
          drawn(k, place, grads[name][0].shape, rank)
          for k in range((STEPS + 1) // 2)
        ]
        for place, name in enumerate(NAMES)
      }
    args = (scale, granularity == "tensor")
    want = {
      name: expected(grads[name], projections[name], *args)
      for name in ("tall", "wide")
    }
    want["stack"] = np.stack(
      [
        expected(
          [g[i] for g in grads["stack"]],
          [p[i] for p in projections["stack"]],
          *args,
        )
        for i in range(2)
      ],
      axis=1,
    )
    for t in range(STEPS):
      for name in NAMES:
        np.testing.assert_allclose(got[t][name], want[name][t], atol=1e-9)

  def test_mini_is_rank_1_with_a_factor_per_matrix(self):
    params = {"w": jnp.zeros((3, 64, 256))}
    tx = optim.apollo_mini(0.1)
    got = optim.state_bytes(tx, params)["state"]
    none = optim.state_bytes(optim.apollo_mini(0.1), {"b": jnp.zeros(0)})
    # 2 L + 1 per layer beside what no matrix needs.
    self.assertEqual(got - none["state"], 4 * 3 * (2 * 256 + 1))
    g = jnp.asarray(reference.gradients(0, 1, 3, 64, 256)[0], jnp.float32)
    updates, _ = jax.jit(tx.update)({"w": g}, tx.init(params), params)
    for u, x in zip(updates["w"], g, strict=True):
      u, x = np.float64(u).ravel(), np.float64(x).ravel()
      cosine = u @ x / np.linalg.norm(u) / np.linalg.norm(x)
      self.assertLess(cosine, -1 + 1e-6)

  def test_state_bytes(self):
    for shape in ((3, 64, 256), (3, 256, 64)):
      params = {"w": jnp.zeros(shape)}
      got = optim.state_bytes(optim.scale_by_apollo(rank=16), params)["state"]
      # 2 r L + 1 per layer; the counter, the two words of the key and two
      # sums of weights.
      self.assertEqual(got, 4 * 3 * (2 * 16 * 256 + 1) + 20)

  def test_the_first_update_has_the_documented_size(self):
    # After one step Adam's entries are signs, so that each channel's norm is
    # sqrt(rank) ‖g‖ / ‖R‖: sqrt(rank) but for what 16 random numbers, the
    # same for all channels, leave of it.
    g = reference.gradients(0, 1, 64, 256)[0]
    (got,), _ = run(optim.scale_by_apollo(rank=16), [{"w": np.float32(g)}])
    rms = np.sqrt(np.mean(np.float64(got["w"]) ** 2))
    np.testing.assert_allclose(rms, (16 / 64) ** 0.5, rtol=0.2)

  @parameterized.parameters(
    (dict(granularity="row"), "granularity must be one of"),
    (dict(scale=-1.0), "scale must be at least 0"),
    (dict(growth_limit=0.5), "growth_limit must be at least 1"),
    (dict(update_interval=0), "update_interval must be a whole number"),
    (dict(b2=1.0), "b2 must be in"),
  )
  def test_arguments_out_of_range(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      optim.apollo(0.1, **kwargs)


if __name__ == "__main__":
  absltest.main()
