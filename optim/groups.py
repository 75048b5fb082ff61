"""From a direction to an optimizer: decay, rates, and who takes the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import quantization, trees
from optim import arguments, numerics

# What takes the leaves that a method leaves over: a transformation, the
# learning rate of the default one, or one of these for each label that is not
# "matrix"; None is the default one at the method's own rate.
_Other = optax.GradientTransformation | optax.ScalarOrSchedule | None
Fallback = _Other | Mapping[str, _Other]

# Which parameters decay: a pytree of booleans, or a function of the parameters
# giving one.
Mask = Any | Callable[[Any], Any] | None


@arguments.checked()
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


def resolve_mask(mask: Mask, params: Any) -> Any:
  """Turns a factory's `weight_decay_mask=` into a checked pytree.

  Args:
    mask: a pytree of booleans, a prefix of the parameters' tree or like it,
      or a function of the parameters giving one.
    params: the parameters, or what is like them.

  Returns:
    A pytree like `params`, one boolean per parameter.

  Raises:
    ValueError: it does not fit, or holds something else.
  """
  tree = trees.given(mask, params)
  full = trees.spread(
    "weight_decay_mask", tree, params, is_param=labels_lib.is_param
  )
  for x in jax.tree.leaves(full):
    if not isinstance(x, bool | np.bool_):
      raise ValueError(f"weight_decay_mask must hold True and False, got {x!r}")
  return full


def resolve_quantized_mask(mask: Mask, params: Any) -> Any:
  """`resolve_mask` of parameters seen as if they were not quantized.

  None stays None.
  """
  if mask is None:
    return None
  view = jax.eval_shape(quantization.dequantize_tree, params)
  return resolve_mask(mask, view)


def descent(
  direction: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: optax.ScalarOrSchedule,
  *,
  cautious: bool = False,
  mask: Mask = None,
) -> optax.GradientTransformation:
  """W ← W - lr (direction(G) + weight_decay W).

  Args:
    direction: maps gradients to what is to be subtracted.
    learning_rate: a value or a schedule.
    weight_decay: decoupled decay, a value or a schedule.
    cautious: whether it is that of `add_cautious_decay`.
    mask: says of which parameters, as for `resolve_mask`; None for all.

  Returns:
    The transformation; updates are to be added to the parameters.
  """
  decay = add_cautious_decay if cautious else optax.add_decayed_weights
  shrink = decay(weight_decay)
  if mask is not None:
    shrink = optax.masked(shrink, functools.partial(resolve_mask, mask))
  return optax.chain(
    direction, shrink, optax.scale_by_learning_rate(learning_rate)
  )


def is_transformation(fallback: Fallback) -> bool:
  """Whether it is to be used as it is, for all the leaves left over."""
  return isinstance(fallback, optax.GradientTransformation)


class Others(NamedTuple):
  """Who takes the leaves that a method leaves over.

  Attributes:
    transforms: transformations by group.
    group: the group of a label that is not "matrix".
  """

  transforms: dict[str, optax.GradientTransformation]
  group: Callable[[str], str]


def others(
  fallback: Fallback,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: optax.ScalarOrSchedule,
  mask: Any = None,
) -> Others:
  """Transformations for the leaves left over, AdamW where none is given.

  Args:
    fallback: as for the factories.
    learning_rate: the method's.
    weight_decay: of AdamW, on leaves not labelled "vector".
    mask: instead, of the leaves that it says, a pytree as from
      `resolve_mask`.
  """

  def given(rate, label):
    if is_transformation(rate):
      return rate
    decay = 0.0 if label == "vector" and mask is None else weight_decay
    rate = learning_rate if rate is None else rate
    tx = optax.adamw(
      rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=decay, mask=mask
    )
    return numerics.in_float32(tx)

  if is_transformation(fallback):
    return Others({"fallback": fallback}, lambda label: "fallback")
  if isinstance(fallback, Mapping):
    kinds = [x for x in labels_lib.LABELS if x != "matrix"]
    return Others({x: given(fallback.get(x), x) for x in kinds}, lambda x: x)
  kinds = {"vector": "vector"}
  return Others(
    {x: given(fallback, x) for x in ("decayed", "vector")},
    lambda label: kinds.get(label, "decayed"),
  )


def for_all(
  scale: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  method: str,
  weight_decay: optax.ScalarOrSchedule,
  weight_decay_mask: Mask,
  cautious: bool,
  labels: labels_lib.Labels,
) -> optax.GradientTransformationExtraArgs:
  """An elementwise optimizer: `descent` in at least float32.

  Args:
    scale: maps gradients to directions that are to be subtracted.
    learning_rate: as for `descent`.
    method: the factory's name, for messages.
    weight_decay: as for `descent`.
    weight_decay_mask: what decays; None for leaves not labelled "vector".
    cautious: as for `descent`.
    labels: as for the factories.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: on init, parameters that are not floating, or labels or a mask
      that do not fit.
  """

  def not_vectors(params):
    tree = labels_lib.resolve(labels, params)
    return jax.tree.map(lambda label: label != "vector", tree)

  mask = not_vectors if weight_decay_mask is None else weight_decay_mask
  tx = descent(scale, learning_rate, weight_decay, cautious=cautious, mask=mask)
  return arguments.of_floats(numerics.in_float32(tx), method)


def of_masks(
  build: Callable[[Any], optax.GradientTransformation], mask: Mask
) -> optax.GradientTransformationExtraArgs:
  """A transformation that is built for the mask of the tree it gets.

  Args:
    build: from a pytree of booleans, or None, to a transformation.
    mask: as for `resolve_mask`, or None.
  """
  if mask is None:
    return optax.with_extra_args_support(build(None))
  of = lambda tree: optax.with_extra_args_support(
    build(resolve_mask(mask, tree))
  )

  def update(grads, state, params=None, **extra_args):
    return of(grads).update(grads, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(
    lambda params: of(params).init(params), update
  )


def for_matrices(
  matrix: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  method: str,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: Mask = None,
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
    weight_decay: decoupled decay, a value or a schedule.
    weight_decay_mask: what decays; None for leaves not labelled "vector".
    cautious: whether the matrices decay as by `add_cautious_decay`.
    labels: as for the factories.
    fallback: for all other leaves, learning rate and sign included: a
      transformation; or the rate, None for `learning_rate`, of
      AdamW(b1=0.9, b2=0.95, eps=1e-10) with `weight_decay`; or a dictionary of
      these by label.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: on init, parameters that are not floating, or labels or a mask
      that do not fit.
  """

  def build(mask):
    rest = others(fallback, learning_rate, weight_decay, mask)
    matrices = descent(
      matrix, learning_rate, weight_decay, cautious=cautious, mask=mask
    )

    def group(params):
      tree = labels_lib.resolve(labels, params)
      return jax.tree.map(lambda x: x if x == "matrix" else rest.group(x), tree)

    transforms = {"matrix": numerics.in_float32(matrices), **rest.transforms}
    return optax.partition(transforms, group)

  return arguments.of_floats(of_masks(build, weight_decay_mask), method)
