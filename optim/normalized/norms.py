"""What the normalising methods have in common.

For a kernel (in, out) the columns are the output units and a column's entries
go over the fan-in; a torch weight (out, in) has them as its rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import paths
from optim import arguments, assembly, matrices, numerics
from optim.orthogonal import polar, schedules

# XLA:CPU sums columns a few at a time, down all rows: where rows are long, each
# entry is then on a page of its own, and that runs at a twentieth of the
# memory's rate (512 x 32000 float32: 57 ms against 2.6 ms on two cores).
_LONG_ROW_BYTES = 1 << 15


def _mean_square(x: jax.Array, over: int) -> jax.Array:
  """Of x [..., m, n] or [m] over an axis, which stays with length 1."""
  plain = lambda x: jnp.mean(x * x, axis=over, keepdims=True)
  if over != -2 or x.shape[-1] * x.dtype.itemsize < _LONG_ROW_BYTES:
    return plain(x)

  def by_rows(x):
    y = x * x
    while (m := y.shape[-2]) >= 8:
      *parts, rest = jnp.split(y, [m // 8 * i for i in range(1, 9)], axis=-2)
      # Else the sums would be made one again.
      y = jax.lax.optimization_barrier(functools.reduce(jnp.add, parts))
      y = jnp.concatenate([y, rest], axis=-2)
    return jnp.sum(y, axis=-2, keepdims=True) / x.shape[-2]

  return jax.lax.platform_dependent(x, cpu=by_rows, default=plain)


def _rms_factors(
  xs: Sequence[jax.Array], overs: Sequence[int], eps: float | None
) -> list[tuple[jax.Array, jax.Array]]:
  """What to multiply arrays by, in turn, to divide them by max(rms, eps).

  One look at the gradients serves while their squares are in range; one
  branch for all of them divides by their largest magnitudes first.
  """

  def least(x):
    tiny = jnp.finfo(x.dtype).tiny
    return tiny if eps is None else jnp.maximum(jnp.asarray(eps, x.dtype), tiny)

  def holds(x, square):
    # What the squares of smaller entries lose is then below rounding.
    limits = jnp.finfo(x.dtype)
    floor = jnp.maximum(square, jnp.asarray(least(x), x.dtype) ** 2)
    return jnp.all((floor >= limits.tiny / limits.eps) & (square < jnp.inf))

  def direct():
    return [
      (jnp.ones_like(s), 1 / jnp.maximum(jnp.sqrt(s), least(x)))
      for x, s in zip(xs, squares, strict=True)
    ]

  def rescaled():
    out = []
    for x, over in zip(xs, overs, strict=True):
      y, root = numerics.in_range(x, over, least(x))
      rms = jnp.sqrt(_mean_square(y, over))
      out.append((root, root / jnp.maximum(rms, (least(x) * root) * root)))
    return out

  squares = [_mean_square(x, over) for x, over in zip(xs, overs, strict=True)]
  if not squares:
    return []
  every = [holds(x, s) for x, s in zip(xs, squares, strict=True)]
  return jax.lax.cond(
    functools.reduce(jnp.logical_and, every), direct, rescaled
  )


def rms_normalize(
  x: jax.Array, over: int, eps: float | None = None
) -> jax.Array:
  """Divides x by max(its root mean square over an axis, eps).

  Args:
    x: floating array of at least one dimension, in at least float32.
    over: the axis of the mean, -1 or -2.
    eps: the smallest divisor; None for the smallest normal number, so that
      all but zeros become of root mean square 1.

  Returns:
    Array of x's shape and dtype; zeros where x is zero along the whole axis.
  """
  ((first, second),) = _rms_factors([x], [over], eps)
  return (x * first) * second


@arguments.checked("scale_by_column_norm")
def scale_by_column_norm(
  *, axis: int = 0, eps: float = 1e-8, matrix_axes: matrices.Spec = None
) -> optax.GradientTransformation:
  """Divides each column of each matrix by max(its root mean square, eps).

  The update's root mean square is 1, but for columns of less than `eps`.

  Args:
    axis: the axis the mean is over, counted within the last two dimensions:
      0 (or -2) is the fan-in of a kernel (in, out) and the vocabulary of an
      embedding (vocabulary, features), 1 (or -1) is the other: it divides
      rows. Leading dimensions (scan-stacked layers, experts) are a batch. A
      vector is one column: the mean is over all of it.
    eps: the smallest divisor. A column of zeros stays zero.
    matrix_axes: as for `scale_by_muon`, of the leaves of two and more
      dimensions: the mean is then over all axes of a side.

  Returns:
    A transformation without state; updates have the gradients' dtypes.

  Raises:
    ValueError: an `axis` outside a matrix; on init or update, `matrix_axes`
      that do not fit; on update, a leaf that is a scalar.
  """
  if axis not in (0, 1, -1, -2):
    raise ValueError(
      f"axis must be 0, 1, -1 or -2, an axis of a matrix, got {axis!r}"
    )

  def resolve(tree, *, warn=False):
    """Axes per leaf; none of a vector, which is one column."""
    is_matrix = lambda x: len(x.shape) >= 2
    masked = jax.tree.map(
      lambda x: x if is_matrix(x) else optax.MaskedNode(), tree
    )
    method = "column normalisation"
    axes = iter(matrices.resolve(matrix_axes, masked, method, warn=warn))
    return [next(axes) if is_matrix(x) else None for x in jax.tree.leaves(tree)]

  def init(params):
    resolve(params, warn=True)
    return optax.EmptyState()

  def update(updates, state):
    found, treedef = jax.tree_util.tree_flatten_with_path(updates)
    for path, g in found:
      if g.ndim == 0:
        raise ValueError(
          f"a scalar has no columns: give the leaf {paths.leaf_name(path)!r} "
          "another label"
        )
    grads, axes = [g for _, g in found], resolve(updates)
    parts = [
      [g] if a is None else matrices.split(g, a)
      for g, a in zip(numerics.widen(grads), axes, strict=True)
    ]
    flat = [x for leaf in parts for x in leaf]
    overs = [-1 if x.ndim == 1 else axis % 2 - 2 for x in flat]
    factors = _rms_factors(flat, overs, eps)
    scaled = iter(
      (x * first) * second
      for x, (first, second) in zip(flat, factors, strict=True)
    )
    out = []
    for g, leaf, a in zip(grads, parts, axes, strict=True):
      new = [next(scaled) for _ in leaf]
      whole = new[0] if a is None else matrices.join(new, g.shape, a)
      out.append(whole.astype(g.dtype))
    return treedef.unflatten(out), state

  return assembly.direction(init, update)


@arguments.checked("scale_by_spectral_norm")
def scale_by_spectral_norm(
  *,
  coefficients: polar.Coefficients = "polar_express",
  ns_steps: int | None = None,
  ns_dtype: Any = "bfloat16",
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """Replaces each matrix by sqrt(max(d_in, d_out)) times its polar factor.

  The steepest direction in the spectral norm (arXiv 2409.20325), which is
  Muon without momentum. The factor U Vᵀ of a matrix of full rank has the root
  mean square 1 / sqrt(max(d_in, d_out)), so the update's is 1, up to what
  `newton_schulz` says of its singular values; at rank r it is
  sqrt(r / min(d_in, d_out)).

  Args:
    coefficients: the polynomials, as for `newton_schulz`.
    ns_steps: the number of polynomials, as `steps` of `newton_schulz`.
    ns_dtype: the dtype of the matrix products, as for `newton_schulz`.
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation without state; updates have the gradients' dtypes.

  Raises:
    ValueError: on update, a leaf of fewer than two dimensions or
      `matrix_axes` that do not fit.
  """

  schedules.check(coefficients, ns_steps)

  def direction(parts, sides):
    factors = polar.newton_schulz_list(
      parts,
      coefficients=coefficients,
      steps=ns_steps,
      dtype=ns_dtype,
      partitions=sides,
    )
    return [
      math.sqrt(max(x.shape[-2:])) * y.astype(x.dtype)
      for x, y in zip(parts, factors, strict=True)
    ]

  return map_matrices(direction, matrix_axes, "spectral normalisation")


def map_matrices(
  direction: Callable[[list[jax.Array], list[Any]], list[jax.Array]],
  matrix_axes: matrices.Spec,
  method: str,
) -> optax.GradientTransformation:
  """A transformation without state that sees all matrices at once.

  Args:
    direction: maps a list of arrays [batch..., d_in, d_out], in at least
      float32, and one of `matrices.sides` to a list of arrays of the same
      shapes.
    matrix_axes: as for `scale_by_muon`.
    method: the optimizer's name, for messages.

  Returns:
    The transformation; updates have the gradients' dtypes.
  """

  def init(params):
    matrices.resolve(matrix_axes, params, method, warn=True)
    return optax.EmptyState()

  def update(updates, state, *, partitions):
    grads, treedef = jax.tree.flatten(updates)
    axes = matrices.resolve(matrix_axes, updates, method)
    parts = [
      matrices.split(g, a)
      for g, a in zip(numerics.widen(grads), axes, strict=True)
    ]
    sides = [
      matrices.sides(partition, a)
      for partition, a, leaf in zip(partitions, axes, parts, strict=True)
      for _ in leaf
    ]
    found = iter(direction([x for leaf in parts for x in leaf], sides))
    out = [
      matrices.join([next(found) for _ in leaf], g.shape, a).astype(g.dtype)
      for g, leaf, a in zip(grads, parts, axes, strict=True)
    ]
    return treedef.unflatten(out), state

  return assembly.direction(init, update, takes_partitions=True)


def axis_of_rows(rows: str) -> int:
  """Which axis of (..., in, out) a paper's row goes along, -2 or -1.

  Args:
    rows: what is a row, "outputs" or "inputs": that of an output unit goes
      along the fan-in.

  Raises:
    ValueError: something else.
  """
  if rows not in ("outputs", "inputs"):
    raise ValueError(f'rows must be "outputs" or "inputs", got {rows!r}')
  return -2 if rows == "outputs" else -1
