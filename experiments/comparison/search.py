"""Searches on grids of factors of two that do not end at an edge."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.optimizers import FALLBACK_RATE

# No grid is longer: a job that has no best value would be tried for ever.
_LONGEST = 12


class Point(NamedTuple):
  """What is searched for.

  Attributes:
    learning_rate: the optimizer's.
    weight_decay: likewise.
    fallback_learning_rate: of what the optimizer leaves to AdamW, where it is
      not the learning rate.
  """

  learning_rate: float
  weight_decay: float
  fallback_learning_rate: float | None = None

  @classmethod
  def of(cls, optimizer: Mapping[str, Any]) -> Point:
    """That of a config's "optimizer"."""
    rate, decay = optimizer["learning_rate"], optimizer["weight_decay"]
    given = optimizer.get("arguments", {}).get(FALLBACK_RATE, rate)
    return cls(rate, decay).moved(FALLBACK_RATE, given)

  def value(self, field: str) -> float:
    """A coordinate; the learning rate where the fallback has none."""
    value = getattr(self, field)
    return self.learning_rate if value is None else value

  def moved(self, field: str, value: float) -> Point:
    """With another value of one coordinate."""
    point = self._replace(**{field: value})
    if point.fallback_learning_rate == point.learning_rate:
      return point._replace(fallback_learning_rate=None)
    return point


def along(
  losses_of: Callable[[Sequence[float]], Sequence[float]],
  start: float,
  budget: int = _LONGEST,
) -> tuple[float, int]:
  """The best of start · 2^k, with a worse neighbour on both sides.

  Args:
    losses_of: the losses of several values, which may be found at once; inf
      is worse than anything.
    start: the first value; its two neighbours are asked for with it.
    budget: the most values to ask for besides `start`.

  Returns:
    The value of the least loss among those asked for, and how many there
    were besides `start`. It is at an edge of the grid only where the budget
    ended.
  """
  losses = {}
  pending = [start / 2, start, start * 2] if budget >= 2 else [start]
  while True:
    losses |= dict(zip(pending, losses_of(pending), strict=True))
    best = min(losses, key=losses.get)
    pending = [v for v in (best / 2, best * 2) if v not in losses]
    spent = len(losses) - 1
    if not pending or spent + len(pending) > budget:
      return best, spent


def coordinates(
  losses_of: Callable[[Sequence[Point]], Sequence[float]],
  start: Point,
  budgets: Mapping[str, int],
) -> Point:
  """The learning rate and other coordinates in turns, until none moves.

  Args:
    losses_of: the losses of several points; a point is asked for once.
    start: the first point. A coordinate of 0 has no neighbours and stays.
    budgets: the other coordinates, in this order, and the most values that
      may be tried for each; 0 leaves it as it is.

  Returns:
    The best point. Its learning rate has a worse neighbour on both sides, the
    others being equal; so has each other coordinate, unless its budget ended.
  """
  known: dict[Point, float] = {}
  left = {"learning_rate": None, **budgets}

  def ask(point, field, values):
    points = [point.moved(field, value) for value in values]
    new = [p for p in points if p not in known]
    known.update(zip(new, losses_of(new), strict=True))
    return [known[p] for p in points]

  point = start
  while True:
    before = point
    for field, budget in left.items():
      if not point.value(field):
        continue
      best, spent = along(
        functools.partial(ask, point, field),
        point.value(field),
        _LONGEST if budget is None else budget,
      )
      point = point.moved(field, best)
      if not math.isfinite(known[point]):
        return point
      if budget is not None:
        left[field] -= spent
    if point == before:
      return point
