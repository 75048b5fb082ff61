"""Which axes of a parameter are a matrix: one view for all methods."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_ext import axis_names, labels, paths, trees

Axis = int | tuple[int, ...]
Blocks = int | tuple[int, ...]


class MatrixAxes(NamedTuple):
  """How one parameter holds matrices; all its other axes are a batch.

  A flax attention kernel (embed, heads, head_dim) is `MatrixAxes(0, (1, 2))`
  as one matrix and `MatrixAxes(0, 2)` head by head. A kernel (embed, heads *
  head_dim) is taken head by head with `output_blocks=heads`, a fused
  query-key-value kernel with `output_blocks=(d_q, d_kv, d_kv)`.

  Attributes:
    inputs: the axis, or axes to be merged, of the fan-in.
    outputs: those of the fan-out.
    input_blocks: how many equal blocks, or which sizes, the merged fan-in is
      cut into; each is a matrix of its own.
    output_blocks: the same for the fan-out.
  """

  inputs: Axis = -2
  outputs: Axis = -1
  input_blocks: Blocks = 1
  output_blocks: Blocks = 1


Spec = Any | Callable[[Any], Any] | None


def resolve(
  spec: Spec, tree: Any, method: str, *, warn: bool = False
) -> list[MatrixAxes]:
  """Checks a `matrix_axes=` argument against a tree.

  Args:
    spec: None for the axes that a leaf has itself, a `QTensor`, or its last
      two; or a pytree like `tree`, or a function of it giving one, whose
      leaves are None for the last two axes, a `MatrixAxes`
      or a tuple `(in_axes, out_axes)`. One of these at an inner node is that
      of all leaves below. Children are matched by name, as by
      `trees.spread`, and keys may be whole paths.
    tree: parameters or gradients, some of which may be masked.
    method: what needs the matrices, for messages.
    warn: whether to warn of leaves of three or more dimensions for which
      neither `spec` nor a name says which are the matrix. For the first look
      at a tree, not for every step.

  Returns:
    One entry per leaf that is not masked, its axes as tuples of non-negative
    integers.

  Raises:
    ValueError: `spec` does not fit the tree; a leaf of fewer than two
      dimensions; axes that a leaf lacks or that are named twice; blocks that
      do not cut a side. Each names the leaf.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=labels.is_param)
  if spec is None:
    entries = [getattr(x, "matrix_axes", None) for _, x in flat]
  else:
    entries = trees.spread_leaves(
      "matrix_axes",
      trees.given(spec, tree),
      tree,
      is_entry=_is_entry,
      is_param=labels.is_param,
    )
  out, unsaid = [], []
  for (path, leaf), entry in zip(flat, entries, strict=True):
    name = paths.leaf_name(path)
    if len(leaf.shape) < 2:
      raise ValueError(
        f"{method} needs matrices; the leaf {name!r} has the shape "
        f"{list(leaf.shape)}: give it another label than 'matrix'"
      )
    if entry is None and not axis_names.is_explained(name, len(leaf.shape)):
      unsaid.append((name, leaf.shape))
    out.append(check(name, leaf.shape, entry))
  if warn and unsaid:
    name, shape = unsaid[0]
    warnings.warn(
      f"{method}: the leaves {trees.some([name for name, _ in unsaid])} have "
      "more than two dimensions and no name that tells a stack; their last "
      f"two are taken for the matrix, which makes of {name!r} "
      f"{math.prod(shape[:-2])} matrices of {shape[-2]} x {shape[-1]}. "
      "matrix_axes= says otherwise: optim.flax_matrix_axes is right for "
      "flax's attention, DenseGeneral and convolutions, (-2, -1) keeps it so",
      stacklevel=2,
    )
  return out


def _is_axes(x: Any) -> bool:
  """Whether x can be one side: an axis, or a tuple of axes."""
  if isinstance(x, tuple | list):
    return all(isinstance(axis, numbers.Integral) for axis in x)
  return isinstance(x, numbers.Integral)


def _is_entry(x: Any, node: Any) -> bool:
  """Whether x is an entry for all of a node, not a tree of entries."""
  if x is None or isinstance(x, MatrixAxes):
    return True
  whole = isinstance(x, tuple | list) and not hasattr(x, "_fields")
  if labels.is_param(node) or jax.tree_util.all_leaves([node]):
    # `check` says what is wrong with it.
    return whole or jax.tree_util.all_leaves([x])
  if not whole or len(x) != 2 or not all(map(_is_axes, x)):
    return False
  # ((0, 1), (1, 2)) for a pair of leaves is one entry for each.
  pair = isinstance(node, tuple | list) and len(node) == 2
  return not pair or any(isinstance(side, numbers.Integral) for side in x)


