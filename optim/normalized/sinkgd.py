"""SinkGD: gradients whose rows and columns all have one length.

arXiv 2502.06742, Algorithms 3 and 4.
"""

from __future__ import annotations

import jax
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, groups, matrices
from optim.normalized import norms


@arguments.checked("SinkGD")
def scale_by_sinkgd(
  *,
  iterations: int = 5,
  rows: str = "outputs",
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """Divides rows and columns in turn by their root mean squares.

  With m × n the paper's matrix, X ← sqrt(n) X / (norm of each row), then
  X ← sqrt(m) X / (norm of each column), `iterations` times: dividing by root
  mean squares, so that the update's root mean square is 1 and, ever more
  nearly, that of each row and column. Zero rows and columns stay zero; the
  scale of the gradient does not matter.

  The axes: taken as torch weights (out, in), the paper's rows are the output
  units. In a kernel (in, out) these are columns, so the first division is
  over axis 0, the fan-in, and the last over axis 1; with one iteration the
  order matters, with five hardly.

  Args:
    iterations: how often both are divided, at least 1.
    rows: what the paper's rows are, which come first: "outputs", each over
      its fan-in, or "inputs".
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation without state; updates have the gradients' dtypes.

  Raises:
    ValueError: fewer iterations, other `rows`; on init or update, a leaf of
      fewer than two dimensions or `matrix_axes` that do not fit.
  """
  along = norms.axis_of_rows(rows)

  def alternate(_, x):
    return norms.rms_normalize(norms.rms_normalize(x, along), -3 - along)

  def direction(parts, sides):
    del sides
    return [jax.lax.fori_loop(0, iterations, alternate, x) for x in parts]

  return norms.map_matrices(direction, matrix_axes, "SinkGD")


@arguments.checked()
def sinkgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  iterations: int = 5,
  alpha: float = 0.05,
  rows: str = "outputs",
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """SinkGD for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (alpha · `scale_by_sinkgd` + weight_decay W), without
  state. The published learning rate of 0.02 with alpha 0.05 moves an entry by
  1e-3 a step; it is far too high for the AdamW of the other leaves at small
  batch sizes. Some ports divide by sqrt(m n) once more, and so need a
  learning rate larger by that.

  Args:
    learning_rate: a value or a schedule.
    iterations: as for `scale_by_sinkgd`.
    alpha: the root mean square of the matrices' updates before the learning
      rate.
    rows: as for `scale_by_sinkgd`.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_muon`.
    cautious: whether the matrices decay only where the update shrinks them
      already (`add_cautious_decay`).
    labels: as for `muon`; the leaves labelled "matrix" are SinkGD's.
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_sinkgd` and `label_params`.
  """
  return groups.for_matrices(
    optax.chain(
      scale_by_sinkgd(
        iterations=iterations, rows=rows, matrix_axes=matrix_axes
      ),
      optax.scale(alpha),
    ),
    learning_rate,
    method="SinkGD",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
