"""Frozen dataclasses as configurations: JSON, overrides, clear errors."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
  """An unknown field, or a value of the wrong type."""


def nearest(name: str, allowed: Iterable[str]) -> str:
  """Says which names are allowed, those most like `name` first.

  Returns:
    `"did you mean 'x'? allowed: a, b, x"`.
  """
  allowed = sorted(allowed)
  close = difflib.get_close_matches(name, allowed, n=2, cutoff=0.5)
  hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
  return f"{hint}allowed: {', '.join(allowed)}"


def to_dict(config: Any) -> dict[str, Any]:
  """Nested dataclasses → nested JSON-ready dicts (tuples become lists)."""
  return {
    f.name: _to_json(getattr(config, f.name))
    for f in dataclasses.fields(config)
  }


def _to_json(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return to_dict(value)
  if isinstance(value, tuple | list):
    return [_to_json(v) for v in value]
  if isinstance(value, dict):
    return {k: _to_json(v) for k, v in value.items()}
  return value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
  """The inverse of `to_dict`; missing fields take their defaults.

  Raises:
    ConfigError: an unknown field or a value of the wrong type.
  """
  if not isinstance(values, dict):
    raise ConfigError(
      f"{where.rstrip('.') or cls.__name__}: got {values!r}; allowed: a group "
      "of fields"
    )
  types_ = typing.get_type_hints(cls)
  known = {f.name for f in dataclasses.fields(cls)}
  kwargs = {}
  for name, value in values.items():
    if name not in known:
      raise ConfigError(
        f"unknown field {where + name!r}; {nearest(name, known)}"
      )
    kind = types_[name]
    if dataclasses.is_dataclass(kind):
      kwargs[name] = from_dict(kind, value, f"{where}{name}.")
    else:
      kwargs[name] = check(value, kind, where + name)
  return cls(**kwargs)


def replace(config: T, path: str, value: Any) -> T:
  """Returns `config` with the field at a dotted path set to `value`.

  Strings are read as the field's type ("1e-3" for a float, "true" for a
  bool, "none" where None is allowed). In a field that is a dict, the last
  name is a key and the value is read as a Python literal.

  Raises:
    ConfigError: an unknown field or a value of the wrong type.
  """
  return _replace(config, path.split("."), value, path)


def _replace(config, names: Sequence[str], value, path: str):
  name, rest = names[0], names[1:]
  known = [f.name for f in dataclasses.fields(config)]
  prefix = path[: len(path) - len(".".join(names))]
  if name not in known:
    raise ConfigError(f"unknown field {path!r}; {nearest(name, known)}")
  current = getattr(config, name)
  if dataclasses.is_dataclass(current):
    if not rest:
      raise ConfigError(
        f"{path!r} is a group of fields, set one of: "
        f"{', '.join(f.name for f in dataclasses.fields(current))}"
      )
    return dataclasses.replace(
      config, **{name: _replace(current, rest, value, path)}
    )
  if isinstance(current, dict) and len(rest) == 1:
    new = {**current, rest[0]: literal(value)}
    return dataclasses.replace(config, **{name: new})
  if rest:
    raise ConfigError(f"{prefix + name!r} has no fields, got {path!r}")
  kind = typing.get_type_hints(type(config))[name]
  return dataclasses.replace(config, **{name: check(value, kind, path)})


def literal(value: Any) -> Any:
  """A string as the Python literal it spells ("1e-3", "[1, 2]"), or itself."""
  if not isinstance(value, str):
    return value
  if value.lower() in ("true", "false"):
    return value.lower() == "true"
  if value.lower() in ("none", "null"):
    return None
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return value  # The last two: nested too deeply.


def check(value: Any, kind: Any, where: str) -> Any:
  """Returns `value` as an instance of the annotation `kind`.

  Raises:
    ConfigError: naming the field, the value and what is allowed.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return literal(value)
  if origin is typing.Literal:
    if value in args:
      return value
    raise ConfigError(
      f"{where}: got {value!r}; {nearest(str(value), map(str, args))}"
    )
  if origin in (typing.Union, types.UnionType):
    if literal(value) is None and type(None) in args:
      return None
    errors = []
    for option in (a for a in args if a is not type(None)):
      try:
        return check(value, option, where)
      except ConfigError as e:
        errors.append(e)
    raise errors[0]
  if origin is tuple or kind is tuple:
    parsed = literal(value)
    if isinstance(parsed, str):
      parsed = [v.strip() for v in parsed.split(",")] if parsed else []
      if not all(parsed):
        raise ConfigError(f"{where}: got {value!r}, with an empty entry")
    if not isinstance(parsed, tuple | list):
      parsed = [parsed]
    inner = args[0] if args else Any
    return tuple(check(v, inner, where) for v in parsed)
  if kind is str:
    if isinstance(value, str):
      if "\0" in value:
        raise ConfigError(f"{where}: got {value!r}; allowed: text without NUL")
      return value
  elif kind is dict or origin is dict:
    if isinstance(literal(value), dict):
      return literal(value)
  elif kind is bool:
    if isinstance(literal(value), bool):
      return literal(value)
  elif kind is int:
    parsed = literal(value)
    if isinstance(parsed, float) and parsed.is_integer():
      parsed = int(parsed)
    if isinstance(parsed, int) and not isinstance(parsed, bool):
      return parsed
  elif kind is float:
    parsed = literal(value)
    if isinstance(parsed, int | float) and not isinstance(parsed, bool):
      try:
        return float(parsed)
      except OverflowError:
        pass  # Said below.
  else:
    raise TypeError(f"{where}: no rule reads the annotation {kind}")
  name = getattr(kind, "__name__", str(kind))
  raise ConfigError(f"{where}: got {value!r}, expected {name}")


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
  """Lines `"path: value in a → value in b"` where two `to_dict`s differ."""
  left, right = _flatten(a), _flatten(b)
  return [
    f"{k}: {left.get(k)!r} → {right.get(k)!r}"
    for k in sorted(left.keys() | right.keys())
    if left.get(k) != right.get(k)
  ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
