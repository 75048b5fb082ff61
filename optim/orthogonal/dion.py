"""Dion: a momentum orthogonalised in a low-rank subspace that it follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import sequencing
from optim import arguments, assembly, groups, matrices, numerics
from optim.low_rank import projection
from optim.orthogonal import momentum as momentum_lib

# Of a sum, for products with it to be in range. No sum of a momentum that was
# limited to this and a finite gradient overflows.
_LARGEST = 2.0**100
_HIGHEST = jax.lax.Precision.HIGHEST


class DionState(NamedTuple):
  """State of `scale_by_dion`: d_in d_out + d_in r numbers per matrix.

  Attributes:
    momentum: what of the gradients has not been applied yet, a pytree like
      the parameters.
    basis: Q, [batch..., d_in, r] per leaf with columns of norm 1; a tuple of
      such trees, by block, where a leaf's blocks differ in size.
    count: int32, the updates so far.
  """

  momentum: optax.Updates
  basis: Any
  count: jax.Array


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision=_HIGHEST)


def _t(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _unit_columns(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Columns divided by their norms, and which had any: zeros stay zeros."""
  tiny = jnp.finfo(x.dtype).tiny
  x, _ = numerics.in_range(x, -2)
  norm = jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
  return x / jnp.maximum(norm, tiny), norm > 0


def orthonormal_columns(x: jax.Array) -> jax.Array:
  """The factor Q of the reduced QR of x [..., n, r], n >= r, R's diagonal >= 0.

  By Cholesky factors of Gram matrices: all work on the long side is matrix
  products, and only [r, r] is factored, where Householder's QR goes through
  the columns one by one. That squares the condition number, which is why the
  columns are brought to norm 1 first (it changes R only; Dion's columns are
  nearly orthogonal once its basis has settled, so that the number is then
  near 1), why the diagonal is shifted by more than rounding (arXiv
  1809.11085), and why it is done three times, each dividing the condition
  number by about 1e2. What the shift leaves, below r · 1e-7, goes by a step
  of Newton-Schulz. Columns that depend on those before to rounding come out
  shorter than 1, zeros as zeros: nothing is divided by them.

  Args:
    x: real floating array of at least float32.

  Returns:
    Array like x.
  """
  eps = jnp.finfo(x.dtype).eps
  r = x.shape[-1]
  eye = jnp.eye(r, dtype=x.dtype)
  x, _ = _unit_columns(x)
  for _ in range(3):
    gram = _dot(_t(x), x) + 2 * r * eps * eye
    lower = jax.lax.linalg.cholesky(gram)
    x = jax.lax.linalg.triangular_solve(
      lower, x, left_side=False, lower=True, transpose_a=True
    )
  return 1.5 * x - 0.5 * _dot(x, _dot(_t(x), x))


def _orthonormal_list(xs: Sequence[jax.Array]) -> list[jax.Array]:
  """`orthonormal_columns` of each, those of one shape as one stack."""
  kinds: dict[Any, list[int]] = {}
  for i, x in enumerate(xs):
    kinds.setdefault((x.shape[-2:], x.dtype), []).append(i)
  out: list[Any] = [None] * len(xs)
  y = None
  for (shape, _), members in kinds.items():
    flat = [xs[i].reshape(-1, *shape) for i in members]
    y = orthonormal_columns(sequencing.after(jnp.concatenate(flat), y))
    start = 0
    for i, part in zip(members, flat, strict=True):
      stop = start + part.shape[0]
      out[i] = y[start:stop].reshape(xs[i].shape)
      start = stop
  return out


