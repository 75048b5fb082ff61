"""Applying updates to trees that hold quantized parameters."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import quantization
from jaxlib_ext.quantization import scales

# A number that is not left by what scales, clips or averages updates.
_SEAL = 2.0**20

_REMEDY = (
  "optim.apply_updates puts it in the old one's place; optax.apply_updates and "
  "others that compute with updates cannot"
)


class _Named(type):
  """Whose classes say in JAX's errors about structures what to do."""

  def __repr__(cls) -> str:
    return f"{super().__repr__()}, the new value of a QTensor: {_REMEDY}"


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codes", "scales", "matrix_scale", "seal"),
  meta_fields=("format", "matrix_axes"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Replacement(quantization.QTensor, metaclass=_Named):
  """The update of a `QTensor`: its new value.

  A type of its own, so that whatever adds updates to parameters leaf by leaf
  is refused instead of adding codes to codes.

  Attributes:
    seal: float32, a constant that selecting and zeroing updates keeps or
      makes 0, and computing with them does not.
  """

  seal: jax.Array

  @classmethod
  def of(cls, value: quantization.QTensor) -> Replacement:
    """The update that makes `value` the parameter."""
    return cls(
      value.codes,
      value.scales,
      value.matrix_scale,
      value.format,
      value.matrix_axes,
      seal=jnp.float32(_SEAL),
    )


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
    ValueError: the update of a `QTensor` is not one of its shape, format and
      matrix axes, or has been computed with (scaled, clipped, averaged, added)
      since it was made. Under `jax.jit`, where its values are not known, that
      gives NaN instead.
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
    or new.matrix_axes != old.matrix_axes
  ):
    axes = "the last two" if old.matrix_axes is None else old.matrix_axes
    raise ValueError(
      f"updates: a QTensor of format {old.format}, shape {old.shape} and "
      f"matrix axes {axes} takes another such QTensor (see optim.eco) as its "
      f"update, got {new!r}"
    )
  if new.codes.dtype != old.codes.dtype or new.scales.dtype != old.scales.dtype:
    raise ValueError(_computed_with(f"codes of {new.codes.dtype}"))
  if isinstance(new, Replacement):
    zeroed, values = jnp.all(new.seal == 0), _checked(new)
  else:
    # Of a transformation of the user's own.
    zeroed, values = jnp.all(scales.is_unset(new.scales)), new
  return dataclasses.replace(
    old,
    **{
      field: jax.tree.map(
        lambda a, b: jnp.where(zeroed, a, b),
        getattr(old, field),
        getattr(values, field),
      )
      for field in ("codes", "scales", "matrix_scale")
    },
  )


def _checked(new: Replacement) -> Replacement:
  """`new`, or NaN where it is seen only later that it was computed with."""
  intact = jnp.all((new.seal == 0) | (new.seal == _SEAL))
  if not isinstance(intact, jax.core.Tracer) and not intact:
    raise ValueError(_computed_with(f"a seal of {new.seal}"))
  nan = jnp.asarray(jnp.nan, new.scales.dtype)
  return dataclasses.replace(new, scales=jnp.where(intact, new.scales, nan))


def _computed_with(found: str) -> str:
  return (
    f"updates: the new value of a QTensor was changed, it has {found}: "
    "transformations that compute with updates (scale, clip, average, add) "
    "come before the one that gives it, in an optax.chain"
  )
