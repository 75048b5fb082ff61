"""How many random examples a test of this folder tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest


def examples(
  small: int, large: int, **strategies: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
  """Turns a check of one example into a test of a small or a large budget.

  The small budget is part of the suite and always has the same examples. The
  large one has new ones at every run and is under a marker:
  `make test ARGS="-m fuzz"`.

  Args:
    small: examples of the small budget.
    large: examples of the large budget.
    **strategies: a hypothesis strategy for each argument of the check.
  """

  def decorate(check):
    @pytest.mark.slow
    @pytest.mark.parametrize(
      "count",
      [
        pytest.param(small, id="small"),
        pytest.param(large, id="large", marks=pytest.mark.fuzz),
      ],
    )
    def test(count):
      run = hypothesis.settings(
        max_examples=count,
        derandomize=count == small,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[
          hypothesis.Phase.generate,
          *([] if count == small else [hypothesis.Phase.shrink]),
        ],
        print_blob=True,
      )(hypothesis.given(**strategies)(check))
      run()

    test.__doc__ = check.__doc__
    return test

  return decorate
