"""Muon: momentum whose matrices are replaced by their polar factors.

Algorithm of Keller Jordan's Muon (kellerjordan.github.io/posts/muon), with
the update scale and weight decay of arXiv 2502.16982 as the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import paths
from optim import numerics, orthogonalize

# (d_in, d_out) -> factor on the polar factor.
_SHAPE_SCALES = {
  "rms": lambda d_in, d_out: 0.2 * math.sqrt(max(d_in, d_out)),
  "keller": lambda d_in, d_out: math.sqrt(max(1.0, d_out / d_in)),
  "spectral": lambda d_in, d_out: math.sqrt(d_out / d_in),
  None: lambda d_in, d_out: 1.0,
}

# A dtype and not `jnp.bfloat16`, which is callable:
# `optax.inject_hyperparams` would take that for a schedule.
_BFLOAT16 = jnp.dtype(jnp.bfloat16)

MatrixAxes = Any | Callable[[Any], Any] | None


class MuonState(NamedTuple):
  """State of `scale_by_muon`.

  Attributes:
    momentum: the gradients' moving average, a pytree like the parameters.
  """

  momentum: optax.Updates


def _is_masked(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _leaf_axes(
  matrix_axes: MatrixAxes, tree: Any
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Per leaf of `tree`, which axes are the matrix's inputs and outputs."""
  spec = matrix_axes(tree) if callable(matrix_axes) else matrix_axes
  flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
  if spec is None:
    entries = [None] * len(flat)
  else:
    try:
      entries = treedef.flatten_up_to(spec)
    except ValueError as e:
      raise ValueError(
        "matrix_axes: its tree does not fit the parameters "
        f"{jax.tree.structure(tree)}: {e}"
      ) from e
  out = []
  for (path, leaf), entry in zip(flat, entries, strict=True):
    if _is_masked(leaf):
      continue
    name = paths.leaf_name(path)
    if len(leaf.shape) < 2:
      raise ValueError(
        f"Muon needs matrices; the leaf {name!r} has the shape "
        f"{list(leaf.shape)}: give it another label than 'matrix'"
      )
    out.append(
      _check_axes(name, leaf.ndim, (-2, -1) if entry is None else entry)
    )
  return out


