"""Which axes of a parameter are a matrix: one view for all methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import paths, trees

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


def _is_masked(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def resolve(spec: Spec, tree: Any, method: str) -> list[MatrixAxes]:
  """Checks a factory's `matrix_axes=` against a tree.

  Args:
    spec: None for the last two axes of every leaf; or a pytree like `tree`,
      or a function of it giving one, whose leaves are None, a `MatrixAxes`
      or a tuple `(in_axes, out_axes)`.
    tree: parameters or gradients.
    method: the optimizer's name, for messages.

  Returns:
    One entry per leaf that is not masked, its axes as tuples of non-negative
    integers.

  Raises:
    ValueError: `spec` does not fit the tree; a leaf of fewer than two
      dimensions; axes that a leaf lacks or that are named twice; blocks that
      do not cut a side. Each names the leaf.
  """
  spec = trees.given(spec, tree)
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
        f"{method} needs matrices; the leaf {name!r} has the shape "
        f"{list(leaf.shape)}: give it another label than 'matrix'"
      )
    out.append(_check(name, leaf.shape, entry))
  return out


def _check(name: str, shape: Sequence[int], entry: Any) -> MatrixAxes:
  ndim = len(shape)
  try:
    given = MatrixAxes() if entry is None else entry
    if not isinstance(given, MatrixAxes):
      inputs, outputs = entry
      given = MatrixAxes(inputs, outputs)
    sides = [(g,) if isinstance(g, int) else tuple(g) for g in given[:2]]
    flat = [axis for side in sides for axis in side]
    ok = all(sides) and all(-ndim <= axis < ndim for axis in flat)
    ok = ok and len({axis % ndim for axis in flat}) == len(flat)
  except (TypeError, ValueError):
    ok = False
  if not ok:
    raise ValueError(
      f"matrix_axes of {name!r} must be None or (in_axes, out_axes), each an "
      f"axis or a tuple of axes of its {ndim}, none twice, got {entry!r}"
    )
  inputs, outputs = (tuple(axis % ndim for axis in side) for side in sides)
  for field, side, blocks in (
    ("input_blocks", inputs, given.input_blocks),
    ("output_blocks", outputs, given.output_blocks),
  ):
    size = math.prod(shape[axis] for axis in side)
    if isinstance(blocks, int):
      ok = blocks >= 1 and size % blocks == 0
    else:
      ok = sum(blocks) == size and min(blocks) >= 1
    if not ok:
      raise ValueError(
        f"{field} of {name!r} must divide its {size} or be sizes that sum to "
        f"it, got {blocks!r}"
      )
  return MatrixAxes(inputs, outputs, given.input_blocks, given.output_blocks)


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
  d_in = math.prod(x.shape[axis] for axis in axes.inputs)
  matrix = jnp.transpose(x, order).reshape(*batch, d_in, -1)
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
    shape = (*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
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
