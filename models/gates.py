"""The gates of the linear mixers, and what their parameters start from.

Gates are float32, decays in log space. Dimensions: B batch, T length, H value
heads, K key size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class MomentumGates(NamedTuple):
  """Gates of Momentum DeltaNet, each `[B, T, H]`.

  Attributes:
    log_decay: log alpha, at most 0.
    log_momentum: log mu, at most 0.
    beta: weight of the momentum in the state, in (0, 1).
    eta: weight of the error in the momentum, in (0, 2).
  """

  log_decay: jax.Array
  log_momentum: jax.Array
  beta: jax.Array
  eta: jax.Array


def log_decay(
  logits: jax.Array, rate_log: jax.Array, bias: jax.Array
) -> jax.Array:
  """`-exp(rate_log) softplus(logits + bias)`, as Mamba-2 and its heirs decay.

  Args:
    logits: `[..., H]` or any shape.
    rate_log: broadcastable to it.
    bias: likewise.

  Returns:
    Of the logits' shape, float32, at most 0.
  """
  logits, rate_log, bias = (
    x.astype(jnp.float32) for x in (logits, rate_log, bias)
  )
  return -jnp.exp(rate_log) * jax.nn.softplus(logits + bias)


def momentum_gates(
  a: jax.Array,
  b: jax.Array,
  m: jax.Array,
  e: jax.Array,
  *,
  rate_log: jax.Array,
  bias: jax.Array,
  factor_log: jax.Array,
  tau: float,
  min_log_mu: float = 0.0,
) -> MomentumGates:
  """The gates of Momentum DeltaNet (arXiv:2605.05838).

  With eta = 1 + tanh(e / tau) and the angle theta = arctan(eta f), beta is
  sin^2(theta) sigmoid(b) and the decay starts from cos^2(theta), so that
  alpha + beta is below 1. Of x = (eta f)^2, sin^2 is x / (1 + x) and
  log cos^2 is -log(1 + x): no trigonometry, and no digit lost at either end.

  Args:
    a: `[B, T, H]`, logits of the decay.
    b: `[B, T, H]`, of beta.
    m: `[B, T, H]`, of the momentum.
    e: `[B, T, H]`, of eta.
    rate_log: `[2, H]`, log rates of the decay and of the momentum.
    bias: `[2, H]`, biases of the same.
    factor_log: `[H]`, log f.
    tau: temperature of eta.
    min_log_mu: lower bound of the log momentum; 0 is none.

  Returns:
    The gates, float32.
  """
  b, e, factor_log = (x.astype(jnp.float32) for x in (b, e, factor_log))
  eta = 1.0 + jnp.tanh(e / tau)
  x = jnp.square(eta * jnp.exp(factor_log))
  log_mu = log_decay(m, rate_log[1], bias[1])
  if min_log_mu:
    log_mu = jnp.maximum(log_mu, min_log_mu)
  return MomentumGates(
    log_decay=log_decay(a, rate_log[0], bias[0]) - jnp.log1p(x),
    log_momentum=log_mu,
    beta=x / (1.0 + x) * jax.nn.sigmoid(b),
    eta=eta,
  )


def log_uniform_init(
  low: float, high: float
) -> jax.nn.initializers.Initializer:
  """Initial values whose exponential is uniform on (low, high)."""

  def init(key, shape, dtype=jnp.float32):
    # The floor only keeps the logarithm of a draw of exactly 0 finite.
    draw = jax.random.uniform(key, shape, minval=low, maxval=high)
    return jnp.log(jnp.maximum(draw, 1e-6)).astype(dtype)

  return init


def step_bias_init(
  key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """Biases whose softplus is log-uniform on (0.001, 0.1) (arXiv:2405.21060)."""
  low, high = math.log(1e-3), math.log(1e-1)
  step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  # The inverse of softplus.
  return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)


def shared_step_bias_init(
  key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """`step_bias_init` for `[..., 2, H]`, the same draw in both rows."""
  draw = step_bias_init(key, (*shape[:-2], 1, shape[-1]), dtype)
  return jnp.broadcast_to(draw, shape)
