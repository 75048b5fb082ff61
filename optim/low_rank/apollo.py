"""APOLLO: full-size gradients, scaled by Adam's effect on a random projection.

Zhu et al., arXiv 2412.05270, Algorithm 1. Written from the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices
from optim.low_rank import moments, projection

_GRANULARITIES = ("channel", "tensor")


class ApolloState(NamedTuple):
  """State of `scale_by_apollo`, for matrices of sides S <= L and rank r.

  Attributes:
    count: int32, steps taken.
    key: uint32 words of the PRNG key that the projections come from.
    mu: first moments of the projected gradients, [batch..., r, d_out] or
      [batch..., d_in, r]; r L numbers per matrix.
    nu: second moments, the same.
    norm: Frobenius norm of each matrix's last update, [batch...]; of the
      release without bias correction.
    weights: sums of the weights in `mu` and `nu`, for the bias corrections.
  """

  count: jax.Array
  key: jax.Array
  mu: Any
  nu: Any
  norm: Any
  weights: moments.Weights


@arguments.checked("APOLLO")
def scale_by_apollo(
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 1.0,
  granularity: str = "channel",
  growth_limit: float | None = 1.01,
  released: bool = False,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  seed: int = 0,
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """Scales each channel of the gradient as Adam would scale its projection.

  Per matrix of sides S <= L, with P of independent normal entries of variance
  1 / rank along the smaller side, R = Pᵀ G and ψ = Adam(R):
  s_j = ‖ψ_j‖ / ‖R_j‖ over the rank, for each index j of the larger side, or
  one s = ‖ψ‖ / ‖R‖ for the matrix; if ‖s G‖ exceeds `growth_limit` times its
  last value it is scaled down to that; update = sqrt(scale) · s G. Its
  direction within a channel is the present gradient's, and the norm of a
  channel is about sqrt(scale · rank) times the root mean square of Adam's
  entries, against sqrt(S) for Adam: at rank S / 4 half of Adam's root mean
  square, and at rank 1, scale 128 about sqrt(128 / S) of it.

  P is drawn anew every `update_interval` steps and never stored: a step draws
  it from the key again. The moments are kept, though they belong to another
  P then, as in the paper; only their norms are used.

  The release (`released=True`) limits the growth of norms without the bias
  correction c = sqrt(1 - b2^t) / (1 - b1^t), ‖s G‖ / c: as c falls at first,
  it lets the update grow by less than γ. And it adds `eps` before the bias
  correction.

  A matrix with a gradient above 2^48 = 2.8e14 is scaled down to that, so that
  the second moment is finite. As with Adam, steps are small until that has
  decayed, for about 2 ln(2^48 / g) / (1 - b2) steps of ordinary gradients g;
  clip before it (`optax.clip_by_global_norm`) where such gradients occur.

  State per matrix: 2 r L + 1 numbers.

  Args:
    rank: as for `scale_by_galore`.
    update_interval: steps that a projection serves.
    scale: α.
    granularity: "channel" or "tensor".
    growth_limit: γ; None for no limit.
    released: whether to compute what the release does.
    b1: Adam's first decay, a value or a schedule of the steps so far.
    b2: Adam's second decay, the same.
    eps: Adam's epsilon.
    seed: of the projections, which depend on it, the number of the interval
      and the position of the matrix among those that the method gets.
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation with an `ApolloState`; updates have the gradients' shapes
    and dtypes and keep their sign.

  Raises:
    ValueError: as `scale_by_galore`.
  """
  projection.check_choice("granularity", granularity, _GRANULARITIES)

  def init(params):
    layout = projection.Layout.of(params, matrix_axes, "APOLLO", warn=True)
    low = [
      jnp.zeros(
        projection.low_shape(x.shape, projection.rank_of(rank, name, x.shape)),
        x.dtype,
      )
      for name, x in layout.each()
    ]
    norms = [jnp.zeros(x.shape[:-2], x.dtype) for _, x in layout.each()]
    return ApolloState(
      count=jnp.zeros((), jnp.int32),
      key=jax.random.key_data(jax.random.key(seed)),
      mu=layout.pack(low),
      nu=layout.pack([jnp.zeros_like(x) for x in low]),
      norm=layout.pack(norms),
      weights=moments.no_weights(low),
    )

  def update(updates, state):
    layout = projection.Layout.of(updates, matrix_axes, "APOLLO")
    mu, nu = layout.unpack(state.mu), layout.unpack(state.nu)
    grads = moments.limited(layout.split(updates, mu))
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(key, state.count // update_interval)
    low = []
    for i, (g, m) in enumerate(zip(grads, mu, strict=True)):
      r = m.shape[projection.rank_axis(g.shape)]
      shape = projection.basis_shape(g.shape, r)
      p = jax.random.normal(jax.random.fold_in(key, i), shape, g.dtype)
      low.append(projection.down(p, g) / r**0.5)
    weights, decays = moments.weigh(state.weights, state.count, b1=b1, b2=b2)
    directions, (mu, nu) = moments.adam(
      low, (mu, nu), weights, decays, eps=eps, released=released
    )
    out, norms = [], []
    for g, r, psi, before in zip(
      grads, low, directions, layout.unpack(state.norm), strict=True
    ):
      axis = projection.rank_axis(g.shape)
      factor = moments.gain(
        psi, r, (-2, -1) if granularity == "tensor" else axis
      )
      scaled, after = moments.limit_growth(
        factor * g,
        before,
        growth_limit,
        moments.correction(weights, g.dtype) if released else 1,
      )
      out.append(jnp.sqrt(jnp.asarray(scale, g.dtype)) * scaled)
      norms.append(after)
    new = ApolloState(
      optax.safe_increment(state.count),
      state.key,
      layout.pack(mu),
      layout.pack(nu),
      layout.pack(norms),
      weights,
    )
    return layout.join(out), new

  return assembly.direction(init, update)


@arguments.checked()
def apollo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 1.0,
  granularity: str = "channel",
  growth_limit: float | None = 1.01,
  released: bool = False,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  seed: int = 0,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """APOLLO for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (`scale_by_apollo` + weight_decay W). The paper trains
  at learning_rate=0.01.

  Args:
    learning_rate: a value or a schedule.
    rank: as for `scale_by_galore`.
    update_interval: as for `scale_by_apollo`.
    scale: as for `scale_by_apollo`.
    granularity: as for `scale_by_apollo`.
    growth_limit: as for `scale_by_apollo`.
    released: as for `scale_by_apollo`.
    b1: as for `scale_by_apollo`.
    b2: as for `scale_by_apollo`.
    eps: as for `scale_by_apollo`.
    seed: as for `scale_by_apollo`.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_muon`.
    cautious: as for `muon`.
    labels: as for `muon`; APOLLO takes the leaves labelled "matrix".
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_apollo` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_apollo(
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      granularity=granularity,
      growth_limit=growth_limit,
      released=released,
      b1=b1,
      b2=b2,
      eps=eps,
      seed=seed,
      matrix_axes=matrix_axes,
    ),
    learning_rate,
    method="APOLLO",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )


@arguments.checked()
def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  *,
  update_interval: int = 200,
  scale: float = 128.0,
  growth_limit: float | None = 1.01,
  released: bool = False,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  seed: int = 0,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """APOLLO-Mini: `apollo` at rank 1 with one factor per matrix.

  Two numbers per index of a matrix's larger side are its state.

  Args:
    learning_rate: a value or a schedule.
    update_interval: as for `scale_by_apollo`.
    scale: α; the paper has larger values for larger models.
    growth_limit: as for `scale_by_apollo`.
    released: as for `scale_by_apollo`.
    b1: as for `scale_by_apollo`.
    b2: as for `scale_by_apollo`.
    eps: as for `scale_by_apollo`.
    seed: as for `scale_by_apollo`.
    weight_decay: as for `apollo`.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_muon`.
    cautious: as for `muon`.
    labels: as for `apollo`.
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `apollo`.
  """
  return apollo(
    learning_rate,
    rank=1,
    granularity="tensor",
    update_interval=update_interval,
    scale=scale,
    growth_limit=growth_limit,
    released=released,
    b1=b1,
    b2=b2,
    eps=eps,
    seed=seed,
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    matrix_axes=matrix_axes,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
