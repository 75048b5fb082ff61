"""Which implementation computes a problem, for every family of kernels.

A family is a package of `kernels_pallas` whose modules `reference`, `xla`,
`tpu` and `gpu` have `run(inputs, options)`; `options.interpret` says whether
Pallas kernels are interpreted. A module says what it cannot do by
NotImplementedError.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import jax

from kernels_pallas import meshes

# Imported when first used: the Pallas back ends do not import on every
# installation.
_MODULES = {
  "reference": "reference",
  "xla": "xla",
  "pallas_tpu": "tpu",
  "pallas_gpu": "gpu",
}
_BACKENDS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}

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
  has run on a device. Of several names the first is taken that the default
  backend and the problem allow; a single name is an order, and what cannot be
  lowered then fails when it is lowered.

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
    NotImplementedError: if none of the named can run, with the reasons.
  """
  names, reasons = _names(implementation), []
  inputs = meshes.vary_alike(inputs)
  for name in names:
    try:
      if len(names) > 1 and not options.interpret:
        _check_backend(name)
      return _load(family, name).run(inputs, options)
    except NotImplementedError as e:
      reasons.append(f"{name}: {e}")
  raise NotImplementedError("; ".join(reasons))


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


def _check_backend(name: str) -> None:
  wanted, backend = _BACKENDS.get(name), jax.default_backend()
  if wanted not in (None, backend):
    raise NotImplementedError(f"the default backend is {backend}")


def _load(family: str, name: str):
  try:
    return importlib.import_module(f"kernels_pallas.{family}.{_MODULES[name]}")
  except ImportError as e:
    raise NotImplementedError(f"its module does not import ({e})") from e
