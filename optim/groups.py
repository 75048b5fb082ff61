"""From a direction to an optimizer: decay, rates, and who takes the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, numerics

# What takes the leaves that a method leaves over: a transformation, or the
# learning rate of the default one; None is that at the method's own rate.
Fallback = optax.GradientTransformation | optax.ScalarOrSchedule | None


def add_cautious_decay(
  weight_decay: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
  """Adds `weight_decay` · W where the update shrinks W already.

  An entry decays only where update · W >= 0 (the update is still to be
  subtracted), so that decay never undoes a step (arXiv 2510.12402).

  Args:
    weight_decay: a value or a schedule.

  Returns:
    A transformation with the state of `optax.add_decayed_weights`.
  """
  inner = optax.add_decayed_weights(weight_decay)

  def update(updates, state, params=None):
    if params is not None:
      params = jax.tree.map(
        lambda u, p: jnp.where(u * p >= 0, p, jnp.zeros_like(p)),
        updates,
        params,
      )
    return inner.update(updates, state, params)

  return optax.GradientTransformation(inner.init, update)


def descent(
  direction: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: optax.ScalarOrSchedule,
  *,
  cautious: bool = False,
  decayed: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """W ← W - lr (direction(G) + weight_decay W).

  Args:
    direction: maps gradients to what is to be subtracted.
    learning_rate: a value or a schedule.
    weight_decay: decoupled decay, a value or a schedule.
    cautious: whether it is that of `add_cautious_decay`.
    decayed: says of which parameters; None for all.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: a negative rate or decay.
  """
  arguments.check_at_least("learning_rate", learning_rate, 0)
  arguments.check_at_least("weight_decay", weight_decay, 0)
  decay = add_cautious_decay if cautious else optax.add_decayed_weights
  shrink = decay(weight_decay)
  return optax.chain(
    direction,
    shrink if decayed is None else optax.masked(shrink, decayed),
    optax.scale_by_learning_rate(learning_rate),
  )


def is_transformation(fallback: Fallback) -> bool:
  """Whether it is to be used as it is; else `adamw_by_label` serves."""
  return isinstance(fallback, optax.GradientTransformation)


def adamw_by_label(
  fallback: optax.ScalarOrSchedule | None,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: optax.ScalarOrSchedule,
) -> dict[str, optax.GradientTransformationExtraArgs]:
  """AdamW for the leaves left over, "decayed" ones and "vector" ones.

  Args:
    fallback: their learning rate; None for the method's.
    learning_rate: the method's.
    weight_decay: of the decayed ones.

  Raises:
    ValueError: a negative rate.
  """
  rate = learning_rate if fallback is None else fallback
  arguments.check_at_least("fallback", rate, 0)
  adamw = lambda decay: numerics.in_float32(
    optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=decay)
  )
  return {"decayed": adamw(weight_decay), "vector": adamw(0.0)}


def of_floats(
  tx: optax.GradientTransformation, method: str
) -> optax.GradientTransformationExtraArgs:
  """`tx`, which refuses to begin with parameters that are not floating.

  Args:
    tx: any transformation.
    method: its name in the error.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    arguments.check_floating(params, method)
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init, tx.update)


def for_all(
  scale: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  method: str,
  weight_decay: optax.ScalarOrSchedule,
  cautious: bool,
  labels: labels_lib.Labels,
) -> optax.GradientTransformationExtraArgs:
  """An elementwise optimizer: `descent` in at least float32.

  Leaves labelled "vector" do not decay.

  Args:
    scale: maps gradients to directions that are to be subtracted.
    learning_rate: as for `descent`.
    method: the factory's name, for messages.
    weight_decay: as for `descent`.
    cautious: as for `descent`.
    labels: as for the factories.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `descent`; on init, parameters that are not floating, or
      labels that do not fit.
  """

  def decayed(params):
    tree = labels_lib.resolve(labels, params)
    return jax.tree.map(lambda label: label != "vector", tree)

  tx = descent(
    scale, learning_rate, weight_decay, cautious=cautious, decayed=decayed
  )
  return of_floats(numerics.in_float32(tx), method)


def for_matrices(
  matrix: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  method: str,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer whose "matrix" leaves go through `matrix`.

  Matrices: W ← W - lr (matrix(G) + weight_decay W). Everything is computed
  in at least float32, whatever the parameters are in.

  Args:
    matrix: maps the gradients of the matrices to directions that are to be
      subtracted; it sees `optax.MaskedNode` elsewhere.
    learning_rate: a value or a schedule.
    method: the factory's name, for messages.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    cautious: whether the matrices decay as by `add_cautious_decay`.
    labels: as for the factories.
    fallback: the transformation for all other leaves, learning rate and sign
      included; default AdamW(b1=0.9, b2=0.95, eps=1e-10) at the same
      `learning_rate` and `weight_decay`, or at this rate where it is one.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: a negative rate or decay; on init, parameters that are not
      floating, or labels that do not fit.
  """

  def group(params):
    tree = labels_lib.resolve(labels, params)
    if is_transformation(fallback):
      return jax.tree.map(lambda x: x if x == "matrix" else "fallback", tree)
    return jax.tree.map(
      lambda x: x if x in ("matrix", "vector") else "decayed", tree
    )

  matrices = descent(matrix, learning_rate, weight_decay, cautious=cautious)
  transforms = {"matrix": numerics.in_float32(matrices)}
  if is_transformation(fallback):
    transforms["fallback"] = fallback
  else:
    transforms |= adamw_by_label(fallback, learning_rate, weight_decay)
  return of_floats(optax.partition(transforms, group), method)
