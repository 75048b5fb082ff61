"""Next-token cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
