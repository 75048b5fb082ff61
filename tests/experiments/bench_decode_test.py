"""The decode benchmark: what it checks, counts and writes."""

import dataclasses
import pathlib
import types

import pytest

from experiments import bench_decode, errors
from jaxlib_ext import records
from models import decode, transformer

pytestmark = pytest.mark.slow

TINY = transformer.Config(
  vocab_size=32, d_model=16, num_layers=1, num_heads=1, d_ff=16
)


@pytest.fixture
def flags(monkeypatch, tmp_path):
  """What main reads, small."""
  values = types.SimpleNamespace(
    mixers=["linear", "full"],
    lengths=["8"],
    rounds=1,
    steps=2,
    record=str(tmp_path / "records" / "out.jsonl"),
  )
  monkeypatch.setattr(bench_decode.flags, "FLAGS", values)
  monkeypatch.setattr(bench_decode, "MIXERS", ("linear", "full"))
  monkeypatch.setattr(bench_decode, "CONFIG", TINY)
  monkeypatch.setattr(bench_decode.host, "keep_freed_memory", lambda: None)
  return values


def test_main(flags, capsys):
  bench_decode.main()
  assert capsys.readouterr().out.count("\n") == 3
  (record,) = records.read(flags.record)
  full, linear = sorted(record["rows"], key=lambda row: row["mixer"])
  for row in (full, linear):
    assert row["prefill"]["median"] > 0 and row["decode"]["min"] > 0
  # Keys and values of 16 float32 numbers for each token; and one 16 x 16
  # state beside three tokens of q, k and v before their convolutions.
  assert full["cache_bytes"] == 8 * 2 * 16 * 4
  assert linear["cache_bytes"] == 4 * (16 * 16 + 3 * 3 * 16)
  for suffix in (".png", ".svg"):
    path = pathlib.Path(flags.record).with_suffix(suffix)
    assert path.stat().st_size > 5_000


def test_only_softmax_grows():
  for mixer, ratio in (("full", 4), ("gdn", 1), ("mamba2", 1)):
    cfg = dataclasses.replace(TINY, mixers=(mixer,))
    size = decode.cache_bytes
    assert size(cfg, 64) == ratio * size(cfg, 16)


def test_main_times_nothing_that_disagrees(flags, capsys, monkeypatch):
  flags.mixers = ["full"]
  monkeypatch.setattr(bench_decode, "_TOLERANCE", 0.0)
  with pytest.raises(SystemExit, match="full: decoded logits differ"):
    bench_decode.main()
  assert not capsys.readouterr().out
  assert not records.read(flags.record)


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("mixers", ["mdm"], "--mixers: got .*'mdm'"),
    ("lengths", ["8k"], "--lengths: .*'8k'"),
    ("lengths", ["0"], "--lengths: got .*1 or more"),
  ],
)
def test_bad_flags(flags, field, value, words):
  setattr(flags, field, value)
  with pytest.raises(errors.UserError, match=words):
    bench_decode.main()
