"""FRUGAL: Adam in a subspace, signs of the gradient everywhere else.

Zmushko et al., arXiv 2411.07837, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices, numerics
from optim.low_rank import moments
from optim.low_rank import projection as projection_lib

_PROJECTIONS = ("columns", "blocks", "random", "svd")
_REST = ("sign", "sgd")


class FrugalState(NamedTuple):
  """State of `scale_by_frugal`.

  Attributes:
    count: int32, steps taken.
    key: uint32 words of the PRNG key that the choices come from.
    projector: "columns": int32 [batch..., k, 1], which indices of the fan-in
      have state; "blocks": int32 [k], which of a leaf's matrices have;
      otherwise orthonormal bases, as in `GaloreState`.
    mu: first moments of what is projected.
    nu: second moments, the same.
    weights: sums of the weights in `mu` and `nu`, for the bias corrections.
  """

  count: jax.Array
  key: jax.Array
  projector: Any
  mu: Any
  nu: Any
  weights: moments.Weights


def _share(density: float, number: int) -> int:
  return max(1, math.floor(density * number + 0.5))


def _shapes(
  kind: str, density: float, name: str, shape: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
  """Shapes of one stack's projector and moments."""
  if kind == "columns":
    k = _share(density, shape[-2])
    return (*shape[:-2], k, 1), (*shape[:-2], k, shape[-1])
  if kind == "blocks":
    number = math.prod(shape[:-2])
    if number < 2:
      raise ValueError(
        f'projection="blocks" divides a stack of matrices; the leaf {name!r} '
        f"holds one of shape {tuple(shape[-2:])}: stack the layers, or use "
        '"columns"'
      )
    k = _share(density, number)
    return (k,), (k, *shape[-2:])
  r = _share(density, min(shape[-2:]))
  return projection_lib.basis_shape(shape, r), projection_lib.low_shape(
    shape, r
  )


def _choose(key: jax.Array, number: int, shape: Sequence[int]) -> jax.Array:
  """int32 of `shape`, k different indices below `number` along the last."""
  scores = jax.random.uniform(key, (*shape[:-1], number), jnp.float32)
  chosen = jax.lax.top_k(scores, shape[-1])[1]
  return jnp.sort(chosen, axis=-1).astype(jnp.int32)


def _draw(kind, key, grads, old) -> list[jax.Array]:
  """New projectors like the old ones."""
  keys = [jax.random.fold_in(key, i) for i in range(len(grads))]
  if kind == "columns":
    return [
      _choose(k, g.shape[-2], p.shape[:-1])[..., None]
      for k, g, p in zip(keys, grads, old, strict=True)
    ]
  if kind == "blocks":
    return [
      _choose(k, math.prod(g.shape[:-2]), p.shape)
      for k, g, p in zip(keys, grads, old, strict=True)
    ]
  ranks = [
    projection_lib.rank_in(p, g.shape) for g, p in zip(grads, old, strict=True)
  ]
  if kind == "svd":
    return projection_lib.subspaces(grads, ranks, "eigh")
  return projection_lib.random_bases(keys, grads, ranks)


def _per_matrix(f, g, *others) -> jax.Array:
  """Maps f over the batch axes of g [batch..., m, n] and arrays like it."""
  for _ in range(g.ndim - 2):
    f = jax.vmap(f)
  return f(g, *others)


def _down(kind: str, p: jax.Array, g: jax.Array) -> jax.Array:
  if kind == "columns":
    return _per_matrix(lambda x, i: x[i[:, 0]], g, p)
  if kind == "blocks":
    return g.reshape(-1, *g.shape[-2:])[p]
  return projection_lib.down(p, g)


def _join(kind, p, g, r, direction, rest) -> jax.Array:
  """The direction in the subspace plus `rest` of the gradient outside."""
  if kind == "columns":
    put = lambda x, i, d: x.at[i[:, 0]].set(d)
    return _per_matrix(put, rest(g), p, direction)
  if kind == "blocks":
    flat = rest(g).reshape(-1, *g.shape[-2:])
    return flat.at[p].set(direction).reshape(g.shape)
  outside = g - projection_lib.up(p, r, g.shape)
  # Where nothing is left but rounding errors they should not become signs.
  noise = 8 * jnp.finfo(g.dtype).eps * moments.norm(g, (-2, -1))
  outside = jnp.where(jnp.abs(outside) > noise, outside, 0)
  return projection_lib.up(p, direction, g.shape) + rest(outside)


