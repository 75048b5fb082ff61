"""Records survive kills: half a line is left out, rewriting is atomic."""

import json

import jax.numpy as jnp
import pytest

from jaxlib_ext import records


def test_append_then_read(tmp_path):
  path = tmp_path / "m.jsonl"
  assert records.read(path) == []
  records.append(path, {"step": 1, "loss": jnp.float32(0.5)})
  records.append(path, {"step": 2})
  assert records.read(path) == [{"step": 1, "loss": 0.5}, {"step": 2}]


def test_a_line_cut_by_a_kill_is_left_out_and_then_dropped(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert [r["step"] for r in records.read(path)] == [1, 2]
  records.keep(path, lambda r: r["step"] <= 1)
  assert path.read_text() == '{"step": 1}\n'
  assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_damage_in_the_middle_is_named(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
  with pytest.raises(ValueError, match="line 2"):
    records.read(path)


def test_provenance_is_json():
  facts = json.loads(json.dumps(records.provenance()))
  assert facts["versions"]["jax"]
  assert facts["device"]["count"] == 8
