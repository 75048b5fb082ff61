"""Rotary positions, attention, matmul gradients and the sliced loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from models import attention, layers

EPS = 2.0**-24


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


class RopeTest(absltest.TestCase):
  def test_scores_depend_on_the_distance_alone(self):
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def score(i, j):
      rotated = [
        layers.rope(x, *layers.rope_table(jnp.array([p]), 8, 50.0))
        for x, p in ((q, i), (k, j))
      ]
      return float(jnp.sum(rotated[0] * rotated[1]))

    # Angles of up to 40 radians carry 40 half-units of rounding.
    for i, j in ((3, 1), (17, 15), (40, 38)):
      self.assertAlmostEqual(score(i, j), score(2, 0), delta=1e-5)
    self.assertGreater(abs(score(3, 0) - score(2, 0)), 1e-2)

  def test_position_zero_is_the_identity_and_norms_are_kept(self):
    x = normal(0, 2, 5, 3, 6)
    y = layers.rope(x, *layers.rope_table(jnp.arange(5), 6, 10.0))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(
      jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6
    )


class MatmulTest(parameterized.TestCase):
  @parameterized.parameters((2, 32), (1, 7), (3, 33))
  def test_bfloat16_gradients_are_those_of_exact_products(self, b, t):
    x, w = normal(0, b, t, 6, dtype=jnp.bfloat16), normal(1, 6, 5)
    g = normal(2, b, t, 5, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(layers.matmul, x, w)
    dx, dw = vjp(g)
    self.assertEqual((dx.dtype, dw.dtype), (jnp.bfloat16, jnp.float32))
    x64, g64 = (np.asarray(a, np.float64).reshape(-1, a.shape[-1])
                for a in (x, g))  # fmt: skip
    w64 = np.asarray(w.astype(jnp.bfloat16), np.float64)
    # One rounding to bfloat16 for y and dx, none for dw.
    for got, want, eps in (
      (y, x64 @ w64, 2.0**-8),
      (dx, g64 @ w64.T, 2.0**-8),
      (dw, x64.T @ g64, b * t * EPS),
    ):
      np.testing.assert_allclose(
        np.asarray(got, np.float64).reshape(want.shape),
        want,
        rtol=0,
        atol=eps * np.max(np.abs(want)),
      )


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters((1, 4, 4), (63, 4, 2), (130, 2, 1), (600, 1, 1))
  def test_causal_is_the_masked_definition(self, length, heads, groups):
    q = normal(0, 2, length, heads, 8)
    k, v = (normal(i, 2, length, groups, 8) for i in (1, 2))
    segments = jnp.cumsum(normal(3, 2, length) > 1.5, axis=1)
    mask = jnp.tril(jnp.ones((length, length), bool))
    mask = mask & (segments[:, :, None] == segments[:, None])
    ours = lambda q, k, v: attention.causal_attention(
      q, k, v, segment_ids=segments
    )
    plain = lambda q, k, v: attention.attention(q, k, v, mask=mask)
    g = normal(4, 2, length, heads, 8)
    got, vjp = jax.vjp(jax.jit(ours), q, k, v)
    want, plain_vjp = jax.vjp(jax.jit(plain), q, k, v)
    for a, b in zip((got, *vjp(g)), (want, *plain_vjp(g)), strict=True):
      np.testing.assert_allclose(
        a, b, rtol=0, atol=64 * EPS * np.max(np.abs(b))
      )


if __name__ == "__main__":
  absltest.main()
