"""The benchmark of sparse attention, at a size that takes no time."""

import json
import types

import jax.numpy as jnp
import pytest

from experiments import bench_sparse, errors

pytestmark = pytest.mark.slow

SIZES = dict(
  length=128, heads=2, size=8, block=16, block_q=32, density=0.25,
  dtype="float32",
)  # fmt: skip


def test_record_and_report():
  trial = bench_sparse.Trial(**SIZES, tail="mean")
  record = bench_sparse.measure(trial, 3, ("forward",))
  json.dumps(record)
  assert record["density"] == 0.25
  assert record["ideal"] == pytest.approx(1 / (0.25 + 1 / 16))
  turns = record["seconds"]["forward"]
  assert set(turns) == {
    "statistics", "selection", "attention", "together", "dense", "jax",
  }  # fmt: skip
  assert all(len(x) == 3 and min(x) > 0 for x in turns.values())
  over = record["speedup"]["forward"]["together over dense"]
  ratios = sorted(
    a / b for a, b in zip(turns["dense"], turns["together"], strict=True)
  )
  assert [over[x] for x in ("min", "median", "max")] == ratios
  share = record["of_ideal"]["forward"]["together"]
  assert share == pytest.approx(over["median"] / record["ideal"])
  text = bench_sparse.report({**SIZES, "tail": "mean", **record})
  assert "blocks of 32 queries and 16 keys" in text
  assert "density 0.2500, ideal speed-up 3.20" in text
  assert "together over dense" in text


def test_wrong_values_are_not_timed():
  trial = bench_sparse.Trial(**SIZES, tail="mean")
  attend = trial.attend

  def wrong(*args, implementation=None, **kwargs):
    out = attend(*args, implementation=implementation, **kwargs)
    return out if implementation == "reference" else out + jnp.float32(1e-3)

  trial.attend = wrong
  with pytest.raises(bench_sparse.DisagreementError, match="o is off by"):
    trial.check()


@pytest.mark.parametrize(
  "field, value, words",
  (
    ("tails", ["median"], "--tails: got 'median', allowed: drop, mean"),
    ("lengths", ["32"], "--lengths: got '32', allowed: ints from 64 up"),
    ("block_q", ["256"], "--lengths: got '128', allowed: ints from 256 up"),
    ("block_q", ["0"], "--block_q: got '0', allowed: ints from 1 up"),
    ("density", 0.0, "density must be a number in \\(0, 1\\], got 0.0"),
  ),
)
def test_bad_flags(monkeypatch, field, value, words):
  values = types.SimpleNamespace(
    lengths=["128"], tails=["mean"], density=0.25, heads=1, head_size=4,
    block=64, block_q=["64"], dtype="float32", gradients=False, rounds=1,
    record="",
  )  # fmt: skip
  setattr(values, field, value)
  monkeypatch.setattr(bench_sparse.flags, "FLAGS", values)
  monkeypatch.setattr(bench_sparse.host, "keep_freed_memory", lambda: None)
  with pytest.raises(errors.UserError, match=words):
    bench_sparse.main()
