"""NumPy float64 pieces of the low-rank methods, one matrix at a time.

In the layout of the papers: a matrix is handled with its smaller side first,
so that there is one case and the basis is always on the left.
"""

from __future__ import annotations

import numpy as np


def gradients(seed, steps, *shape):
  """`steps` matrices (or stacks) whose leading directions slowly turn."""
  rng = np.random.default_rng(seed)
  base = rng.standard_normal(shape)
  return [base + 0.7 * rng.standard_normal(shape) for _ in range(steps)]


def upright(g):
  """The matrix with its smaller side first; ties stay as they are."""
  return g if g.shape[0] <= g.shape[1] else g.T


class Adam:
  """Adam's directions, from zero."""

  def __init__(self, b1=0.9, b2=0.999, eps=1e-6):
    self.b1, self.b2, self.eps = b1, b2, eps
    self.m = self.v = 0.0
    self.t = 0
    self.released = False

  def __call__(self, g):
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.v = self.b2 * self.v + (1 - self.b2) * g**2
    m = self.m / (1 - self.b1**self.t)
    correction = np.sqrt(1 - self.b2**self.t)
    eps = self.eps / correction if self.released else self.eps
    return m / (np.sqrt(self.v) / correction + eps)


class Subspace:
  """GaLore's basis P, signs following the last one's, and Adam in it."""

  def __init__(self, rank, interval, on_refresh="keep"):
    self.rank, self.interval, self.on_refresh = rank, interval, on_refresh
    self.adam, self.p, self.t = Adam(), None, 0

  def __call__(self, g):
    """P, R = Pᵀ G and Adam(R)."""
    if self.t % self.interval == 0:
      new = np.linalg.svd(g, full_matrices=False)[0][:, : self.rank]
      if self.p is not None:
        new = np.where(np.sum(new * self.p, axis=0) < 0, -new, new)
        if self.on_refresh == "reset":
          self.adam = Adam()
        if self.on_refresh == "rotate":
          c = new.T @ self.p
          self.adam.m = c @ self.adam.m
          self.adam.v = c**2 @ self.adam.v
      self.p = new
    self.t += 1
    r = self.p.T @ g
    return self.p, r, self.adam(r)


def limited(s, before, limit=1.01):
  """Norm-growth limiter: the matrix, and the norm to remember."""
  norm = np.linalg.norm(s)
  if before and norm > limit * before:
    return s * (limit * before / norm), limit * before
  return s, norm
