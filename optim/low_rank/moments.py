"""Adam in a subspace, and what full-size gradients take over from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim import arguments, numerics


class Weights(NamedTuple):
  """Sums of the weights of the gradients in the moments so far, scalars.

  They are what bias corrections divide by: 1 - b1^t with a constant decay, and
  right for any schedule.

  Attributes:
    mu: of the first moments.
    nu: of the second moments.
  """

  mu: jax.Array
  nu: jax.Array


class Decays(NamedTuple):
  """Adam's decays at a step."""

  b1: Any
  b2: Any


def no_weights(parts: Sequence[Any]) -> Weights:
  """Zeros of the widest dtype of the moments, float32 at least."""
  dtype = jnp.result_type(jnp.float32, *(x.dtype for x in parts))
  return Weights(jnp.zeros((), dtype), jnp.zeros((), dtype))


def weigh(
  weights: Weights,
  count: jax.Array,
  *,
  b1: Any,
  b2: Any,
  restart: jax.Array | bool = False,
) -> tuple[Weights, Decays]:
  """The weights after one more gradient, and that step's decays.

  Args:
    weights: those before.
    count: the steps before, for decays that are schedules.
    b1: decay of the first moments.
    b2: decay of the second moments.
    restart: whether the moments begin again from zero.
  """
  decays = Decays(*(arguments.value_at(x, count) for x in (b1, b2)))
  sums = (
    numerics.average(decay, jnp.where(restart, 0, old), 1)
    for decay, old in zip(decays, weights, strict=True)
  )
  return Weights(*sums), decays


def limited(grads: Sequence[jax.Array]) -> list[jax.Array]:
  """Scales down the matrices with an entry above 2^48 = 2.8e14, to that.

  Their squares would be infinite, and with them the second moment for good.
  """
  return [numerics.limited(g, (-2, -1)) for g in grads]


def adam(
  grads: Sequence[jax.Array],
  moments: tuple[Sequence[jax.Array], Sequence[jax.Array]],
  weights: Weights,
  decays: Decays,
  *,
  eps: Any,
  released: bool = False,
) -> tuple[list[jax.Array], tuple[list[jax.Array], list[jax.Array]]]:
  """Adam's directions, bias-corrected.

  Args:
    grads: projected gradients.
    moments: first and second moments, like the gradients.
    weights: of the moments with these gradients, as `weigh` gives.
    decays: as `weigh` gives.
    eps: added to the root of the second moment.
    released: whether it is added before the bias correction, as in the
      releases, and so is 1 / sqrt(1 - b2^age) times as large.

  Returns:
    Directions, to be subtracted, and the new moments.
  """
  directions, first, second = [], [], []
  for g, m, v in zip(grads, *moments, strict=True):
    m = numerics.average(decays.b1, m, g)
    v = numerics.average(decays.b2, v, g * g)
    mu, nu = (x.astype(g.dtype) for x in weights)
    added = jnp.asarray(eps, g.dtype)
    if released:
      added = added / jnp.sqrt(nu)
    root = jnp.sqrt(v / nu) + added
    directions.append((m / mu) / numerics.nonzero(root))
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


def correction(weights: Weights, dtype: Any) -> jax.Array:
  """Adam's bias correction of a step: sqrt(1 - b2^t) / (1 - b1^t)."""
  mu, nu = (x.astype(dtype) for x in weights)
  return jnp.sqrt(nu) / mu


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
