"""Which role each parameter plays: the one place that decides it.

Matrix optimizers must not see embeddings, heads or (stacked) norm gains as
hidden matrices, and a rank of two alone cannot tell them apart: an embedding
is 2-D, a scan-stacked norm is 2-D, a scan-stacked kernel is 3-D. Names can.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxlib_ext import label_rules, paths, trees

LABELS = ("matrix", "embedding", "head", "vector")

# Names of kernels that lead from heads or hidden units back to the width.
_BACK = r"(^|[/_.])(o|wo|out|output|down|c_proj)([/_.]|$)"

Labels = Any | Callable[[Any], Any] | None


def leads_back(name: str) -> bool:
  """Whether a kernel so named, as "layers/attn/o", writes the model's width.

  Its rows are then divided as the columns of "q" or "up" are, which a square
  one's shape does not tell.
  """
  return re.search(_BACK, name.lower()) is not None


def is_param(x: Any) -> bool:
  """Whether `x` counts as one parameter though it is itself a pytree.

  Its class says so, as that of `QTensor` does: a `nnx.Param` forwards
  questions about its attributes to the value it holds, which may be anything.
  """
  return hasattr(type(x), "dequantize") and hasattr(x, "shape")


def label_params(
  params: Any, rules: Sequence[tuple[str, str]] | None = None
) -> Any:
  """Labels each parameter "matrix", "embedding", "head" or "vector".

  Args:
    params: pytree of arrays, abstract values or `QTensor`s (one label each).
    rules: `(regular expression, label)` pairs searched in the leaf's name
      (`"layers/attn/q"`; flax's `.value` is no part of it) before the default
      ones. Those label what has fewer than two dimensions "vector", and so
      norms, gains, biases, log rates, special tokens and depthwise
      convolutions by name, whether stacked by layer or not; then tables of
      embeddings and what leads to the vocabulary or the classes, by name and
      where names are plain ("Dense_4", "output") by the sizes of the others;
      everything else "matrix". `optim.describe_labels` says which it was.

  Returns:
    A pytree like `params` with one label per parameter.

  Raises:
    ValueError: a rule gives a label that is not one of the four.

  Warns:
    UserWarning: evidence against a label that was chosen, naming the leaves.
  """
  found = explain(params, rules)
  _warn_of_doubts(found)
  return _tree(params, found)


class Leaf(NamedTuple):
  """One parameter, and why it has its label.

  Attributes:
    name: as error messages have it.
    shape: of the parameter; `()` for a Python number.
    label: one of `LABELS`.
    why: the rule or the evidence.
    doubt: what speaks against the label, or an empty string.
  """

  name: str
  shape: tuple[int, ...]
  label: str
  why: str
  doubt: str = ""


def explain(
  params: Any, rules: Sequence[tuple[str, str]] | None = None
) -> list[Leaf]:
  """Labels each parameter as `label_params` does, and says why.

  Args:
    params: as for `label_params`.
    rules: as for `label_params`.

  Returns:
    One entry per parameter, in their order.

  Raises:
    ValueError: a rule gives a label that is not one of the four.
  """
  own = tuple(rules or ())
  for pattern, label in own:
    if label not in LABELS:
      raise ValueError(
        f"rules: {pattern!r} gives the label {label!r}; allowed: {LABELS}"
      )
  names, shapes = _leaves(params)
  found = label_rules.judge(names, shapes)
  out = []
  for name, shape, verdict in zip(names, shapes, found, strict=True):
    rule = next((rule for rule in own if re.search(rule[0], name)), None)
    if rule is not None:
      verdict = label_rules.Verdict(rule[1], f"the rule {rule[0]!r}")
    out.append(Leaf(name, shape, *verdict))
  return out


def _leaves(
  params: Any,
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
  flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_param)
  names = tuple(paths.leaf_name(path) for path, _ in flat)
  return names, tuple(tuple(getattr(leaf, "shape", ())) for _, leaf in flat)


def _tree(params: Any, found: Sequence[Leaf]) -> Any:
  treedef = jax.tree.structure(params, is_leaf=is_param)
  return treedef.unflatten([leaf.label for leaf in found])


@functools.lru_cache(maxsize=256)
def _tell_once(found: tuple[Leaf, ...]) -> None:
  """Says what a user should know of a tree's labels, at its first sight.

  Factories resolve labels at every update that is traced.
  """
  _warn_of_doubts(found)
  missing = absent(found)
  if missing:
    # A model with tied embeddings has no head, an image model no embedding, a
    # hidden layer by itself neither.
    level = logging.WARNING if missing == ("head",) else logging.INFO
    logging.getLogger(__name__).log(
      level,
      "No parameter is labelled %s by its name, of %d (%s...). If the model "
      "has one, give labels=; optim.describe_labels prints all labels.",
      " or ".join(map(repr, missing)),
      len(found),
      found[0].name if found else "",
    )


def absent(found: Sequence[Leaf]) -> tuple[str, ...]:
  """Which of "embedding" and "head" no parameter is labelled."""
  present = {leaf.label for leaf in found}
  return tuple(x for x in ("embedding", "head") if x not in present)


def _warn_of_doubts(leaves: Sequence[Leaf]) -> None:
  doubtful = [leaf for leaf in leaves if leaf.doubt]
  if doubtful:
    told = "; ".join(
      f"{leaf.name!r} {list(leaf.shape)} is taken for {leaf.label!r} "
      f"({leaf.doubt})"
      for leaf in doubtful
    )
    warnings.warn(
      f"labels: {told}. If that is wrong, give labels= or "
      "optim.label_params(params, rules=((pattern, label), ...))",
      stacklevel=3,
    )


def resolve(labels: Labels, params: Any) -> Any:
  """Turns a factory's `labels=` argument into a checked pytree of labels.

  Args:
    labels: None (`label_params`), a callable of the parameters, or a pytree
      of labels; a prefix of the parameters' tree labels whole subtrees.
    params: the parameters.

  Returns:
    A pytree like `params` with one label per parameter.

  Raises:
    ValueError: the tree does not fit, or holds an unknown label.
  """
  if labels is None:
    found = tuple(explain(params))
    _tell_once(found)
    return _tree(params, found)
  tree = trees.given(labels, params)
  full = trees.spread("labels", tree, params, is_param=is_param)
  for label in jax.tree.leaves(full):
    if label not in LABELS:
      raise ValueError(f"labels: got {label!r}; allowed: {LABELS}")
  return full
