"""Next-token cross-entropy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxlib_ext import meshes
from models import layers

# Logits held at once: 64 MiB in float32.
_MAX_LOGITS = 2**24


def cross_entropy(
  logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood and log-partition of each target.

  Args:
    logits: `[..., V]`; taken to float32.
    targets: int `[...]`.

  Returns:
    `(nll, log_z)`, both float32 `[...]`, in nats.
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return log_z - chosen, log_z


def linear_cross_entropy(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  weights: jax.Array | None = None,
  z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of `x @ head` without holding all logits at once.

  The gradients are computed beside the loss, a slice of the sequence at a
  time, so the logits are computed once and none are kept for the backward
  pass. Reverse mode, and forward over reverse, differentiate it.

  Args:
    x: `[B, T, D]`, float32 or bfloat16, the dtype of the matmul operands.
    head: `[D, V]` of any float dtype.
    targets: int `[B, T]`.
    weights: float `[B, T]`, the weight of each target in the mean, a
      constant to differentiation; None is one each. All zero gives a loss
      of zero.
    z_loss: weight of the mean squared log-partition.

  Returns:
    The float32 mean loss in nats, and metrics that carry no gradient: "nll"
    (the loss without z-loss) and "z_loss" (already weighted).
  """
  if weights is None:
    weights = jnp.full(targets.shape, 1.0 / targets.size, jnp.float32)
  else:
    weights = weights.astype(jnp.float32)
    total = jnp.sum(weights)
    weights = weights / jnp.where(total == 0, 1.0, total)
  arrays = meshes.vary_alike(x, head, targets, weights)
  loss, nll = _linear_cross_entropy(*arrays, float(z_loss))
  nll = jax.lax.stop_gradient(nll)
  return loss, {"nll": nll, "z_loss": jax.lax.stop_gradient(loss) - nll}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear_cross_entropy(x, head, targets, weights, z_loss):
  w = head.astype(x.dtype)

  def step(total, piece):
    x, targets, weights = piece
    nll, log_z = cross_entropy(layers.dot(x, w, 2, 0), targets)
    z = z_loss * jnp.sum(weights * jnp.square(log_z))
    nll = jnp.sum(weights * nll)
    return (total[0] + nll + z, total[1] + nll), None

  zero = jnp.zeros((), jnp.float32)
  return _over_slices(step, (zero, zero), (x, targets, weights), w)[0]


def _forward(x, head, targets, weights, z_loss):
  w = head.astype(x.dtype)

  def step(carry, piece):
    loss, nll_sum, dw = carry
    x, targets, weights = piece
    logits = layers.dot(x, w, 2, 0)
    nll, log_z = cross_entropy(logits, targets)
    nll = jnp.sum(weights * nll)
    z = z_loss * jnp.sum(weights * jnp.square(log_z))
    scale = weights * (1.0 + 2.0 * z_loss * log_z)
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    dlogits = scale[..., None] * jnp.exp(logits - log_z[..., None])
    dlogits = dlogits - jnp.where(hit, weights[..., None], 0.0)
    dlogits = dlogits.astype(x.dtype)
    dw = dw + layers.dot_rows(x, dlogits)
    dx = layers.dot(dlogits, w, 2, 1)
    return (loss + nll + z, nll_sum + nll, dw), dx.astype(x.dtype)

  zero = jnp.zeros((), jnp.float32)
  init = (zero, zero, jnp.zeros(w.shape, jnp.float32))
  (loss, nll, dw), dx = _over_slices(step, init, (x, targets, weights), w)
  return (loss, nll), (dx, dw.astype(head.dtype), targets, weights)


def _backward(z_loss, residuals, cotangents):
  del z_loss
  dx, dw, targets, weights = residuals
  g = cotangents[0]
  return (
    (g * dx).astype(dx.dtype),
    (g * dw).astype(dw.dtype),
    None,
    jnp.zeros_like(weights),
  )


_linear_cross_entropy.defvjp(_forward, _backward)


def _over_slices(step, init, arrays, w):
  """Scans `step` over slices of axis 1 of `arrays`, joining its outputs."""
  batch, length = arrays[0].shape[:2]
  fits = max(1, _MAX_LOGITS // (batch * w.shape[1]))
  size = max(d for d in range(1, min(fits, length) + 1) if length % d == 0)
  if size == length:
    return step(init, arrays)

  def body(carry, start):
    piece = [
      jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in arrays
    ]
    return step(carry, piece)

  init = meshes.vary_like(init, arrays)
  carry, out = jax.lax.scan(body, init, jnp.arange(0, length, size))
  if out is not None:
    out = jnp.moveaxis(out, 0, 1).reshape(arrays[0].shape)
  return carry, out
