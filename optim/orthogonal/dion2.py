"""Dion2: only the largest rows of the momentum are orthogonalised."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, assembly, groups, matrices, numerics
from optim.low_rank import projection
from optim.orthogonal import momentum as momentum_lib
from optim.orthogonal import polar, schedules

_ALONG = {None: None, "inputs": -2, "outputs": -1}


class Dion2State(NamedTuple):
  """State of `scale_by_dion2`.

  Attributes:
    momentum: what of the gradients has not been applied yet, a pytree like
      the parameters.
    count: int32, the updates so far.
  """

  momentum: optax.Updates
  count: jax.Array


class _Chosen(NamedTuple):
  """The lines of one stack of matrices that this step updates.

  Attributes:
    axis: -2, lines are rows (an input's weights), or -1, columns.
    indices: [batch..., k], rising.
    lines: [batch..., k, d_out] or [batch..., d_in, k].
  """

  axis: int
  indices: jax.Array
  lines: jax.Array


def _choose(x: jax.Array, fraction: float, along: int | None) -> _Chosen:
  """The lines of the largest sums of magnitudes."""
  d_in, d_out = x.shape[-2:]
  axis = along or (-2 if d_in < d_out else -1)
  count = max(1, math.floor(fraction * x.shape[axis] + 0.5))
  sizes = jnp.sum(jnp.abs(x), axis=-3 - axis)
  indices = jnp.sort(jax.lax.top_k(sizes, count)[1], axis=-1)
  at = jnp.expand_dims(indices, -3 - axis)
  return _Chosen(axis, indices, jnp.take_along_axis(x, at, axis=axis))


def _put(chosen: _Chosen, lines: jax.Array, like: jax.Array) -> jax.Array:
  """Zeros like a matrix, but for `lines` in the places of the chosen."""

  def one(indices, lines):
    zeros = jnp.zeros(like.shape[-2:], lines.dtype)
    at = zeros.at[indices] if chosen.axis == -2 else zeros.at[:, indices]
    return at.set(lines, indices_are_sorted=True, unique_indices=True)

  flat = jax.vmap(one)(
    chosen.indices.reshape(-1, chosen.indices.shape[-1]),
    lines.reshape(-1, *lines.shape[-2:]),
  )
  return flat.reshape(like.shape)


@arguments.checked("Dion2")
def scale_by_dion2(
  *,
  fraction: float = 0.25,
  decay: optax.ScalarOrSchedule = 0.95,
  along: str | None = None,
  coefficients: polar.Coefficients = "polar_express",
  ns_steps: int | None = None,
  ns_dtype: Any = momentum_lib.BFLOAT16,
  shape_scale: str | None = "rms",
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
) -> optax.GradientTransformation:
  """Orthogonalises the largest rows or columns of what is not yet applied.

  Per kernel [d_in, d_out]: M ← M + G; K the share `fraction` of M's rows (or
  columns) with the largest sums of magnitudes; update = s(d_in, d_out) ·
  `newton_schulz`(M[K]) in the places of K and zero elsewhere;
  M[K] ← decay · M[K] (arXiv 2512.16928, Algorithm 1). The work is that share
  of `scale_by_muon`'s or less, and with "rms" the update's root mean square
  is 0.2 sqrt(fraction): the rows that do move have Muon's size.

  Args:
    fraction: of the lines that an update moves, in (0, 1], rounded, at least
      one line.
    decay: of the lines that were applied, a value or a schedule.
    along: "inputs" to choose rows of a kernel (d_in, d_out), "outputs" to
      choose columns; None for the shorter side, of square matrices the
      outputs.
    coefficients: as for `scale_by_muon`.
    ns_steps: as for `scale_by_muon`.
    ns_dtype: as for `scale_by_muon`.
    shape_scale: s, as for `scale_by_muon`, of the whole matrix; the released
      default is "spectral".
    matrix_axes: as for `scale_by_muon`.
    momentum_dtype: of the stored M; None for at least float32.

  Returns:
    A transformation with the state `Dion2State`; updates have the gradients'
    shapes and dtypes and keep their sign.

  Raises:
    ValueError: a bad argument; on init or update, a leaf of fewer than two
      dimensions or `matrix_axes` that do not fit, naming the leaf.
  """
  schedules.check(coefficients, ns_steps)
  for name, value, allowed in (
    ("along", along, _ALONG),
    ("shape_scale", shape_scale, momentum_lib.SHAPE_SCALES),
  ):
    if value not in allowed:
      raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
  scale = momentum_lib.SHAPE_SCALES[shape_scale]

  def init(params):
    matrices.resolve(matrix_axes, params, "Dion2", warn=True)
    return Dion2State(
      numerics.zeros_like(params, momentum_dtype), jnp.zeros((), jnp.int32)
    )

  def update(updates, state):
    grads = numerics.widen(updates)
    layout = projection.Layout.of(grads, matrix_axes, "Dion2")
    sums = [
      m.astype(g.dtype) + g
      for m, g in zip(
        layout.split(state.momentum), layout.split(grads), strict=True
      )
    ]
    chosen = [_choose(x, fraction, _ALONG[along]) for x in sums]
    factors = polar.newton_schulz_list(
      [c.lines for c in chosen],
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
    )
    rate = arguments.value_at(decay, state.count)
    moments, out = [], []
    for x, c, factor in zip(sums, chosen, factors, strict=True):
      moments.append(x - _put(c, (1 - rate) * c.lines, x))
      lines = scale(*x.shape[-2:]) * factor.astype(x.dtype)
      out.append(_put(c, lines, x))
    return numerics.cast_like(layout.join(out), updates), Dion2State(
      numerics.cast_like(layout.join(moments), state.momentum),
      optax.safe_increment(state.count),
    )

  return assembly.direction(init, update)


@arguments.checked()
def dion2(
  learning_rate: optax.ScalarOrSchedule,
  *,
  fraction: float = 0.25,
  decay: optax.ScalarOrSchedule = 0.95,
  along: str | None = None,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  shape_scale: str | None = "rms",
  coefficients: polar.Coefficients = "polar_express",
  ns_steps: int | None = None,
  ns_dtype: Any = momentum_lib.BFLOAT16,
  matrix_axes: matrices.Spec = None,
  momentum_dtype: Any = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """Dion2 for the hidden matrices, another optimizer for everything else.

  Matrices: W ← W - lr (`scale_by_dion2` + weight_decay W).

  Args:
    learning_rate: a value or a schedule.
    fraction: as for `scale_by_dion2`; `optax.inject_hyperparams` must be told
      to leave it alone (`static_args`).
    decay: as for `scale_by_dion2`.
    along: as for `scale_by_dion2`.
    weight_decay: as for `muon`.
    weight_decay_mask: as for `muon`.
    shape_scale: as for `scale_by_dion2`.
    coefficients: as for `scale_by_dion2`.
    ns_steps: as for `scale_by_dion2`.
    ns_dtype: as for `scale_by_dion2`.
    matrix_axes: as for `scale_by_dion2`.
    momentum_dtype: as for `scale_by_dion2`.
    cautious: as for `muon`.
    labels: as for `muon`.
    fallback: as for `muon`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_dion2` and `label_params`.
  """
  return groups.for_matrices(
    scale_by_dion2(
      fraction=fraction,
      decay=decay,
      along=along,
      coefficients=coefficients,
      ns_steps=ns_steps,
      ns_dtype=ns_dtype,
      shape_scale=shape_scale,
      matrix_axes=matrix_axes,
      momentum_dtype=momentum_dtype,
    ),
    learning_rate,
    method="Dion2",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
