"""Which cases of a test the quick part of the suite has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def cases(table: Mapping[str, Any], quick: Collection[str]) -> list[Any]:
  """The values of a table for `pytest.mark.parametrize`, under their names.

  Args:
    table: all cases; a tuple is of several arguments.
    quick: names of those that are not marked slow.
  """
  missing = set(quick) - set(table)
  if missing:
    raise ValueError(f"quick: no cases {sorted(missing)}")
  return [
    pytest.param(
      *(case if isinstance(case, tuple) else (case,)),
      id=name,
      marks=[] if name in quick else pytest.mark.slow,
    )
    for name, case in table.items()
  ]
