"""SWAN: gradients with normalised rows, whitened.

arXiv 2412.13148: the operators GradNorm and GradWhitening.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, groups, matrices
from optim.normalized import norms
from optim.orthogonal import polar, schedules


@arguments.checked("SWAN")
def scale_by_swan(
  *,
  center: bool = False,
  rows: str = "outputs",
  coefficients: polar.Coefficients = "exact",
  ns_steps: int | None = None,
  ns_dtype: Any = "float32",
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """Normalises the rows of each matrix, then whitens it.

  GradNorm makes the rows of the m × n gradient have the root mean square 1,
  or with `center` the mean 0 and the standard deviation 1; call that H.
  GradWhitening is (H Hᵀ)^(-1/2) H, the polar factor of H, here by
  `newton_schulz` instead of the paper's coupled iteration for the root; the
  update is that at the Frobenius norm of H, so its root mean square is 1.
  The scale of the gradient does not matter.

  The axes: taken as torch weights (out, in), the paper's rows are the output
  units, whose entries go over the fan-in. In a kernel (in, out) these are the
  columns, so statistics are over axis 0, as SCALE's are. The polar factor
  has no orientation.

  The paper's first version centres, later accounts of it do not, and nor do
  we by default: centring takes a rank where the axis of the statistics is not
  the longer one, and H Hᵀ then has no inverse. With `center` the
  pseudo-inverse is taken, whose result is centred as well.

  Args:
    center: subtract the mean first.
    rows: what the paper's rows are: "outputs", each over its fan-in, or
      "inputs".
    coefficients: the polynomials, as for `newton_schulz`. The default
      whitens to rounding; "polar_express" with bfloat16 costs what Muon does.
    ns_steps: the number of polynomials, as `steps` of `newton_schulz`.
    ns_dtype: the dtype of the matrix products, as for `newton_schulz`.
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation without state; updates have the gradients' dtypes.

  Raises:
    ValueError: other `rows`; on init or update, a leaf of fewer than two
      dimensions or `matrix_axes` that do not fit.
  """
  schedules.check(coefficients, ns_steps)
  over = norms.axis_of_rows(rows)

  def less_mean(x):
    return x - jnp.mean(x, axis=over, keepdims=True) if center else x

  def normalize(x):
    x = norms.rms_normalize(x, over)
    if center:
      # Equal entries leave nothing but the rounding of their mean.
      x = less_mean(x)
      rounding = x.shape[over] * jnp.finfo(x.dtype).eps
      square = jnp.mean(x * x, axis=over, keepdims=True)
      x = norms.rms_normalize(jnp.where(square > rounding**2, x, 0), over)
    return x

  def norm(x):
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))

  def direction(parts, sides):
    normed = [normalize(x) for x in parts]
    factors = polar.newton_schulz_list(
      normed,
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
      partitions=sides,
    )
    out = []
    for x, y in zip(normed, factors, strict=True):
      y = less_mean(y.astype(x.dtype))
      size = jnp.maximum(norm(y), jnp.finfo(x.dtype).tiny)
      out.append(y * (norm(x) / size))
    return out

  return norms.map_matrices(direction, matrix_axes, "SWAN")


@arguments.checked()
def swan(
  learning_rate: optax.ScalarOrSchedule,
  *,
  center: bool = False,
  alpha: float = 0.05,
  rows: str = "outputs",
  coefficients: polar.Coefficients = "exact",
  ns_steps: int | None = None,
  ns_dtype: Any = "float32",
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """SWAN for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (alpha · `scale_by_swan` + weight_decay W), without
  state.

  Args:
    learning_rate: a value or a schedule.
    center: as for `scale_by_swan`.
    alpha: the root mean square of the matrices' updates before the learning
      rate.
    rows: as for `scale_by_swan`.
    coefficients: as for `scale_by_swan`.
    ns_steps: as for `scale_by_swan`.
    ns_dtype: as for `scale_by_swan`.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_muon`.
    cautious: whether the matrices decay only where the update shrinks them
      already (`add_cautious_decay`).
    labels: as for `muon`; the leaves labelled "matrix" are SWAN's.
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_swan` and `label_params`.
  """
  return groups.for_matrices(
    optax.chain(
      scale_by_swan(
        center=center,
        rows=rows,
        coefficients=coefficients,
        ns_steps=ns_steps,
        ns_dtype=ns_dtype,
        matrix_axes=matrix_axes,
      ),
      optax.scale(alpha),
    ),
    learning_rate,
    method="SWAN",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