@arguments.checked("Dion")
def scale_by_dion(
  *,
  rank: int | float = 0.25,
  momentum: optax.ScalarOrSchedule = 0.95,
  shape_scale: str | None = "rms",
  seed: int = 0,
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
) -> optax.GradientTransformation:
  """One step of power iteration per update, orthonormal factors, feedback.

  Per kernel [d_in, d_out] with μ = `momentum` and a basis Q [d_in, r]:
  B = M + G; P = orthonormal columns (QR) of Bᵀ Q; R = B P;
  M ← B - (1 - μ) R Pᵀ, so that what the rank leaves out stays in M;
  Q ← R with its columns brought to norm 1; update = s(d_in, d_out) · Q Pᵀ
  (arXiv 2504.05295, Algorithm 1, there for weights [d_out, d_in]).

  Q Pᵀ has about r singular values near 1: with "rms" the update's root mean
  square is 0.2 sqrt(r / min(d_in, d_out)). The paper's s is "spectral". A
  column of R that is zero leaves Q's as it was: Q would lose it for good. A
  sum B with entries above 2^100 is scaled down to that, and M forgets it by μ
  per step.

  Args:
    rank: r, a whole number, or a share in (0, 1] of each matrix's smaller
      side.
    momentum: μ, a value or a schedule.
    shape_scale: s, as for `scale_by_muon`.
    seed: of the first Q.
    matrix_axes: as for `scale_by_muon`.
    momentum_dtype: of the stored M; None for at least float32. Q is in at
      least float32.

  Returns:
    A transformation with the state `DionState`; updates have the gradients'
    shapes and dtypes and keep their sign.

  Raises:
    ValueError: a bad argument; on init or update, a leaf of fewer than two
      dimensions or with a side smaller than `rank`, or `matrix_axes` that do
      not fit, naming the leaf.
  """
  if shape_scale not in momentum_lib.SHAPE_SCALES:
    raise ValueError(
      f"shape_scale must be one of {tuple(momentum_lib.SHAPE_SCALES)}, got "
      f"{shape_scale!r}"
    )
  scale = momentum_lib.SHAPE_SCALES[shape_scale]

  def init(params):
    layout = projection.Layout.of(params, matrix_axes, "Dion", warn=True)
    bases = []
    for i, (name, part) in enumerate(layout.each()):
      *batch, d_in, _ = part.shape
      r = projection.rank_of(rank, name, part.shape)
      key = jax.random.fold_in(jax.random.key(seed), i)
      sample = jax.random.normal(key, (*batch, d_in, r), part.dtype)
      bases.append(_unit_columns(sample)[0])
    return DionState(
      numerics.zeros_like(params, momentum_dtype),
      layout.pack(bases),
      jnp.zeros((), jnp.int32),
    )

  def update(updates, state):
    grads = numerics.widen(updates)
    layout = projection.Layout.of(grads, matrix_axes, "Dion")
    old = layout.unpack(state.basis)
    sums = [
      numerics.limited(m.astype(g.dtype) + g, (-2, -1), _LARGEST)
      for m, g in zip(
        layout.split(state.momentum), layout.split(grads, old), strict=True
      )
    ]
    left = _orthonormal_list(
      [_dot(_t(b), q) for b, q in zip(sums, old, strict=True)]
    )
    rate = arguments.value_at(momentum, state.count)
    moments, bases, out = [], [], []
    for b, q, p in zip(sums, old, left, strict=True):
      r = _dot(b, p)
      moments.append(b - (1 - rate) * _dot(r, _t(p)))
      unit, known = _unit_columns(r)
      bases.append(jnp.where(known, unit, q))
      out.append(scale(*b.shape[-2:]) * _dot(unit, _t(p)))
    return numerics.cast_like(layout.join(out), updates), DionState(
      numerics.cast_like(layout.join(moments), state.momentum),
      layout.pack(bases),
      optax.safe_increment(state.count),
    )

  return assembly.direction(init, update)


@arguments.checked()
def dion(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 0.25,
  momentum: optax.ScalarOrSchedule = 0.95,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  shape_scale: str | None = "rms",
  seed: int = 0,
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """Dion for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (`scale_by_dion` + weight_decay W).

  Args:
    learning_rate: a value or a schedule.
    rank: as for `scale_by_dion`; `optax.inject_hyperparams` must be told to
      leave it alone (`static_args`).
    momentum: as for `scale_by_dion`.
    weight_decay: as for `muon`.
    weight_decay_mask: as for `muon`.
    shape_scale: as for `scale_by_dion`.
    seed: as for `scale_by_dion`.
    matrix_axes: as for `scale_by_dion`.
    momentum_dtype: as for `scale_by_dion`.
    cautious: as for `muon`.
    labels: as for `muon`.
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_dion` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_dion(
      rank=rank,
      momentum=momentum,
      shape_scale=shape_scale,
      seed=seed,
      matrix_axes=matrix_axes,
      momentum_dtype=momentum_dtype,
    ),
    learning_rate,
    method="Dion",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
