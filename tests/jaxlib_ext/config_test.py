"""Configurations: JSON there and back, overrides, errors that help."""

import dataclasses
import json
from typing import Any, Literal

import pytest

from jaxlib_ext import config


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 1e-3
  mode: Literal["fast", "slow"] = "fast"
  sizes: tuple[int, ...] = (1, 2)
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outer:
  name: str = "x"
  steps: int = 10
  flag: bool = False
  limit: float | None = None
  inner: Inner = Inner()


@pytest.mark.parametrize(
  ("path", "text", "expected"),
  [
    ("name", "3", "3"),
    ("steps", "1e3", 1000),
    ("flag", "true", True),
    ("flag", "False", False),
    ("limit", "none", None),
    ("limit", "2", 2.0),
    ("inner.rate", "3e-4", 3e-4),
    ("inner.mode", "slow", "slow"),
    ("inner.sizes", "3,4", (3, 4)),
    ("inner.sizes", "(5,)", (5,)),
    ("inner.extra.b2", "0.95", {"b2": 0.95}),
  ],
)
def test_replace_reads_text_as_the_fields_type(path, text, expected):
  got = config.replace(Outer(), path, text)
  names = path.split(".")[:2]
  for name in names:
    got = getattr(got, name)
  assert got == expected
  assert type(got) is type(expected)


@pytest.mark.parametrize(
  ("path", "text", "words"),
  [
    ("stepz", "1", ["'stepz'", "did you mean 'steps'", "inner"]),
    ("inner.rat", "1", ["'inner.rat'", "did you mean 'rate'"]),
    ("steps", "1.5", ["steps", "1.5", "int"]),
    ("steps", "true", ["steps", "int"]),
    ("flag", "1", ["flag", "bool"]),
    ("inner.rate", "fast", ["inner.rate", "float"]),
    ("inner.mode", "fats", ["inner.mode", "did you mean 'fast'"]),
    ("inner", "1", ["group of fields", "rate"]),
    ("steps.more", "1", ["'steps' has no fields"]),
    ("inner.sizes", "1,b", ["inner.sizes", "'b'", "int"]),
  ],
)
def test_replace_says_what_is_allowed(path, text, words):
  with pytest.raises(config.ConfigError) as e:
    config.replace(Outer(), path, text)
  for word in words:
    assert word in str(e.value)


def test_json_round_trip():
  value = config.replace(Outer(), "inner.sizes", "7,8,9")
  value = config.replace(value, "inner.extra.k", "[1, 2]")
  text = json.dumps(config.to_dict(value))
  assert config.from_dict(Outer, json.loads(text)) == value


def test_from_dict_refuses_unknown_fields():
  with pytest.raises(config.ConfigError, match="'inner.rates'.*'rate'"):
    config.from_dict(Outer, {"inner": {"rates": 1.0}})


def test_differences_name_paths():
  a, b = Outer(), config.replace(Outer(), "inner.rate", 0.5)
  assert config.differences(config.to_dict(a), config.to_dict(b)) == [
    "inner.rate: 0.001 → 0.5"
  ]
