"""Names of pytree leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def leaf_name(path: Sequence[Any]) -> str:
  """Joins a `jax.tree_util` key path: `("layers", 0, "q")` → `"layers/0/q"`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
