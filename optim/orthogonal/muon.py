"""Muon: momentum whose matrices are replaced by their polar factors.

Algorithm of Keller Jordan's Muon (kellerjordan.github.io/posts/muon), with
the update scale and weight decay of arXiv 2502.16982 as the default.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices
from optim.orthogonal import momentum as momentum_lib
from optim.orthogonal import polar


class MuonState(NamedTuple):
  """State of `scale_by_muon`.

  Attributes:
    momentum: the gradients' moving average, a pytree like the parameters.
    count: int32, the updates so far.
  """

  momentum: optax.Updates
  count: jax.Array


@arguments.checked("Muon")
def scale_by_muon(
  *,
  momentum: optax.ScalarOrSchedule = 0.95,
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
  """Replaces each matrix of the momentum by its scaled polar factor.

  With M the moving average and β = `momentum`, per matrix:
  M ← β M + (1 - β) G; U = β M + (1 - β) G (Nesterov) or M;
  update = s(d_in, d_out) · `newton_schulz`(N(U)), N by `normalize`.

  Matrices of one shape, up to transposition, are orthogonalised as one stack
  over all leaves. A leaf of more than two dimensions holds one matrix per
  index of its leading axes (scan-stacked layers, experts) unless
  `matrix_axes` says otherwise.

  Args:
    momentum: β, the moving average's decay, a value or a schedule (a warm-up
      as `optax.linear_schedule(0.85, 0.95, 300)`).
    nesterov: whether to look one step ahead.
    coefficients: the polynomials, as for `newton_schulz`.
    ns_steps: the number of polynomials, as `steps` of `newton_schulz`.
    ns_dtype: the dtype of the matrix products, as for `newton_schulz`.
    ns_form: "direct", "gram" or None, as `form` of `newton_schulz`.
    shape_scale: s, with d_in and d_out the fan-in and fan-out of a kernel
      (in, out): "rms" 0.2 sqrt(max(d_in, d_out)), which gives updates the
      root mean square 0.2 usual for AdamW; "keller" sqrt(max(1, d_out/d_in));
      "spectral" sqrt(d_out/d_in); None for 1.
    normalize: N, the equilibration of MuonEq (arXiv 2603.28254). With rows
      and columns those of a kernel (in, out): "columns" divides each column,
      the weights of one output, by its Euclidean norm over the inputs (that
      paper's R and its default, its weights being (out, in)); "rows" each
      row, the weights of one input, by its norm over the outputs (its C);
      "both" by both norms, each of U itself (its RC). None is Muon. A line of
      zeros stays zero.
    matrix_axes: None for the last two axes, or a pytree like the parameters,
      a prefix of it or a function of them giving one, such as
      `optim.flax_matrix_axes`, whose leaves are None, a `MatrixAxes` or a
      tuple `(in_axes, out_axes)`; other axes are a batch.
    momentum_dtype: of the stored average; None for at least float32.

  Returns:
    A transformation with the state `MuonState`; updates have the gradients'
    shapes and dtypes and keep their sign.

  Raises:
    ValueError: a `momentum` outside [0, 1), an unknown `shape_scale` or
      `normalize`; on init or update, a leaf of fewer than two dimensions or
      `matrix_axes` that do not fit.
  """
  orthogonalize = momentum_lib.Orthogonalizer(
    method="Muon",
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
    return MuonState(*orthogonalize.init(params))

  def update(updates, state, *, partitions):
    step = orthogonalize(updates, *state, partitions=partitions)
    parts = [
      [orthogonalize.scale(x) * x for x in leaf] for leaf in step.factors
    ]
    return step.updates(parts), MuonState(step.momentum, step.count)

  return assembly.direction(init, update, takes_partitions=True)


@arguments.checked()
def muon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: optax.ScalarOrSchedule = 0.95,
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
  """Muon for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (`scale_by_muon` + weight_decay W), so the decay per
  step is lr · weight_decay whatever the shape. The default `shape_scale`
  lets AdamW's learning rate and weight decay be used for both kinds.

  Args:
    learning_rate: a value or a schedule.
    momentum: as for `scale_by_muon`.
    nesterov: as for `scale_by_muon`.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: which parameters decay, whatever their labels: a pytree
      of booleans, or a function of the parameters giving one (which
      `optax.inject_hyperparams` needs in `static_args`), as `mask` of
      `optax.adamw`; None for those not labelled "vector".
    shape_scale: as for `scale_by_muon`.
    coefficients: as for `scale_by_muon`.
    ns_steps: as for `scale_by_muon`.
    ns_dtype: as for `scale_by_muon`.
    ns_form: as for `scale_by_muon`.
    normalize: as for `scale_by_muon`.
    matrix_axes: as for `scale_by_muon`.
    momentum_dtype: as for `scale_by_muon`.
    cautious: whether the matrices decay only where the update shrinks them
      already (`add_cautious_decay`).
    labels: a pytree of labels or a function of the parameters giving one;
      default `label_params`. `optax.inject_hyperparams` takes functions for
      schedules: give it `static_args=("labels",)`. Muon takes the leaves
      labelled "matrix".
    fallback: what takes all the others, learning rate and sign included: a
      transformation, such as `optax.adamw` with decays and weight decay of
      its own; or a rate (None for `learning_rate`), a value or a schedule, of
      AdamW(b1=0.9, b2=0.95, eps=1e-10) with `weight_decay`; or a dictionary
      of these by label, `{"embedding": optax.adam(0.3), "head": 3e-3}`, with
      that AdamW for the labels it leaves out.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_muon` and `label_params`.
  """

  return groups.for_matrices(
    scale_by_muon(
      momentum=momentum,
      nesterov=nesterov,
      coefficients=coefficients,
      ns_steps=ns_steps,
      ns_dtype=ns_dtype,
      ns_form=ns_form,
      normalize=normalize,
      shape_scale=shape_scale,
      matrix_axes=matrix_axes,
      momentum_dtype=momentum_dtype,
    ),
    learning_rate,
    method="Muon",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
