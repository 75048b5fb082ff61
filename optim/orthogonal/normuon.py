"""NorMuon: Muon whose updates are evened out over the output neurons.

arXiv 2510.05491. The state is Muon's and one number per output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices, numerics
from optim.orthogonal import momentum as momentum_lib
from optim.orthogonal import polar


class NormuonState(NamedTuple):
  """State of `scale_by_normuon`.

  Attributes:
    momentum: the gradients' moving average, a pytree like the parameters.
    second_moment: the moving average of the polar factors' mean squares over
      the inputs of each output: a pytree like the parameters with the size 1,
      or the number of `input_blocks`, on the fan-in's (first) axis.
    count: int32, the updates so far.
  """

  momentum: optax.Updates
  second_moment: optax.Updates
  count: jax.Array


def _per_output(
  shape: tuple[int, ...], axes: matrices.MatrixAxes
) -> tuple[list[int], matrices.MatrixAxes]:
  """The shape, and `MatrixAxes`, of one number per matrix and output."""
  blocks = axes.input_blocks
  ones = blocks if isinstance(blocks, int) else (1,) * len(blocks)
  number = ones if isinstance(ones, int) else len(ones)
  reduced = [1 if i in axes.inputs else size for i, size in enumerate(shape)]
  reduced[axes.inputs[0]] = number
  return reduced, axes._replace(input_blocks=ones)


def _even_out(x: jax.Array, v: jax.Array, eps: float) -> jax.Array:
  """Divides each column by its √v; the Frobenius norm stays x's."""
  y = x / numerics.nonzero(jnp.sqrt(v) + eps)
  norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
  return y * (norm(x) / jnp.maximum(norm(y), jnp.finfo(x.dtype).tiny))


@arguments.checked("NorMuon")
def scale_by_normuon(
  *,
  momentum: optax.ScalarOrSchedule = 0.95,
  b2: optax.ScalarOrSchedule = 0.95,
  eps: float = 1e-10,
  nesterov: bool = True,
  coefficients: polar.Coefficients = "polar_express",
  ns_steps: int | None = None,
  ns_dtype: Any = momentum_lib.BFLOAT16,
  ns_form: str | None = None,
  shape_scale: str | None = "rms",
  normalize: str | None = None,
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
) -> optax.GradientTransformation:
  """Muon's update with its columns brought to one size over time.

  With O Muon's polar factor of the momentum, per kernel [d_in, d_out]:
  v ← b2 v + (1 - b2) mean over the inputs of O², one number per output;
  Ô = O / (√v + eps); update = s(d_in, d_out) · Ô ‖O‖ / ‖Ô‖, in Frobenius
  norms, which also takes the place of a bias correction. The update's root
  mean square is that of `scale_by_muon` with the same `shape_scale`.

  The paper and microsoft/dion keep v per output as here; modded-nanogpt
  keeps it along the longer side. The released default of s is "keller".

  Args:
    momentum: as for `scale_by_muon`.
    b2: the decay of v, a value or a schedule.
    eps: added to √v.
    nesterov: as for `scale_by_muon`; microsoft/dion does not look ahead.
    coefficients: as for `scale_by_muon`.
    ns_steps: as for `scale_by_muon`.
    ns_dtype: as for `scale_by_muon`.
    ns_form: as for `scale_by_muon`.
    shape_scale: as for `scale_by_muon`.
    normalize: as for `scale_by_muon`.
    matrix_axes: as for `scale_by_muon`.
    momentum_dtype: as for `scale_by_muon`; v is in at least float32.

  Returns:
    A transformation with the state `NormuonState`; updates have the
    gradients' shapes and dtypes and keep their sign.

  Raises:
    ValueError: as `scale_by_muon`; a `b2` outside [0, 1) or a negative `eps`.
  """
  orthogonalize = momentum_lib.Orthogonalizer(
    method="NorMuon",
    momentum=momentum,
    nesterov=nesterov,
    coefficients=coefficients,
    ns_steps=ns_steps,
    ns_dtype=ns_dtype,
    ns_form=ns_form,
    shape_scale=shape_scale,
    normalize=normalize,
    matrix_axes=matrix_axes,
    momentum_dtype=momentum_dtype,
  )

  def init(params):
    average, count = orthogonalize.init(params)
    leaves, treedef = jax.tree.flatten(params)
    second = [
      jnp.zeros(
        _per_output(p.shape, axes)[0], numerics.at_least_float32(p.dtype)
      )
      for p, axes in zip(leaves, orthogonalize.resolve(params), strict=True)
    ]
    return NormuonState(average, treedef.unflatten(second), count)

  def advance(v, factors, axes, shape, rate):
    """The new v of a leaf, and the leaf's directions."""
    shape, axes = _per_output(shape, axes)
    moments, parts = [], []
    for old, x in zip(matrices.split(v, axes), factors, strict=True):
      square = jnp.mean(x * x, axis=-2, keepdims=True)
      new = numerics.average(rate, old, square)
      moments.append(new)
      y = _even_out(x, new.astype(x.dtype), eps)
      parts.append(orthogonalize.scale(x) * y)
    return matrices.join(moments, shape, axes).astype(v.dtype), parts

  def update(updates, state, *, partitions):
    step = orthogonalize(
      updates, state.momentum, state.count, partitions=partitions
    )
    rate = arguments.value_at(b2, state.count)
    second, parts = [], []
    for v, factors, axes, g in zip(
      step.treedef.flatten_up_to(state.second_moment),
      step.factors,
      step.axes,
      step.grads,
      strict=True,
    ):
      new, directions = advance(v, factors, axes, g.shape, rate)
      second.append(new)
      parts.append(directions)
    return step.updates(parts), NormuonState(
      step.momentum, step.treedef.unflatten(second), step.count
    )

  return assembly.direction(init, update, takes_partitions=True)


