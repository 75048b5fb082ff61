"""Float32 products from bfloat16 pieces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import pieces


def random(*shape, seed=0):
  """Float32 of all magnitudes from 2^-20 to 2^20, and zeros."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape)
  return np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)


def test_three_pieces_hold_every_bit():
  x = random(64, 64)
  # Jitted, since a compiler must not take a piece for the whole.
  found = jax.jit(pieces.split, static_argnums=1)(x, 3)
  assert {p.dtype for p in found} == {jnp.dtype("bfloat16")}
  np.testing.assert_array_equal(sum(np.float64(p) for p in found), x)
  two = sum(np.float64(p) for p in found[:2])
  np.testing.assert_allclose(two, x, rtol=2.0**-17)


def test_sums_under_a_mask_and_their_gradients():
  x, dout = random(48, 64), random(32, 64, seed=1)
  mask = np.random.default_rng(2).random((32, 48)) < 0.5
  exact = lambda a, b: np.float64(a) @ np.float64(b)
  # Float32 sums of 64 terms at most: relative to the sum of magnitudes.
  close = lambda got, a, b: np.testing.assert_array_less(
    abs(got - exact(a, b)), 2.0**-20 * exact(abs(a), abs(b)) + 1e-30
  )

  out, pullback = jax.vjp(lambda x: pieces.mask_dot(mask, x), x)
  close(out, mask, x)
  close(pullback(dout)[0], mask.T, dout)
  out, pullback = jax.vjp(lambda x: pieces.mask_dot(x, mask.T), x.T)
  close(out, x.T, mask.T)
  close(pullback(dout.T)[0], dout.T, mask)


def test_products_to_sixteen_bits():
  a, b = random(32, 48), random(48, 64, seed=1)
  exact = np.float64(a) @ np.float64(b)
  got = jax.jit(pieces.matmul)(a, b)
  # The second pieces' rounding, and the product of both that is left out.
  bound = 3 * 2.0**-17 * (np.float64(abs(a)) @ np.float64(abs(b)))
  np.testing.assert_array_less(abs(got - exact), bound + 1e-30)
