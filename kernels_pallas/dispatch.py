"""Which implementation computes a problem, for every family of kernels.

A family is a package of `kernels_pallas` whose modules `reference`, `xla`,
`tpu` and `gpu` have `run(inputs, options)`; `options.interpret` says whether
Pallas kernels are interpreted. A module says what it cannot do by
NotImplementedError.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels_pallas import meshes, platforms

# Imported when first used: the Pallas back ends do not import on every
# installation.
_MODULES = {
  "reference": "reference",
  "xla": "xla",
  "pallas_tpu": "tpu",
  "pallas_gpu": "gpu",
}

Implementation = str | Sequence[str] | None


def run(
  family: str,
  inputs: Any,
  options: Any,
  *,
  implementation: Implementation,
) -> Any:
  """Runs the first of the named implementations that can.

  None is "xla" everywhere: a kernel becomes its platform's default once it
  has run on a device. Of several names the first is taken that the platform
  allows for which the function is lowered, and the problem; interpreted
  kernels run on all.

  Args:
    family: "linear" or "sparse".
    inputs: the arrays.
    options: the static choices.
    implementation: a name, a sequence of names in order of preference, or
      None.

  Returns:
    What the family's `run` does.

  Raises:
    ValueError: for a name that does not exist.
    NotImplementedError: if none of the named can run, with the reasons; when
      the function is lowered, where it is the platform that does not allow
      them.
  """
  names = _names(implementation)
  inputs = meshes.vary_alike(inputs)
  one = lambda name: lambda inputs: _load(family, name).run(inputs, options)
  if options.interpret or not any(name in platforms.PALLAS for name in names):
    return _run_first(names, one, inputs)
  places = {p for allowed in platforms.PALLAS.values() for p in allowed}
  runs, chosen, reasons = {}, {}, []
  for place in (*sorted(places), None):
    here = [x for x in names if place in platforms.PALLAS.get(x, (place,))]
    if len(set(names)) == 1:
      name, why = (names[0] if here else None), []
    else:
      name, why = _first(here, one, inputs)
    reasons += [x for x in why if x not in reasons]
    if name is not None:
      chosen[place] = runs.setdefault(name, one(name))
  if not chosen:
    raise NotImplementedError("; ".join(reasons))
  where = {
    name: f"{name} runs on {' and '.join(allowed)} only"
    for name, allowed in platforms.PALLAS.items()
    if name in names
  }
  reason = "; ".join((*where.values(), *reasons))
  if len(runs) == 1:
    (run_it,) = runs.values()
    if len(chosen) <= len(places):
      inputs = platforms.only(inputs, tuple(chosen), reason)
    return run_it(inputs)
  if None not in chosen:
    like = jax.eval_shape(next(iter(chosen.values())), inputs)
    chosen[None] = lambda inputs: platforms.refused(like, inputs, reason)
  default = chosen.pop(None)
  return jax.lax.platform_dependent(inputs, **chosen, default=default)


def _run_first(
  names: Sequence[str], one: Callable[[str], Callable[[Any], Any]], inputs: Any
) -> Any:
  """What the first name that can returns."""
  reasons = []
  for name in names:
    try:
      return one(name)(inputs)
    except NotImplementedError as e:
      reasons.append(f"{name}: {e}")
  raise NotImplementedError("; ".join(reasons))


def _first(
  names: Sequence[str], one: Callable[[str], Callable[[Any], Any]], inputs: Any
) -> tuple[str | None, list[str]]:
  """The first name that can run `inputs`, and why those before it cannot."""
  reasons = []
  for name in names:
    try:
      jax.eval_shape(one(name), inputs)
    except NotImplementedError as e:
      reasons.append(f"{name}: {e}")
    else:
      return name, reasons
  return None, reasons


def _names(implementation: Implementation) -> tuple[str, ...]:
  if implementation is None:
    return ("xla",)
  if isinstance(implementation, str):
    names = (implementation,)
  else:
    names = tuple(implementation)
  unknown = [name for name in names if name not in _MODULES]
  if unknown or not names:
    raise ValueError(
      "implementation must be None or one or more of "
      f"{', '.join(_MODULES)}, got {implementation!r}"
    )
  return names


def _load(family: str, name: str):
  try:
    return importlib.import_module(f"kernels_pallas.{family}.{_MODULES[name]}")
  except ImportError as e:
    raise NotImplementedError(f"its module does not import ({e})") from e
