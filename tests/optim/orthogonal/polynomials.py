"""Matrices of several spectra, and what polynomials make of them."""

from __future__ import annotations

import functools

import numpy as np

from optim.orthogonal import schedules

# Each maps x / ‖x‖_F: Polar Express's margin of 1.02 is folded in.
_MARGIN = 1.02 ** -np.array([1, 3, 5])
TABLES = {
  "keller": np.array([(3.4445, -4.7750, 2.0315)] * 5),
  "polar_express": schedules.polar_express_coefficients(5)
  * np.concatenate([[_MARGIN], np.ones((4, 3))]),
  "dion": np.array(
    [
      (4.0848, -6.8946, 2.9270),
      (3.9505, -6.3029, 2.6377),
      (3.7418, -5.5913, 2.3037),
      (2.8769, -3.1427, 1.2046),
      (2.8366, -3.0525, 1.2012),
    ]
  ),
}


def spectra(m):
  """Singular values: flat, power laws, low ranks, one dominant direction."""
  i = np.arange(1, m + 1)
  return np.stack(
    [
      np.ones(m),
      i**-0.5,
      i**-1.0,
      i**-2.0,
      np.geomspace(1, 1e-3, m),
      np.where(i <= m // 8, 1, 1e-3),
      np.where(i <= m // 8, 1, 0),
      np.where(i == 1, 1, 0.01),
    ]
  )


@functools.cache
def matrices(m, n):
  """One of each spectrum, and one of independent entries: [9, m, n]."""
  rng = np.random.default_rng(m + n)
  values = spectra(m)
  shape = (len(values), m, n)
  u = np.linalg.qr(rng.normal(size=(len(values), m, m)))[0]
  vt = np.linalg.qr(rng.normal(size=shape).swapaxes(1, 2))[0].swapaxes(1, 2)
  x = (u * values[:, None]) @ vt
  return np.concatenate([x, rng.normal(size=(1, m, n)) / np.sqrt(n)])


def polynomial(x, table, divisor=1.0):
  """Polynomials of x / (divisor ‖x‖_F), by singular values."""
  u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  s = s / (divisor * np.linalg.norm(s, axis=-1, keepdims=True))
  for a, b, c in table:
    s = a * s + b * s**3 + c * s**5
  return (u * s[..., None, :]) @ vt


def largest(x):
  """The largest singular value of each matrix."""
  return np.linalg.norm(np.asarray(x, np.float64), ord=2, axis=(-2, -1))
