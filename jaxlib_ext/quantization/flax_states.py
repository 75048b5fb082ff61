"""`QTensor`s in `flax.serialization`, for programs that use flax.

`to_bytes`, `to_state_dict` and their inverses know the types that are
registered with them. This package neither needs nor imports flax, so it
registers `QTensor` right away where flax is loaded already, and as soon as it
is loaded otherwise.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import sys
from types import ModuleType
from typing import Any

from jaxlib_ext.quantization import qtensor

_MODULE = "flax.serialization"
_ARRAYS = ("codes", "scales", "matrix_scale")


def _name(tensor: qtensor.QTensor) -> str:
  """The format, which says how to read the codes, and any matrix axes."""
  axes = tensor.matrix_axes
  suffix = "" if axes is None else f"{axes.inputs} x {axes.outputs}"
  return f"{tensor.format}{suffix}"


def _to_state(tensor: qtensor.QTensor) -> dict[str, Any]:
  arrays = {name: getattr(tensor, name) for name in _ARRAYS}
  return {_name(tensor): {k: x for k, x in arrays.items() if x is not None}}


def _from_state(
  target: qtensor.QTensor, state: dict[str, Any]
) -> qtensor.QTensor:
  name = _name(target)
  want = [k for k in _ARRAYS if getattr(target, k) is not None]
  if list(state) != [name] or sorted(state[name]) != sorted(want):
    raise ValueError(
      f"state: a QTensor of format {name!r} is restored from "
      f"{{{name!r}: {want}}}, got the formats {list(state)}"
    )
  parts = {key: state[name].get(key) for key in _ARRAYS}
  return dataclasses.replace(target, **parts)


def _register(serialization: ModuleType) -> None:
  serialization.register_serialization_state(
    qtensor.QTensor, _to_state, _from_state, override=True
  )


class _Finder(importlib.abc.MetaPathFinder):
  """Finds nothing itself; completes what the others find for one module."""

  def find_spec(self, name, path=None, target=None):
    if name != _MODULE:
      return None
    sys.meta_path.remove(self)
    found = (f.find_spec(name, path, target) for f in list(sys.meta_path))
    spec = next((spec for spec in found if spec is not None), None)
    if spec is not None and spec.loader is not None:
      execute = spec.loader.exec_module

      def exec_module(module):
        execute(module)
        if module.__name__ == _MODULE:
          _register(module)

      spec.loader.exec_module = exec_module
    return spec


def install() -> None:
  """Registers `QTensor` with flax, now or when flax is imported."""
  if _MODULE in sys.modules:
    _register(sys.modules[_MODULE])
  else:
    sys.meta_path.insert(0, _Finder())
