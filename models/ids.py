"""Checks of token ids and labels, which index the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments


def check(name: str, ids: Any, size: int, ignored: Sequence[int] = ()) -> None:
  """Refuses ids that no row has, where their values are known.

  Args:
    name: of the argument, for messages.
    ids: integers of any shape.
    size: the number of rows.
    ignored: values that are allowed besides 0 to `size - 1`.

  Raises:
    TypeError: `ids` are not integers.
    ValueError: a value is out of range. Traced values are not known.
  """
  ids = arguments.integers(name, ids)
  if not arguments.known(ids):
    return
  values = np.asarray(ids)
  bad = (values < 0) | (values >= size)
  if ignored:
    bad &= ~np.isin(values, ignored)
  if bad.any():
    also = "".join(f" or {value}" for value in ignored)
    raise ValueError(
      f"{name}: got {values[bad].flat[0]}; allowed: 0 to {size - 1}{also}"
    )


def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Looks up rows of a table.

  Args:
    table: float `[V, D]`.
    ids: int `[...]`.

  Returns:
    `[..., D]`. The row of an id outside 0 to V - 1 is NaN, not a neighbour's.
  """
  return table.at[ids].get(
    mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
  )
