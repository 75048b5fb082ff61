"""Names of pytree leaves, and labels given to them by rules over the names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax


def leaf_name(path: Sequence[Any]) -> str:
  """Joins a `jax.tree_util` key path: `("layers", 0, "q")` → `"layers/0/q"`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def label_tree(
  tree: Any,
  rules: Sequence[tuple[str, str]],
  *,
  is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
  """Labels each leaf by the first rule whose pattern is found in its name.

  Args:
    tree: any pytree.
    rules: `(regular expression, label)` pairs, searched in order.
    is_leaf: as in `jax.tree.map`.

  Returns:
    A pytree of the same structure whose leaves are labels.

  Raises:
    ValueError: a leaf that no rule matches; the message names the leaf.
  """
  compiled = [(re.compile(pattern), label) for pattern, label in rules]

  def label(path, _):
    name = leaf_name(path)
    for pattern, value in compiled:
      if pattern.search(name):
        return value
    raise ValueError(
      f"no rule labels the leaf {name!r}; rules tried, in order: "
      f"{[pattern for pattern, _ in rules]}"
    )

  return jax.tree_util.tree_map_with_path(label, tree, is_leaf=is_leaf)