def check(name: str, shape: Sequence[int], entry: Any) -> MatrixAxes:
  """Checks an entry of `matrix_axes=` against one leaf.

  Args:
    name: of the leaf, for messages.
    shape: of the leaf.
    entry: None for the last two axes, a `MatrixAxes` or a tuple
      `(in_axes, out_axes)`.

  Returns:
    As `resolve` for one leaf.

  Raises:
    ValueError: as `resolve`.
  """
  ndim = len(shape)
  try:
    given = MatrixAxes() if entry is None else entry
    if not isinstance(given, MatrixAxes):
      inputs, outputs = entry
      given = MatrixAxes(inputs, outputs)
    sides = [_whole(side) for side in given[:2]]
    flat = [axis for side in sides for axis in side]
    ok = all(sides) and all(-ndim <= axis < ndim for axis in flat)
    ok = ok and len({axis % ndim for axis in flat}) == len(flat)
  except (TypeError, ValueError):
    ok = False
  if not ok:
    raise ValueError(
      f"matrix_axes of {name!r} must be None or (in_axes, out_axes), each an "
      f"axis or a tuple of axes of its {ndim}, none twice, got "
      f"{reprlib.repr(entry)}"
    )
  inputs, outputs = (tuple(axis % ndim for axis in side) for side in sides)
  found = []
  for field, side, blocks in (
    ("input_blocks", inputs, given.input_blocks),
    ("output_blocks", outputs, given.output_blocks),
  ):
    size = math.prod(shape[axis] for axis in side)
    if isinstance(blocks, numbers.Integral):
      blocks = int(blocks)
      ok = blocks >= 1 and size % blocks == 0
    else:
      blocks = _whole(blocks)
      ok = sum(blocks) == size and min(blocks) >= 1
    if not ok:
      raise ValueError(
        f"{field} of {name!r} must divide its {size} or be sizes that sum to "
        f"it, got {blocks!r}"
      )
    found.append(blocks)
  return MatrixAxes(inputs, outputs, *found)


def from_last(axes: MatrixAxes, ndim: int) -> MatrixAxes | None:
  """Counts axes from the last, so that leading ones may be sliced off.

  Args:
    axes: an entry of `resolve`; its blocks are left out.
    ndim: of the leaf.

  Returns:
    The sides as tuples of negative axes; None for the last two.
  """
  sides = [tuple(axis - ndim for axis in side) for side in axes[:2]]
  return None if sides == [(-2,), (-1,)] else MatrixAxes(*sides)


def _whole(x: Any) -> tuple[int, ...]:
  """One integer or several, of Python's or NumPy's, as a tuple."""
  one = isinstance(x, numbers.Integral)
  return tuple(operator.index(i) for i in ((x,) if one else x))


def _order(ndim: int, axes: MatrixAxes) -> tuple[int, ...]:
  sides = axes.inputs + axes.outputs
  return (*(axis for axis in range(ndim) if axis not in sides), *sides)


def split(x: jax.Array, axes: MatrixAxes) -> list[jax.Array]:
  """The matrices of a leaf, stacked where they have one shape.

  Args:
    x: a parameter, gradient or moment.
    axes: an entry of `resolve`.

  Returns:
    Arrays [batch..., d_in, d_out]: one, or one per block where the blocks of
    a side are given by their sizes.
  """
  order = _order(x.ndim, axes)
  num_batch = x.ndim - len(axes.inputs) - len(axes.outputs)
  batch = [x.shape[axis] for axis in order[:num_batch]]
  sides = [math.prod(x.shape[i] for i in side) for side in axes[:2]]
  matrix = jnp.transpose(x, order).reshape(*batch, *sides)
  return [
    part
    for rows in _cut(matrix, -2, axes.input_blocks)
    for part in _cut(rows, -1, axes.output_blocks)
  ]


def sides(
  partition: Sequence[Any] | None, axes: MatrixAxes
) -> tuple[Any, Any] | None:
  """How the matrices of a leaf are divided over a mesh.

  Args:
    partition: the mesh axes of each of the leaf's dimensions, or None where
      they are not known.
    axes: an entry of `resolve`.

  Returns:
    Mesh axes of rows and of columns, or None where they are not known.
  """
  if partition is None:
    return None

  def side(merged, blocks):
    if isinstance(blocks, int) and blocks > 1:
      return ()  # The blocks themselves are what is divided.
    entries = [partition[axis] or () for axis in merged]
    names = [(x,) if isinstance(x, str) else tuple(x) for x in entries]
    return sum(names, ())

  return (
    side(axes.inputs, axes.input_blocks),
    side(axes.outputs, axes.output_blocks),
  )


def join(
  parts: Sequence[jax.Array], shape: Sequence[int], axes: MatrixAxes
) -> jax.Array:
  """Inverse of `split` for a leaf of the given shape."""
  columns = _number(axes.output_blocks)
  rows = [
    _uncut(parts[i : i + columns], -1, axes.output_blocks)
    for i in range(0, len(parts), columns)
  ]
  matrix = _uncut(rows, -2, axes.input_blocks)
  order = _order(len(shape), axes)
  y = matrix.reshape([shape[axis] for axis in order])
  return jnp.transpose(y, [order.index(axis) for axis in range(len(shape))])


def _number(blocks: Blocks) -> int:
  return 1 if isinstance(blocks, int) else len(blocks)


def _cut(x, axis, blocks):
  """Equal blocks become a batch axis before the matrix, others a list."""
  if blocks == 1:
    return [x]
  axis += x.ndim
  if isinstance(blocks, int):
    size = x.shape[axis] // blocks
    shape = (*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
    return [jnp.moveaxis(x.reshape(shape), axis, -3)]
  ends = [sum(blocks[: i + 1]) for i in range(len(blocks) - 1)]
  return jnp.split(x, ends, axis=axis)


def _uncut(parts, axis, blocks):
  if blocks == 1:
    return parts[0]
  if isinstance(blocks, int):
    (x,) = parts
    # Behind the block axis lie the two of the matrix; the block's index
    # counts before that of the side it was cut from.
    x = jnp.moveaxis(x, -3, axis - 1)
    shape = list(x.shape)
    merged = shape.pop(axis - 1) * shape[axis]
    shape[axis] = merged
    return x.reshape(shape)
  return jnp.concatenate(parts, axis=axis)
