"""What tests of several folders do alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def jitted(f: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
  """`f` compiled, with these arguments fixed."""
  return jax.jit(functools.partial(f, **kwargs))


def assert_close(
  got: Any, want: Any, units: int = 64, eps: float = 2.0**-24
) -> None:
  """Within `units` roundings of the largest magnitude.

  A forward pass of the tests' sizes is a chain of about 40 roundings (layers,
  products, norms) whose errors add like a random walk at best and linearly at
  worst; `units` is of that order.
  """
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  assert np.all(np.isfinite(got))
  bound = units * eps * np.max(np.abs(want))
  np.testing.assert_allclose(got, want, rtol=0, atol=bound)
