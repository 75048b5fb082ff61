"""Schedules of the polynomials that orthogonalise matrices.

A schedule is a table [steps, 3] of the a, b, c of p(x) = a x + b x³ + c x⁵.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Coefficients = str | jax.Array | np.ndarray | Sequence[Sequence[float]]

# K. Jordan's Muon: one triplet with the steepest slope at 0 that still keeps
# every singular value within about 0.3 of 1.
_KELLER = (3.4445, -4.7750, 2.0315)

# The tuned five-step schedule that microsoft/dion uses.
_DION = (
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)

# The quintic that is 1 at 1 with two vanishing derivatives: cubic convergence.
_POLISH = (15 / 8, -10 / 8, 3 / 8)

_POLAR_EXPRESS_SAFETY = 1.02

NAMES = ("keller", "polar_express", "dion", "exact")


def _minimax_quintic(lower: float, upper: float) -> np.ndarray:
  """(a, b, c) of the p(x) = a x + b x³ + c x⁵ nearest to 1 on an interval.

  Remez exchange: the error of the best p takes its extreme value with
  alternating sign at `lower`, the two stationary points of p, and `upper`.
  """
  if lower / upper > 1 - 5e-6:  # The linear system below becomes singular.
    return np.array(_POLISH) / [upper, upper**3, upper**5]
  inner = np.array([3 * lower + upper, lower + 3 * upper]) / 4
  error = np.inf
  for _ in range(100):
    x = np.array([lower, *inner, upper])
    system = np.stack([x, x**3, x**5, np.array([1.0, -1, 1, -1])], axis=1)
    a, b, c, new_error = np.linalg.solve(system, np.ones(4))
    root = np.sqrt(9 * b * b - 20 * a * c)
    inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    if abs(new_error - error) <= 1e-15:
      break
    error = new_error
  return np.array([a, b, c])


@functools.cache
def polar_express_coefficients(
  steps: int,
  *,
  lower: float = 1e-3,
  cushion: float = 0.02,
  safety: float = _POLAR_EXPRESS_SAFETY,
) -> np.ndarray:
  """The Polar Express schedule for a given number of steps.

  Each polynomial is the minimax quintic for the interval that the singular
  values can be in by then (arXiv 2505.16932, Algorithm 1), which makes the
  composition the best one of its degree.

  Args:
    steps: how many polynomials, at least 1.
    lower: the smallest singular value (of at most 1) it is built for.
    cushion: the interval is treated as if it began no lower than `cushion`
      times its end, which trades speed on tiny values for calm on the rest.
    safety: all but the last polynomial see values divided by this, so that
      rounding cannot push one out of the interval.

  Returns:
    float64 [steps, 3], read only.
  """
  upper = 1.0
  rows = []
  for step in range(steps):
    a, b, c = _minimax_quintic(max(lower, cushion * upper), upper)
    ends = [a * x + b * x**3 + c * x**5 for x in (lower, upper)]
    # The cushion shifts the error band; put it back around 1.
    scale = 2 / sum(ends)
    s = safety if step < steps - 1 else 1.0
    a, b, c = scale * a / s, scale * b / s**3, scale * c / s**5
    rows.append((a, b, c))
    lower = a * lower + b * lower**3 + c * lower**5
    upper = 2 - lower
  table = np.array(rows)
  table.setflags(write=False)
  return table


@functools.cache
def _exact_coefficients(epsilon: float) -> np.ndarray:
  """Takes singular values in [epsilon, 1] to 1 within rounding."""
  lower, steps = epsilon, 0
  while lower < 0.7:
    steps += 1
    rows = polar_express_coefficients(steps, lower=epsilon)
    lower = epsilon
    for a, b, c in rows:
      lower = a * lower + b * lower**3 + c * lower**5
  # 0.3 -> 0.06 -> 5e-4 -> 3e-10 -> below float64 rounding.
  return np.concatenate([rows, [_POLISH] * 4])


def resolve(
  coefficients: Coefficients, steps: int | None, accumulator: Any
) -> tuple[Any, float]:
  """Turns the arguments of `newton_schulz` into a table.

  Args:
    coefficients: as for `newton_schulz`.
    steps: as for `newton_schulz`.
    accumulator: the dtype of sums, whose rounding error "exact" goes down to.

  Returns:
    The [steps, 3] table, and what the normalised matrix is divided by.

  Raises:
    ValueError: as `newton_schulz`.
  """
  if steps is not None and steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}")
  if not isinstance(coefficients, str):
    return _given_schedule(coefficients, steps), 1.0
  if coefficients == "keller":
    return np.array([_KELLER] * (steps or 5)), 1.0
  if coefficients == "polar_express":
    return polar_express_coefficients(steps or 5), _POLAR_EXPRESS_SAFETY
  if coefficients == "dion":
    extra = (steps or len(_DION)) - len(_DION)
    if extra < 0:
      raise ValueError(
        f'coefficients="dion" need at least {len(_DION)} steps, got '
        f"{steps}: the last polynomials are what brings values back to 1"
      )
    return np.array(_DION + (_DION[-1],) * extra), 1.0
  if coefficients == "exact":
    if steps is not None:
      raise ValueError(
        f'coefficients="exact" set their own number of steps, got steps={steps}'
      )
    table = _exact_coefficients(float(jnp.finfo(accumulator).eps))
    return table, _POLAR_EXPRESS_SAFETY
  near = difflib.get_close_matches(coefficients, NAMES) or NAMES
  raise ValueError(
    f"coefficients must be one of {NAMES} or an array [steps, 3], got "
    f"{coefficients!r}; nearest: {', '.join(map(repr, near))}"
  )


def check(coefficients: Coefficients, ns_steps: int | None) -> None:
  """Refuses the arguments of a factory that `resolve` will not take.

  Raises:
    ValueError: naming them.
  """
  try:
    resolve(coefficients, ns_steps, jnp.float32)
  except ValueError as e:
    if ns_steps is None:
      raise
    raise ValueError(f"ns_steps={ns_steps} does not fit: {e}") from None


def _given_schedule(coefficients: Any, steps: int | None) -> Any:
  if not isinstance(coefficients, jax.Array):
    coefficients = np.asarray(coefficients)
  shape = coefficients.shape
  if len(shape) != 2 or shape[1] != 3 or shape[0] < 1:
    raise ValueError(
      f"coefficients must have the shape [steps, 3] with steps >= 1, got "
      f"{list(shape)}"
    )
  if steps is not None and steps != shape[0]:
    raise ValueError(
      f"steps must be None or the {shape[0]} rows of coefficients, got {steps}"
    )
  return coefficients