@arguments.checked("FRUGAL")
def scale_by_frugal(
  *,
  density: float = 0.25,
  projection: str = "columns",
  update_interval: int = 200,
  rest: str = "sign",
  rest_scale: float = 1.0,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-8,
  seed: int = 0,
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """Splits each gradient: Adam on a share of it, no state for the rest.

  update = back(Adam(down(G))) + rest_scale · sign(G - back(down(G))). Every
  `update_interval` steps the share is chosen anew and the moments start again
  from zero, their bias correction with them. Updates have about Adam's root
  mean square, 1 at most.

  State for a matrix of m × n, sides S <= L: "columns" 2 density m n numbers
  and density · fan-in indices; "blocks" the same of all matrices of a leaf
  together; "random" and "svd" 2 r L + r S with r = density · S.

  Args:
    density: ρ, the share that has state. Under `optax.inject_hyperparams` it
      belongs in `static_args`.
    projection: what the share is of. "columns": of the indices of the fan-in,
      at random (the columns of the transposed kernels of the paper's code);
      "blocks": of the matrices of a leaf, at random, so the leaves must be
      stacks (a state that moved between leaves would change their shapes);
      "random": a random subspace of the smaller side; "svd": the leading
      singular subspace, GaLore's.
    update_interval: steps from one choice to the next.
    rest: "sign" for signSGD, or "sgd" for the gradient itself. In a subspace,
      entries of at most eight rounding errors of the gradient's norm count
      as 0.
    rest_scale: κ, of the rest; the paper has 1 for pre-training and 0.1 for
      fine-tuning.
    b1: Adam's first decay, a value or a schedule of the steps so far.
    b2: Adam's second decay, the same.
    eps: Adam's epsilon.
    seed: of the random choices, which depend on it, the step and the position
      of the matrix among those that the method gets.
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation with a `FrugalState`; updates have the gradients' shapes
    and dtypes and keep their sign.

  Raises:
    ValueError: an argument out of range; on init or update, a leaf of fewer
      than two dimensions, one that holds a single matrix where blocks are
      chosen, or `matrix_axes` that do not fit.
  """
  projection_lib.check_choice("projection", projection, _PROJECTIONS)
  projection_lib.check_choice("rest", rest, _REST)

  def of_rest(g):
    return rest_scale * (numerics.sign(g) if rest == "sign" else g)

  def init(params):
    layout = projection_lib.Layout.of(params, matrix_axes, "FRUGAL", warn=True)
    projectors, low = [], []
    for name, x in layout.each():
      chosen, held = _shapes(projection, density, name, x.shape)
      indices = projection in ("columns", "blocks")
      projectors.append(jnp.zeros(chosen, jnp.int32 if indices else x.dtype))
      low.append(jnp.zeros(held, x.dtype))
    return FrugalState(
      count=jnp.zeros((), jnp.int32),
      key=jax.random.key_data(jax.random.key(seed)),
      projector=layout.pack(projectors),
      mu=layout.pack(low),
      nu=layout.pack([jnp.zeros_like(x) for x in low]),
      weights=moments.no_weights(low),
    )

  def update(updates, state):
    layout = projection_lib.Layout.of(updates, matrix_axes, "FRUGAL")
    old = layout.unpack(state.projector)
    grads = layout.split(updates, layout.unpack(state.mu))
    grads = moments.limited(grads)
    age = state.count % update_interval
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(key, state.count // update_interval)
    chosen, held = projection_lib.refresh(
      age == 0,
      lambda: _draw(projection, key, grads, old),
      old,
      (layout.unpack(state.mu), layout.unpack(state.nu)),
      [g.shape for g in grads],
      "reset",
    )
    low = [_down(projection, p, g) for p, g in zip(chosen, grads, strict=True)]
    weights, decays = moments.weigh(
      state.weights, state.count, b1=b1, b2=b2, restart=age == 0
    )
    directions, (mu, nu) = moments.adam(low, held, weights, decays, eps=eps)
    out = [
      _join(projection, p, g, r, d, of_rest)
      for p, g, r, d in zip(chosen, grads, low, directions, strict=True)
    ]
    new = FrugalState(
      count=optax.safe_increment(state.count),
      key=state.key,
      projector=layout.pack(chosen),
      mu=layout.pack(mu),
      nu=layout.pack(nu),
      weights=weights,
    )
    return layout.join(out), new

  return assembly.direction(init, update)


@arguments.checked()
def frugal(
  learning_rate: optax.ScalarOrSchedule,
  *,
  density: float = 0.25,
  projection: str = "columns",
  update_interval: int = 200,
  rest: str = "sign",
  rest_scale: float = 1.0,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-8,
  seed: int = 0,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """FRUGAL for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (`scale_by_frugal` + weight_decay W). The paper trains
  at learning_rate=1e-3.

  Args:
    learning_rate: a value or a schedule.
    density: as for `scale_by_frugal`.
    projection: as for `scale_by_frugal`.
    update_interval: as for `scale_by_frugal`.
    rest: as for `scale_by_frugal`.
    rest_scale: as for `scale_by_frugal`.
    b1: as for `scale_by_frugal`.
    b2: as for `scale_by_frugal`.
    eps: as for `scale_by_frugal`.
    seed: as for `scale_by_frugal`.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_muon`.
    cautious: as for `muon`.
    labels: as for `muon`; FRUGAL takes the leaves labelled "matrix".
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_frugal` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_frugal(
      density=density,
      projection=projection,
      update_interval=update_interval,
      rest=rest,
      rest_scale=rest_scale,
      b1=b1,
      b2=b2,
      eps=eps,
      seed=seed,
      matrix_axes=matrix_axes,
    ),
    learning_rate,
    method="FRUGAL",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
