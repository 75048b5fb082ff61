"""A table of parameters, their labels and the matrices they hold."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from jaxlib_ext import labels as labels_lib
from optim import matrices


def describe_labels(params: Any, labels: labels_lib.Labels = None) -> str:
  """Prints what a factory takes every parameter for, and why.

  Args:
    params: pytree of arrays, abstract values or `QTensor`s.
    labels: as a factory's `labels=`; None for `label_params`.

  Returns:
    One line per parameter: its name, shape, label, the axes of its matrices
    (`[0, 1] x [2]` has two axes merged into the fan-in) and the number of
    matrices where it is labelled "matrix", and the rule or the evidence for
    the label. Below them the evidence against a label, and whether no leaf is
    labelled "embedding" or "head".

  Raises:
    ValueError: labels that do not fit, or a "matrix" of fewer than two
      dimensions.
  """
  found = labels_lib.explain(params)
  if labels is not None:
    given = jax.tree.leaves(labels_lib.resolve(labels, params))
    found = [
      leaf._replace(label=label, why="given by labels=", doubt="")
      for leaf, label in zip(found, given, strict=True)
    ]
  axes = iter(_axes(params, found))
  rows = [
    (
      leaf.name,
      str(list(leaf.shape)),
      leaf.label,
      _matrices(leaf.shape, next(axes)) if leaf.label == "matrix" else "",
      leaf.why,
    )
    for leaf in found
  ]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]
  lines += [f"{leaf.name!r}: {leaf.doubt}" for leaf in found if leaf.doubt]
  lines += [f"no parameter is labelled {x!r}" for x in labels_lib.absent(found)]
  return "\n".join(lines)


def _axes(params: Any, found: list[labels_lib.Leaf]):
  """`MatrixAxes` of leaves labelled "matrix": their own, or the default."""
  leaves, treedef = jax.tree.flatten(params, is_leaf=labels_lib.is_param)
  abstract = [
    optax.MaskedNode()
    if leaf.label != "matrix"
    else x
    if labels_lib.is_param(x)
    else jax.ShapeDtypeStruct(leaf.shape, getattr(x, "dtype", float))
    for x, leaf in zip(leaves, found, strict=True)
  ]
  return matrices.resolve(None, treedef.unflatten(abstract), "describe_labels")


def _matrices(shape: tuple[int, ...], axes: matrices.MatrixAxes) -> str:
  side = axes.inputs + axes.outputs
  count = math.prod(size for axis, size in enumerate(shape) if axis not in side)
  sides = f"{list(axes.inputs)} x {list(axes.outputs)}"
  return sides if count == 1 else f"{sides}, {count} of them"
