"""The inverse of I + L against numpy's in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kernels_pallas.linear import inverse

# What the lower triangle is made of: keys and beta.
CASES = {
  "random": (lambda rng, n: rng.standard_normal((n, 32)), None),
  "near": (lambda rng, n: rng.standard_normal((n, 32)) + 0.5, None),
  "nearer": (lambda rng, n: rng.standard_normal((n, 32)) + 3, None),
  "same_1": (lambda rng, n: np.ones((n, 32)), 1.0),
  "same_1.9": (lambda rng, n: np.ones((n, 32)), 1.9),
}


def lower(case, size, seed):
  rng = np.random.default_rng(seed)
  keys, beta = CASES[case]
  k = keys(rng, size)
  k = k / np.linalg.norm(k, axis=-1, keepdims=True)
  if beta is None:
    beta = rng.uniform(0, 1, (size, 1))
  return np.tril(beta * (k @ k.T), -1)


def relative(got, want):
  return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.usefixtures("full_optimization")
@pytest.mark.parametrize("case", CASES)
def test_float32(case):
  """Rounding stays near 2^-24: the inverse's entries are at most 2."""
  rows = np.stack(
    [[lower(case, 64, 2 * i + j) for j in (0, 1)] for i in (0, 1)]
  )
  rows = rows.astype(np.float32)
  want = np.linalg.inv(np.eye(64) + rows.astype(np.float64))
  got = jax.jit(inverse.unit_lower_inverse)(rows)
  assert got.dtype == np.float32
  bound = {"same_1": 0.0, "same_1.9": 4e-6}.get(case, 5e-7)
  assert relative(got, want) <= bound


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64, 128, 256])
def test_sizes_in_float64(size):
  with jax.enable_x64(True):
    for case in ("nearer", "same_1.9"):
      rows = lower(case, size, size)
      got = jax.jit(inverse.unit_lower_inverse)(rows)
      assert got.dtype == np.float64
      # Rounding errors of a row reach every later one.
      want = np.linalg.inv(np.eye(size) + rows)
      assert relative(got, want) < size * 1e-15