@arguments.checked()
def normuon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: optax.ScalarOrSchedule = 0.95,
  b2: optax.ScalarOrSchedule = 0.95,
  eps: float = 1e-10,
  nesterov: bool = True,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  shape_scale: str | None = "rms",
  coefficients: polar.Coefficients = "polar_express",
  ns_steps: int | None = None,
  ns_dtype: Any = momentum_lib.BFLOAT16,
  ns_form: str | None = None,
  normalize: str | None = None,
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """NorMuon for the hidden matrices, another optimizer for all else.

  Matrices: W ← W - lr (`scale_by_normuon` + weight_decay W).

  Args:
    learning_rate: a value or a schedule.
    momentum: as for `scale_by_normuon`.
    b2: as for `scale_by_normuon`.
    eps: as for `scale_by_normuon`.
    nesterov: as for `scale_by_normuon`.
    weight_decay: as for `muon`.
    weight_decay_mask: as for `muon`.
    shape_scale: as for `scale_by_normuon`.
    coefficients: as for `scale_by_normuon`.
    ns_steps: as for `scale_by_normuon`.
    ns_dtype: as for `scale_by_normuon`.
    ns_form: as for `scale_by_normuon`.
    normalize: as for `scale_by_normuon`.
    matrix_axes: as for `scale_by_normuon`.
    momentum_dtype: as for `scale_by_normuon`.
    cautious: as for `muon`.
    labels: as for `muon`.
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_normuon` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_normuon(
      momentum=momentum,
      b2=b2,
      eps=eps,
      nesterov=nesterov,
      coefficients=coefficients,
      ns_steps=ns_steps,
      ns_dtype=ns_dtype,
      ns_form=ns_form,
      shape_scale=shape_scale,
      normalize=normalize,
      matrix_axes=matrix_axes,
      momentum_dtype=momentum_dtype,
    ),
    learning_rate,
    method="NorMuon",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