def _check_axes(
  name: str, ndim: int, entry: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  try:
    groups = [(g,) if isinstance(g, int) else tuple(g) for g in entry]
    flat = [axis for group in groups for axis in group]
    ok = len(groups) == 2 and all(groups)
    ok = ok and all(-ndim <= axis < ndim for axis in flat)
    ok = ok and len({axis % ndim for axis in flat}) == len(flat)
  except TypeError:
    ok = False
  if not ok:
    raise ValueError(
      f"matrix_axes of {name!r} must be None or (in_axes, out_axes), each an "
      f"axis or a tuple of axes of its {ndim}, none twice, got {entry!r}"
    )
  inputs, outputs = (tuple(axis % ndim for axis in g) for g in groups)
  return inputs, outputs


def _as_matrix(
  x: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> jax.Array:
  """Moves and merges axes: [batch..., d_in, d_out]."""
  batch = [axis for axis in range(x.ndim) if axis not in inputs + outputs]
  x = jnp.transpose(x, (*batch, *inputs, *outputs))
  shape = x.shape
  end = len(batch) + len(inputs)
  return x.reshape(
    *shape[: len(batch)],
    math.prod(shape[len(batch) : end]),
    math.prod(shape[end:]),
  )


def _from_matrix(
  y: jax.Array,
  shape: tuple[int, ...],
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
) -> jax.Array:
  """Inverse of `_as_matrix` for an array of the given shape."""
  batch = [axis for axis in range(len(shape)) if axis not in inputs + outputs]
  order = (*batch, *inputs, *outputs)
  y = y.reshape([shape[axis] for axis in order])
  return jnp.transpose(y, [order.index(axis) for axis in range(len(shape))])


def scale_by_muon(
  *,
  momentum: float = 0.95,
  nesterov: bool = True,
  coefficients: orthogonalize.Coefficients = "polar_express",
  ns_dtype: Any = _BFLOAT16,
  shape_scale: str | None = "rms",
  matrix_axes: MatrixAxes = None,
  momentum_dtype: Any = None,
) -> optax.GradientTransformation:
  """Replaces each matrix of the momentum by its scaled polar factor.

  With M the moving average and β = `momentum`, per matrix:
  M ← β M + (1 - β) G; U = β M + (1 - β) G (Nesterov) or M;
  update = s(d_in, d_out) · `newton_schulz`(U).

  Matrices of one shape, up to transposition, are orthogonalised as one stack
  over all leaves. A leaf of more than two dimensions holds one matrix per
  index of its leading axes (scan-stacked layers, experts) unless
  `matrix_axes` says otherwise.

  Args:
    momentum: β, the moving average's decay.
    nesterov: whether to look one step ahead.
    coefficients: the polynomials, as for `newton_schulz`.
    ns_dtype: the dtype of the matrix products, as for `newton_schulz`.
    shape_scale: s, with d_in and d_out the fan-in and fan-out of a kernel
      (in, out): "rms" 0.2 sqrt(max(d_in, d_out)), which gives updates the
      root mean square 0.2 usual for AdamW; "keller" sqrt(max(1, d_out/d_in));
      "spectral" sqrt(d_out/d_in); None for 1.
    matrix_axes: None for the last two axes, or a pytree like the parameters
      (or a function of them giving one) whose leaves are None or
      `(in_axes, out_axes)`, each an axis or a tuple of axes to be merged; the
      rest are a batch. A flax attention kernel (embed, heads, head_dim) is
      `(0, (1, 2))` as one matrix and `(0, 2)` head by head.
    momentum_dtype: of the stored average; None for at least float32.

  Returns:
    A transformation with the state `MuonState`; updates have the gradients'
    shapes and dtypes and keep their sign.

  Raises:
    ValueError: an unknown `shape_scale`; on init or update, a leaf of fewer
      than two dimensions or `matrix_axes` that do not fit.
  """
  if shape_scale not in _SHAPE_SCALES:
    raise ValueError(
      f"shape_scale must be one of {tuple(_SHAPE_SCALES)}, got {shape_scale!r}"
    )
  scale = _SHAPE_SCALES[shape_scale]

  def init(params):
    _leaf_axes(matrix_axes, params)
    return MuonState(numerics.zeros_like(params, momentum_dtype))

  def update(updates, state, params=None):
    del params
    grads, treedef = jax.tree.flatten(updates)
    axes = _leaf_axes(matrix_axes, updates)
    wide = numerics.widen(grads)
    averages = [
      momentum * m.astype(g.dtype) + (1 - momentum) * g
      for g, m in zip(wide, treedef.flatten_up_to(state.momentum), strict=True)
    ]
    ahead = averages
    if nesterov:
      ahead = [
        momentum * m + (1 - momentum) * g
        for g, m in zip(wide, averages, strict=True)
      ]
    matrices = [_as_matrix(x, *a) for x, a in zip(ahead, axes, strict=True)]
    polar = orthogonalize.newton_schulz_list(
      matrices, coefficients=coefficients, dtype=ns_dtype
    )
    out = []
    for g, m, o, a in zip(grads, matrices, polar, axes, strict=True):
      o = scale(*m.shape[-2:]) * o.astype(m.dtype)
      out.append(_from_matrix(o, g.shape, *a).astype(g.dtype))
    new_momentum = numerics.cast_like(
      treedef.unflatten(averages), state.momentum
    )
    return treedef.unflatten(out), MuonState(new_momentum)

  return optax.GradientTransformation(init, update)


def muon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: float = 0.95,
  nesterov: bool = True,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  shape_scale: str | None = "rms",
  coefficients: orthogonalize.Coefficients = "polar_express",
  ns_dtype: Any = _BFLOAT16,
  matrix_axes: MatrixAxes = None,
  momentum_dtype: Any = None,
  labels: labels_lib.Labels = None,
  fallback: optax.GradientTransformation | None = None,
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
    shape_scale: as for `scale_by_muon`.
    coefficients: as for `scale_by_muon`.
    ns_dtype: as for `scale_by_muon`.
    matrix_axes: as for `scale_by_muon`.
    momentum_dtype: as for `scale_by_muon`.
    labels: a pytree of labels or a function of the parameters giving one;
      default `label_params`. `optax.inject_hyperparams` takes functions for
      schedules: give it `static_args=("labels",)`. Muon takes the leaves
      labelled "matrix".
    fallback: the transformation for all the others, learning rate and sign
      included; default AdamW(b1=0.9, b2=0.95, eps=1e-10) at the same
      `learning_rate` and `weight_decay`, which are otherwise not used for
      these leaves.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_muon` and `label_params`.
  """

  def group(params):
    tree = labels_lib.resolve(labels, params)
    if fallback is None:
      return jax.tree.map(
        lambda x: x if x in ("matrix", "vector") else "decayed", tree
      )
    return jax.tree.map(lambda x: x if x == "matrix" else "fallback", tree)

  matrix = optax.chain(
    scale_by_muon(
      momentum=momentum,
      nesterov=nesterov,
      coefficients=coefficients,
      ns_dtype=ns_dtype,
      shape_scale=shape_scale,
      matrix_axes=matrix_axes,
      momentum_dtype=momentum_dtype,
    ),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  transforms = {"matrix": numerics.in_float32(matrix)}
  if fallback is not None:
    transforms["fallback"] = fallback
  else:
    for name, decay in (("decayed", weight_decay), ("vector", 0.0)):
      transforms[name] = numerics.in_float32(
        optax.adamw(
          learning_rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=decay
        )
      )
  return optax.partition(transforms, group)
