"""Next-token cross-entropy."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_ext import lowering, meshes
from models import ids, layers

# Logits that a device holds at once: 64 MiB in float32.
_MAX_LOGITS = 2**24
# Targets that have no loss, as in nanoGPT and in PyTorch.
IGNORED = (-1, -100)


def cross_entropy(
  logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood and log-partition of each target.

  Args:
    logits: `[..., V]`; taken to float32.
    targets: int `[...]`, 0 to V - 1, or one of `IGNORED`.

  Returns:
    `(nll, log_z)`, both float32 `[...]`, in nats. The nll of an ignored
    target is 0, that of a target out of range NaN.

  Raises:
    ValueError: a target out of range, where its value is known.
  """
  ids.check("targets", targets, logits.shape[-1], IGNORED)
  targets = jnp.asarray(targets)
  nll, log_z = _cross_entropy(logits, targets)
  nll = jnp.where(_ignored(targets), 0.0, nll)
  return jnp.where(_unknown(targets, logits.shape[-1]), jnp.nan, nll), log_z


def _cross_entropy(logits, targets):
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")
  return log_z - chosen[..., 0], log_z


def _ignored(targets):
  if not jnp.issubdtype(targets.dtype, jnp.signedinteger):
    return jnp.zeros(targets.shape, bool)
  return functools.reduce(
    jnp.logical_or, [targets == value for value in IGNORED]
  )


def _unknown(targets, size):
  """Which targets are neither rows of the head nor ignored."""
  outside = (targets < 0) | (targets >= size)
  return outside & ~_ignored(targets)


@meshes.automatic(
  "x",
  "head",
  "targets",
  "weights",
  batch="x",
  out_specs=lambda **_: PartitionSpec(),
)
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
    targets: int `[B, T]`, 0 to V - 1. Targets of -1 or -100 (`IGNORED`) have
      no part in the mean, whatever their weight. Traced ones out of range
      make the loss NaN, unless their weight is 0.
    weights: float `[B, T]`, the weight of each target in the mean, a
      constant to differentiation; None is one each. All zero gives a loss
      of zero.
    z_loss: weight of the mean squared log-partition.

  Returns:
    The float32 mean loss in nats, and metrics that carry no gradient: "nll"
    (the loss without z-loss) and "z_loss" (already weighted).

  Raises:
    ValueError: a target out of range, where its value is known.
  """
  ids.check("targets", targets, head.shape[1], IGNORED)
  targets = jnp.asarray(targets)
  if weights is None:
    weights = jnp.ones(targets.shape, jnp.float32)
  weights = jnp.where(_ignored(targets), 0.0, weights.astype(jnp.float32))
  total = jnp.sum(weights)
  weights = weights / jnp.where(total == 0, 1.0, total)
  unknown = _unknown(targets, head.shape[1]) & (weights != 0)
  weights = jnp.where(unknown, jnp.nan, weights)
  arrays = meshes.vary_alike(x, head, targets, weights)
  loss, nll = _linear_cross_entropy(*arrays, float(z_loss))
  nll = jax.lax.stop_gradient(nll)
  return loss, {"nll": nll, "z_loss": jax.lax.stop_gradient(loss) - nll}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear_cross_entropy(x, head, targets, weights, z_loss):
  arrays = x, head.astype(x.dtype), targets, weights
  return lowering.by_device_count(
    _value, *arrays, z_loss=z_loss, most=_MAX_LOGITS
  )


def _value(devices, x, w, targets, weights, *, z_loss, most):
  """The loss and its part without z-loss."""

  def step(total, x, targets, weights):
    nll, log_z = _cross_entropy(layers.dot(x, w, 2, 0), targets)
    z = z_loss * jnp.sum(weights * jnp.square(log_z))
    nll = jnp.sum(weights * nll)
    return (total[0] + nll + z, total[1] + nll), None

  zero = jnp.zeros((), jnp.float32)
  return _over_slices(
    step,
    (zero, zero),
    (x, targets, weights),
    vocab=w.shape[1],
    most=most * devices,
    devices=devices,
  )[0]


def _forward(x, head, targets, weights, z_loss):
  arrays = x, head.astype(x.dtype), targets, weights
  (loss, nll, dw), dx = lowering.by_device_count(
    _with_gradients, *arrays, z_loss=z_loss, most=_MAX_LOGITS
  )
  return (loss, nll), (dx, dw.astype(head.dtype), targets, weights)


def _with_gradients(devices, x, w, targets, weights, *, z_loss, most):
  """`_value` with the gradient of w, float32, and that of x, in its dtype."""

  def step(carry, x, targets, weights):
    loss, nll_sum, dw = carry
    logits = layers.dot(x, w, 2, 0)
    nll, log_z = _cross_entropy(logits, targets)
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
  return _over_slices(
    step,
    (zero, zero, jnp.zeros(w.shape, jnp.float32)),
    (x, targets, weights),
    vocab=w.shape[1],
    most=most * devices,
    devices=devices,
  )


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


def _over_slices(step, init, arrays, *, vocab, most, devices):
  """Sums `step` over slices of the arrays' axis 1, joining its second outputs.

  A slice has at most `most` logits, over all devices, or one position.

  Where there are several devices, the batch is cut into as many groups, each
  with sums of its own: were they common, every slice would have to add up the
  devices' parts, the head's gradient among them, where now the last does.
  """
  batch, length = arrays[0].shape[:2]
  groups = math.gcd(batch, devices)
  fits = max(1, most // (batch * vocab))
  size = max(d for d in range(1, min(fits, length) + 1) if length % d == 0)

  def run(*arrays):
    if size == length:
      return step(init, *arrays)

    def body(carry, start):
      cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)
      return step(carry, *map(cut, arrays))

    start = meshes.vary_like(init, arrays)
    carry, out = jax.lax.scan(body, start, jnp.arange(0, length, size))
    if out is not None:
      out = jnp.moveaxis(out, 0, 1).reshape(arrays[0].shape)
    return carry, out

  if groups == 1:
    return run(*arrays)
  grouped = [a.reshape(groups, batch // groups, *a.shape[1:]) for a in arrays]
  carry, out = jax.vmap(run)(*grouped)
  total = jax.tree.map(lambda x: jnp.sum(x, axis=0), carry)
  return total, None if out is None else out.reshape(arrays[0].shape)
