"""Rectified flow (arXiv:2209.03003): straight lines from noise to data.

At time t in [0, 1] a line is at `(1 - t) data + t noise`: t is the share of
the noise, and the velocity `noise - data` points away from the data. Samples
are drawn from t = 1 down to t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Uniform, or the logistic function of a standard normal, which puts weight on
# the middle, where the velocity is hardest to tell (arXiv:2403.03206, eq. 19).
TIMES = ("uniform", "logit_normal")


def draw_times(key: jax.Array, count: int, times: str) -> jax.Array:
  """Random t, float32 `[count]`.

  The draws are spread: each `1 / count` of the distribution gives one, so
  that the mean over a batch varies less.

  Raises:
    ValueError: `times` is not one of `TIMES`.
  """
  if times not in TIMES:
    raise ValueError(f"times: got {times!r}; allowed: one of {TIMES}")
  u = jax.random.uniform(key, (count,), minval=1e-4, maxval=1 - 1e-4)
  u = (jnp.arange(count) + u) / count
  if times == "uniform":
    return u
  return jax.nn.sigmoid(jax.scipy.special.ndtri(u))


def interpolate(
  data: jax.Array, noise: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Where the lines are at t, and their velocity.

  Args:
    data: `[B, ...]`.
    noise: likewise.
    t: `[B]`.

  Returns:
    Two arrays like `data`.
  """
  t = t.reshape(-1, *[1] * (data.ndim - 1))
  return (1 - t) * data + t * noise, noise - data


def euler_times(steps: int) -> np.ndarray:
  """`steps + 1` equally spaced times from 1 to 0, float32.

  Raises:
    ValueError: fewer than one step.
  """
  if steps < 1:
    raise ValueError(f"steps: got {steps}; allowed: at least 1")
  return np.linspace(1.0, 0.0, steps + 1, dtype=np.float32)


def euler(
  velocity: Callable[[jax.Array, jax.Array], jax.Array],
  x: jax.Array,
  times: np.ndarray,
) -> jax.Array:
  """Follows `velocity(x, t)` from `times[0]` to `times[-1]`.

  Args:
    velocity: x and a scalar t to an array like x.
    x: where the lines are at `times[0]`.
    times: at least one.

  Returns:
    Where they are at `times[-1]`.
  """

  def step(x, pair):
    t, step = pair
    return x + step * velocity(x, t), None

  pairs = (jnp.asarray(times[:-1]), jnp.asarray(np.diff(times)))
  return jax.lax.scan(step, x, pairs)[0]
