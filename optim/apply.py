"""Applying updates to trees that hold quantized parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import quantization
from jaxlib_ext.quantization import scales


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
  """`optax.apply_updates` for arrays, replacement for `QTensor` leaves.

  An update that a wrapper has zeroed, as `optax.MultiSteps` does between its
  steps, leaves a `QTensor` as it was.

  Args:
    params: pytree of arrays and `QTensor`s; None where there is no parameter.
    updates: pytree like `params`: what to add to an array, cast to its dtype;
      the new value of a `QTensor`.

  Returns:
    The new parameters, of the same types and shapes.

  Raises:
    ValueError: the update of a `QTensor` is not one of its shape and format.
  """

  def is_leaf(x):
    return x is None or quantization.is_qtensor(x)

  def apply(param, update):
    if quantization.is_qtensor(param):
      return _replace(param, update)
    return optax.apply_updates(param, update)

  return jax.tree.map(apply, params, updates, is_leaf=is_leaf)


def _replace(
  old: quantization.QTensor, new: quantization.QTensor
) -> quantization.QTensor:
  if (
    not quantization.is_qtensor(new)
    or new.format != old.format
    or new.shape != old.shape
  ):
    raise ValueError(
      f"updates: a QTensor of format {old.format} and shape {old.shape} takes "
      f"another such QTensor (see optim.eco) as its update, got {new!r}"
    )
  zeroed = jnp.all(scales.is_unset(new.scales))
  return jax.tree.map(lambda a, b: jnp.where(zeroed, a, b), old, new)
