"""Random overrides: a config that comes back from JSON, or one line."""

import dataclasses
import json

import pytest
from hypothesis import strategies as st

from experiments import configs, errors
from jaxlib_ext import config as config_lib
from tests.fuzz import budget

_GROUPS = ("optimizer", "quantization", "training", "mesh", "data")
_PATHS = [
  f"{group}.{field.name}"
  for group in _GROUPS
  for field in dataclasses.fields(getattr(configs.named(
    configs.CONFIGS, "smoke"), group))
] + [
  f"model.{name}"
  for name in ("num_heads", "d_model", "mixers", "window", "remat", "nothing")
]  # fmt: skip
_VALUES = st.one_of(
  st.integers(-(2**70), 2**70).map(str),
  st.floats(width=32).map(str),
  st.sampled_from(["", "none", "true", "muon", "eco", "int4:32", "[1", "1,2"]),
  st.text(max_size=8),
)


@budget.examples(
  60,
  5000,
  overrides=st.lists(
    st.tuples(st.sampled_from(_PATHS), _VALUES), min_size=1, max_size=3
  ),
)
def test_overrides(overrides):
  """Nothing but a UserError, and that in one line."""
  items = [f"{path}={value}" for path, value in overrides]
  try:
    config = configs.resolve("smoke", items)
  except errors.UserError as e:
    assert str(e) and "\n" not in str(e)
    return
  written = json.loads(json.dumps(config_lib.to_dict(config)))
  assert config_lib.from_dict(configs.Config, written) == config


def test_an_unknown_path_is_refused():
  with pytest.raises(errors.UserError):
    configs.resolve("smoke", ["nothing.at.all=1"])
