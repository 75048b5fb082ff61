"""Adam in a subspace, and what full-size gradients take over from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optim import numerics


def limited(grads: Sequence[jax.Array]) -> list[jax.Array]:
  """Scales down the matrices with an entry above 2^48 = 2.8e14, to that.

  Their squares would be infinite, and with them the second moment for good.
  """
  return [numerics.limited(g, (-2, -1)) for g in grads]


def adam(
  grads: Sequence[jax.Array],
  moments: tuple[Sequence[jax.Array], Sequence[jax.Array]],
  age: jax.Array,
  *,
  b1: Any,
  b2: Any,
  eps: Any,
  released: bool = False,
) -> tuple[list[jax.Array], tuple[list[jax.Array], list[jax.Array]]]:
  """Adam's directions, bias-corrected.

  Args:
    grads: projected gradients.
    moments: first and second moments, like the gradients.
    age: int32, updates that the moments have seen, this one included.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    released: whether it is added before the bias correction, as in the
      releases, and so is 1 / sqrt(1 - b2^age) times as large.

  Returns:
    Directions, to be subtracted, and the new moments.
  """
  directions, first, second = [], [], []
  for g, m, v in zip(grads, *moments, strict=True):
    b1_, b2_, eps_ = (jnp.asarray(x, g.dtype) for x in (b1, b2, eps))
    m = b1_ * m + (1 - b1_) * g
    v = b2_ * v + (1 - b2_) * g * g
    steps = age.astype(g.dtype)
    corrected = m / (1 - b1_**steps)
    root = jnp.sqrt(v / (1 - b2_**steps))
    if released:
      eps_ = eps_ / jnp.sqrt(1 - b2_**steps)
    directions.append(corrected / (root + eps_))
    first.append(m)
    second.append(v)
  return directions, (first, second)


def norm(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
  """Euclidean norm along axes that are kept, of entries of any size."""
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
  x, _ = numerics.in_range(x, axis)
  return largest * jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True))


def gain(
  direction: jax.Array, low: jax.Array, axis: int | tuple[int, ...]
) -> jax.Array:
  """‖direction‖ / ‖low‖ along axes that are kept; 0 where low is 0.

  Without the absolute constant that releases add to the divisor: multiplied
  with the gradient that `low` is a projection of, a small divisor is matched
  by a small factor.
  """
  below = norm(low, axis)
  above = norm(direction, axis)
  return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)


def correction(b1: Any, b2: Any, age: jax.Array, dtype: Any) -> jax.Array:
  """Adam's bias correction of a step: sqrt(1 - b2^age) / (1 - b1^age)."""
  b1, b2, steps = (jnp.asarray(x, dtype) for x in (b1, b2, age))
  return jnp.sqrt(1 - b2**steps) / (1 - b1**steps)


def limit_growth(
  x: jax.Array, before: jax.Array, limit: Any, corrected: Any = 1
) -> tuple[jax.Array, jax.Array]:
  """Scales matrices whose norm grew by more than a factor `limit`.

  Args:
    x: [batch..., d_in, d_out].
    before: float [batch...], the norms that this returned for the last step;
      0 for none, which limits nothing (the first step, and one after a step
      without gradients).
    limit: γ; None for no limit.
    corrected: a factor that is in x, but not in the norms that are compared.

  Returns:
    The matrices, and their norms after limiting.
  """
  now = norm(x, (-2, -1))[..., 0, 0] / corrected
  if limit is None:
    return x, now
  most = jnp.asarray(limit, x.dtype) * before
  over = (before > 0) & (now > most)
  factor = jnp.where(over, most / jnp.where(over, now, 1), 1)
  return x * factor[..., None, None], jnp.where(over, most, now)
