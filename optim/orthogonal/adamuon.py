"""AdaMuon: the polar factor of the momentum's signs, divided as Adam would.

arXiv 2507.11005. The state is twice the parameters, as Adam's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices, numerics
from optim.orthogonal import momentum as momentum_lib
from optim.orthogonal import polar


class AdamuonState(NamedTuple):
  """State of `scale_by_adamuon`.

  Attributes:
    momentum: the gradients' moving average, a pytree like the parameters.
    second_moment: the polar factors' moving mean square, the same.
    count: int32, the updates so far.
  """

  momentum: optax.Updates
  second_moment: optax.Updates
  count: jax.Array


def _direction(x: jax.Array, v: jax.Array, eps: float) -> jax.Array:
  """x / (√v + eps), at the Frobenius norm of an orthogonal matrix."""
  y = x / numerics.nonzero(jnp.sqrt(v) + eps)
  norm = jnp.sqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True))
  size = math.sqrt(min(x.shape[-2:]))
  return y * (size / jnp.maximum(norm, jnp.finfo(x.dtype).tiny))


@arguments.checked("AdaMuon")
def scale_by_adamuon(
  *,
  momentum: optax.ScalarOrSchedule = 0.95,
  b2: optax.ScalarOrSchedule = 0.95,
  eps: float = 1e-8,
  nesterov: bool = False,
  coefficients: polar.Coefficients = "polar_express",
  ns_steps: int | None = None,
  ns_dtype: Any = momentum_lib.BFLOAT16,
  ns_form: str | None = None,
  shape_scale: str | None = "rms",
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
) -> optax.GradientTransformation:
  """Elementwise second moments of polar factors, and a fixed update size.

  With M the moving average of the gradients, per matrix [d_in, d_out]:
  O = `newton_schulz`(sign(M)); V ← b2 V + (1 - b2) O²; Ô = O / (√V + eps);
  update = s(d_in, d_out) sqrt(min(d_in, d_out)) Ô / ‖Ô‖, in Frobenius norm:
  with the default s exactly the root mean square 0.2 of the paper, whatever
  the spectrum. A bias correction of V would cancel.

  This is the algorithm of the paper's later versions. Its first version and
  release have no sign and b2 = 0.999; releases look one step ahead.

  Args:
    momentum: as for `scale_by_muon`.
    b2: the decay of V, a value or a schedule; the paper uses one decay for
      both averages.
    eps: added to √V.
    nesterov: whether the sign is of β M + (1 - β) G.
    coefficients: as for `scale_by_muon`.
    ns_steps: as for `scale_by_muon`.
    ns_dtype: as for `scale_by_muon`.
    ns_form: as for `scale_by_muon`.
    shape_scale: as for `scale_by_muon`.
    matrix_axes: as for `scale_by_muon`.
    momentum_dtype: as for `scale_by_muon`; V is in at least float32.

  Returns:
    A transformation with the state `AdamuonState`; updates have the
    gradients' shapes and dtypes and keep their sign.

  Raises:
    ValueError: as `scale_by_muon`; a `b2` outside [0, 1) or a negative `eps`.
  """
  orthogonalize = momentum_lib.Orthogonalizer(
    method="AdaMuon",
    momentum=momentum,
    nesterov=nesterov,
    coefficients=coefficients,
    ns_steps=ns_steps,
    ns_dtype=ns_dtype,
    ns_form=ns_form,
    shape_scale=shape_scale,
    matrix_axes=matrix_axes,
    momentum_dtype=momentum_dtype,
  )

  def init(params):
    average, count = orthogonalize.init(params)
    return AdamuonState(average, numerics.zeros_like(params), count)

  def update(updates, state, *, partitions):
    step = orthogonalize(
      updates,
      state.momentum,
      state.count,
      partitions=partitions,
      before=numerics.sign,
    )
    rate = arguments.value_at(b2, state.count)
    second, parts = [], []
    for v, factors, axes in zip(
      step.treedef.flatten_up_to(state.second_moment),
      step.factors,
      step.axes,
      strict=True,
    ):
      moments = [
        numerics.average(rate, old, jnp.square(x))
        for old, x in zip(matrices.split(v, axes), factors, strict=True)
      ]
      second.append(matrices.join(moments, v.shape, axes).astype(v.dtype))
      parts.append(
        [
          orthogonalize.scale(x) * _direction(x, new.astype(x.dtype), eps)
          for x, new in zip(factors, moments, strict=True)
        ]
      )
    return step.updates(parts), AdamuonState(
      step.momentum, step.treedef.unflatten(second), step.count
    )

  return assembly.direction(init, update, takes_partitions=True)


@arguments.checked()
def adamuon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: optax.ScalarOrSchedule = 0.95,
  b2: optax.ScalarOrSchedule = 0.95,
  eps: float = 1e-8,
  nesterov: bool = False,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  shape_scale: str | None = "rms",
  coefficients: polar.Coefficients = "polar_express",
  ns_steps: int | None = None,
  ns_dtype: Any = momentum_lib.BFLOAT16,
  ns_form: str | None = None,
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """AdaMuon for the hidden matrices, another optimizer for all else.

  Matrices: W ← W - lr (`scale_by_adamuon` + weight_decay W).

  Args:
    learning_rate: a value or a schedule.
    momentum: as for `scale_by_adamuon`.
    b2: as for `scale_by_adamuon`.
    eps: as for `scale_by_adamuon`.
    nesterov: as for `scale_by_adamuon`.
    weight_decay: as for `muon`.
    weight_decay_mask: as for `muon`.
    shape_scale: as for `scale_by_adamuon`.
    coefficients: as for `scale_by_adamuon`.
    ns_steps: as for `scale_by_adamuon`.
    ns_dtype: as for `scale_by_adamuon`.
    ns_form: as for `scale_by_adamuon`.
    matrix_axes: as for `scale_by_adamuon`.
    momentum_dtype: as for `scale_by_adamuon`.
    cautious: as for `muon`.
    labels: as for `muon`.
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_adamuon` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_adamuon(
      momentum=momentum,
      b2=b2,
      eps=eps,
      nesterov=nesterov,
      coefficients=coefficients,
      ns_steps=ns_steps,
      ns_dtype=ns_dtype,
      ns_form=ns_form,
      shape_scale=shape_scale,
      matrix_axes=matrix_axes,
      momentum_dtype=momentum_dtype,
    ),
    learning_rate,
    method="AdaMuon",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
