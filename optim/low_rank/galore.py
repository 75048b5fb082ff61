"""GaLore: Adam on the gradients' projections onto a slowly changing subspace.

Zhao et al., arXiv 2403.03507, Algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices
from optim.low_rank import moments, projection


class GaloreState(NamedTuple):
  """State of `scale_by_galore`, for matrices of sides S <= L and rank r.

  Where a matrix is cut into blocks of unequal size, a field is a tuple of
  trees: of the first blocks, the second, and so on.

  Attributes:
    count: int32, steps taken.
    projector: orthonormal bases, [batch..., d_in, r] or [batch..., r, d_out];
      r S numbers per matrix.
    mu: first moments in the subspaces, [batch..., r, d_out] or
      [batch..., d_in, r]; r L numbers.
    nu: second moments, the same.
    weights: sums of the weights in `mu` and `nu`, for the bias corrections.
  """

  count: jax.Array
  projector: Any
  mu: Any
  nu: Any
  weights: moments.Weights


def check(basis, on_refresh) -> None:
  """Checks what GaLore and Fira have in common."""
  projection.check_choice("basis", basis, projection.BASES)
  projection.check_choice("on_refresh", on_refresh, projection.ON_REFRESH)


def init_state(layout: projection.Layout, rank: int | float) -> GaloreState:
  """Zeros: the first update is one that makes bases."""
  bases, low = [], []
  for name, part in layout.each():
    r = projection.rank_of(rank, name, part.shape)
    bases.append(jnp.zeros(projection.basis_shape(part.shape, r), part.dtype))
    low.append(jnp.zeros(projection.low_shape(part.shape, r), part.dtype))
  return GaloreState(
    count=jnp.zeros((), jnp.int32),
    projector=layout.pack(bases),
    mu=layout.pack(low),
    nu=layout.pack([jnp.zeros_like(x) for x in low]),
    weights=moments.no_weights(low),
  )


class Step(NamedTuple):
  """What `step` gives; lists over the matrices of a layout."""

  grads: list[jax.Array]
  low: list[jax.Array]
  directions: list[jax.Array]
  bases: list[jax.Array]
  state: GaloreState


def step(
  updates: Any,
  layout: projection.Layout,
  state: GaloreState,
  *,
  update_interval: Any,
  basis: str,
  on_refresh: str,
  b1: Any,
  b2: Any,
  eps: Any,
  released: bool = False,
) -> Step:
  """Refreshes the bases if due, projects, and takes Adam's step there."""
  grads = layout.split(updates, layout.unpack(state.mu))
  grads = moments.limited(grads)
  old = layout.unpack(state.projector)
  due = state.count % update_interval == 0

  def draw():
    ranks = [
      projection.rank_in(p, g.shape) for g, p in zip(grads, old, strict=True)
    ]
    return [
      projection.align(new, p, projection.on_inputs(g.shape))
      for new, p, g in zip(
        projection.subspaces(grads, ranks, basis), old, grads, strict=True
      )
    ]

  bases, carried = projection.refresh(
    due,
    draw,
    old,
    (layout.unpack(state.mu), layout.unpack(state.nu)),
    [g.shape for g in grads],
    on_refresh,
  )
  weights, decays = moments.weigh(
    state.weights,
    state.count,
    b1=b1,
    b2=b2,
    restart=due & (on_refresh == "reset"),
  )
  low = [projection.down(p, g) for p, g in zip(bases, grads, strict=True)]
  directions, (mu, nu) = moments.adam(
    low, carried, weights, decays, eps=eps, released=released
  )
  new = GaloreState(
    optax.safe_increment(state.count),
    layout.pack(bases),
    layout.pack(mu),
    layout.pack(nu),
    weights,
  )
  return Step(grads, low, directions, bases, new)


@arguments.checked("GaLore")
def scale_by_galore(
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 0.25,
  basis: str = "eigh",
  on_refresh: str = "keep",
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """Adam in the gradients' leading singular subspaces.

  Per matrix, with P the leading `rank` singular vectors on its smaller side,
  computed from the present gradient every `update_interval` steps:
  update = scale · P Adam(Pᵀ G), or from the right where the fan-out is
  smaller. Adam's entries being about 1, the update's root mean square is
  about scale · sqrt(rank / S).

  State per matrix of sides S <= L: 2 r L + r S numbers. Between refreshes a
  step costs 4 r S L operations; a refresh costs 2 S² L + O(S³) by "eigh" and
  several times that by "svd", for all matrices in one step.

  Signs of basis vectors follow those of the vectors they replace. The release
  leaves them to chance, which the moments that it keeps then see. It also
  adds `eps` before the bias correction, so that its epsilon is 1 / sqrt(1 -
  b2^t) times as large at step t: 32 times at the first, with b2 = 0.999.

  A matrix with a gradient above 2^48 = 2.8e14 is scaled down to that, so that
  its second moment is finite. As with Adam, steps are small until that has
  decayed: for about 2 ln(2^48 / g) / (1 - b2) steps of ordinary gradients g,
  tens of thousands. `optax.apply_if_finite` does not skip such a step, a
  limit on the norm before this (`optax.clip_by_global_norm`) avoids it.

  Args:
    rank: of the subspaces: a whole number, or a share of each matrix's
      smaller side (the paper's models have about a quarter). Under
      `optax.inject_hyperparams` it belongs in `static_args`.
    update_interval: steps from one refresh to the next.
    scale: α.
    basis: "eigh", from the eigenvectors of G Gᵀ: the same subspace within
      rounding; "svd"; or "randomized", a range finder with two power
      iterations, cheaper where the rank is far below a side, and somewhat
      worse.
    on_refresh: what becomes of the moments, which belong to the old basis:
      "keep" as in the paper, "reset" to zero, "rotate" into the new one.
    b1: Adam's first decay, a value or a schedule of the steps so far.
    b2: Adam's second decay, the same.
    eps: Adam's epsilon.
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation with a `GaloreState`; updates have the gradients' shapes
    and dtypes and keep their sign.

  Raises:
    ValueError: an argument out of range; on init or update, a leaf of fewer
      than two dimensions, one with a side smaller than `rank`, or
      `matrix_axes` that do not fit.
  """
  check(basis, on_refresh)

  def init(params):
    layout = projection.Layout.of(params, matrix_axes, "GaLore", warn=True)
    return init_state(layout, rank)

  def update(updates, state):
    layout = projection.Layout.of(updates, matrix_axes, "GaLore")
    now = step(
      updates,
      layout,
      state,
      update_interval=update_interval,
      basis=basis,
      on_refresh=on_refresh,
      b1=b1,
      b2=b2,
      eps=eps,
    )
    out = [
      scale * projection.up(p, x, g.shape)
      for p, x, g in zip(now.bases, now.directions, now.grads, strict=True)
    ]
    return layout.join(out), now.state

  return assembly.direction(init, update)


@arguments.checked()
def galore(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 0.25,
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
  """GaLore for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (`scale_by_galore` + weight_decay W). The paper trains
  at learning_rate=0.01, everything else by Adam at the same rate.

  Args:
    learning_rate: a value or a schedule.
    rank: as for `scale_by_galore`.
    update_interval: as for `scale_by_galore`.
    scale: as for `scale_by_galore`.
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
    labels: as for `muon`; GaLore takes the leaves labelled "matrix".
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_galore` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_galore(
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      basis=basis,
      on_refresh=on_refresh,
      b1=b1,
      b2=b2,
      eps=eps,
      matrix_axes=matrix_axes,
    ),
    learning_rate,
    method="GaLore",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
