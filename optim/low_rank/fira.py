"""Fira: GaLore, and the gradient outside the subspace scaled to match.

Chen et al., arXiv 2410.01623, Algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices
from optim.low_rank import galore, moments, projection


class FiraState(NamedTuple):
  """State of `scale_by_fira`.

  Attributes:
    galore: count, bases and moments.
    norm: Frobenius norm of each matrix's last residual update, [batch...];
      of the release without bias correction.
  """

  galore: galore.GaloreState
  norm: Any


@arguments.checked("Fira")
def scale_by_fira(
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 0.25,
  growth_limit: float | None = 1.01,
  released: bool = False,
  basis: str = "eigh",
  on_refresh: str = "keep",
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """GaLore's update plus the scaled residual of the projection.

  Per matrix, with P GaLore's basis, R = Pᵀ G and ψ = Adam(R):
  S_j = (‖ψ_j‖ / ‖R_j‖) (G - P R)_j, the norms over the rank, one per index j
  of the side that is not projected; if ‖S‖ exceeds `growth_limit` times its
  last value, S is scaled down to that; update = scale · P ψ + S. The
  residual's root mean square is about that of Adam in the subspace:
  sqrt(1 - rank / S) times the ratio of the gradient's energies outside and
  inside.

  The release, which the paper's numbers were measured with, differs in three
  ways (`released=True`). It computes the residual from its projection after
  `scale` has gone into that: G - scale · P R, which adds (1 - scale) of the
  projected gradient once more. Its limiter compares norms without the bias
  correction c = sqrt(1 - b2^t) / (1 - b1^t), ‖S‖ / c, and as c falls at first
  it lets S grow by less than γ. It adds `eps` before the bias correction.
  (Its absolute 1e-8 in divisors is left out: `moments.gain`.)

  Huge gradients are scaled down as in `scale_by_galore`, with the same
  memory; the limiter lets the residual grow back by γ per step.

  State per matrix of sides S <= L: 2 r L + r S + 1 numbers.

  Args:
    rank: as for `scale_by_galore`.
    update_interval: as for `scale_by_galore`.
    scale: α, of the part inside the subspace.
    growth_limit: γ; None for no limit.
    released: whether to compute what the release does.
    basis: as for `scale_by_galore`.
    on_refresh: as for `scale_by_galore`.
    b1: Adam's first decay, a value or a schedule of the steps so far.
    b2: Adam's second decay, the same.
    eps: Adam's epsilon.
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation with a `FiraState`; updates have the gradients' shapes
    and dtypes and keep their sign.

  Raises:
    ValueError: as `scale_by_galore`.
  """
  galore.check(basis, on_refresh)

  def init(params):
    layout = projection.Layout.of(params, matrix_axes, "Fira", warn=True)
    norms = [
      jnp.zeros(part.shape[:-2], part.dtype) for _, part in layout.each()
    ]
    return FiraState(galore.init_state(layout, rank), layout.pack(norms))

  def update(updates, state):
    layout = projection.Layout.of(updates, matrix_axes, "Fira")
    now = galore.step(
      updates,
      layout,
      state.galore,
      update_interval=update_interval,
      basis=basis,
      on_refresh=on_refresh,
      b1=b1,
      b2=b2,
      eps=eps,
      released=released,
    )
    weights = now.state.weights
    out, norms = [], []
    for g, r, psi, p, before in zip(
      *now[:4], layout.unpack(state.norm), strict=True
    ):
      inside = projection.up(p, r, g.shape)
      residual = g - (scale * inside if released else inside)
      factor = moments.gain(psi, r, projection.rank_axis(g.shape))
      outside, after = moments.limit_growth(
        factor * residual,
        before,
        growth_limit,
        moments.correction(weights, g.dtype) if released else 1,
      )
      out.append(scale * projection.up(p, psi, g.shape) + outside)
      norms.append(after)
    return layout.join(out), FiraState(now.state, layout.pack(norms))

  return assembly.direction(init, update)


@arguments.checked()
def fira(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 0.25,
  growth_limit: float | None = 1.01,
  released: bool = False,
  basis: str = "eigh",
  on_refresh: str = "keep",
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """Fira for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (`scale_by_fira` + weight_decay W). The paper trains at
  learning_rate=0.01.

  Args:
    learning_rate: a value or a schedule.
    rank: as for `scale_by_galore`.
    update_interval: as for `scale_by_galore`.
    scale: as for `scale_by_fira`.
    growth_limit: as for `scale_by_fira`.
    released: as for `scale_by_fira`.
    basis: as for `scale_by_galore`.
    on_refresh: as for `scale_by_galore`.
    b1: as for `scale_by_galore`.
    b2: as for `scale_by_galore`.
    eps: as for `scale_by_galore`.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_muon`.
    cautious: as for `muon`.
    labels: as for `muon`; Fira takes the leaves labelled "matrix".
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_fira` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_fira(
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      growth_limit=growth_limit,
      released=released,
      basis=basis,
      on_refresh=on_refresh,
      b1=b1,
      b2=b2,
      eps=eps,
      matrix_axes=matrix_axes,
    ),
    learning_rate,
    method="Fira",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
