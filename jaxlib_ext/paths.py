"""Names of pytree leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

# The field in which a flax variable or partitioned parameter holds its array.
_BOX = jax.tree_util.GetAttrKey("value")


def leaf_name(path: Sequence[Any]) -> str:
  """Joins a `jax.tree_util` key path: `("layers", 0, "q")` → `"layers/0/q"`.

  The attribute `.value` at the end, where `nnx.Param` and linen's
  `Partitioned` hold their array, is no part of the name.
  """
  path = tuple(path)
  if len(path) > 1 and path[-1] == _BOX:
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")
