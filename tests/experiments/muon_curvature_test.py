"""The curvature study: its grammar, its matched losses, its record."""

import collections
import functools
import math
import subprocess
import sys

import numpy as np
import pytest

from experiments import errors, muon_curvature
from experiments.analyses import curvature_picture, pcfg, sources
from jaxlib_ext import records
from tests.experiments import runs


def options(tmp_path, **changes):
  return muon_curvature.Options(
    **{
      "exponents": (1.0,),
      "text": None,
      "optimizers": {"adam": 0.02},
      "search": False,
      "seeds": 1,
      "levels": (0.95, 0.9, 0.001),
      "steps": 26,
      "batch_size": 8,
      "measured": 8,
      "d_model": 16,
      "num_layers": 2,
      "record": tmp_path / "r.jsonl",
      **changes,
    }
  )


def test_balanced_grammar_is_balanced():
  """With an exponent of 0 every word is as frequent as any other."""
  grammar = pcfg.Grammar(0.0, symbols=4, rules=3, words=2)
  for children in grammar.children:
    assert set(collections.Counter(children.ravel().tolist()).values()) == {6}
  rows = grammar.sample(400, (0,))
  assert rows.shape == (400, grammar.seq_len + 1) and rows.dtype == np.int32
  sentences = rows[:, :-1].reshape(400, 8, 9)
  assert np.all(sentences[:, :, 0] == 0) and np.all(rows[:, -1] == 0)
  assert np.all(sentences[:, :, 1:] > 0)
  counts = np.bincount(sentences[:, :, 1:].ravel())[1:]
  # 3200 of each of 8; words of one sentence are correlated.
  assert len(counts) == 8 and np.all(np.abs(counts / 3200 - 1) < 0.15)


def test_imbalance_grows_with_the_exponent():
  shares = []
  for exponent in (0.0, 0.5, 1.0, 1.5):
    grammar = pcfg.Grammar(exponent)
    counts = np.bincount(grammar.sample(200, (0,)).ravel())[1:]
    shares.append(np.sort(counts)[-13:].sum() / counts.sum())
  # The most frequent tenth of 128 words.
  assert shares[0] < 0.15 and shares[-1] > 0.4
  assert shares == sorted(shares)


def test_sentences_follow_the_rules():
  """Each pair of words comes from a rule of a symbol of the level above."""
  grammar = pcfg.Grammar(0.5, depth=2, symbols=3, rules=2, words=2)
  rows = grammar.sample(50, (1,))[:, :-1].reshape(50, 8, 5)[:, :, 1:]
  leaves = (rows - 1) // 2
  last = grammar.children[1].reshape(-1, 2).tolist()
  made = collections.defaultdict(set)
  for symbol in range(3):
    for pair in grammar.children[1][symbol].tolist():
      made[tuple(pair)].add(symbol)
  first = {tuple(x) for x in grammar.children[0].reshape(-1, 2).tolist()}
  for a, b, c, d in leaves.reshape(-1, 4).tolist():
    assert [a, b] in last and [c, d] in last
    assert any(
      (x, y) in first for x in made[a, b] for y in made[c, d]
    )  # fmt: skip


def test_entropy_is_that_of_the_choices():
  grammar = pcfg.Grammar(0.0, depth=1, symbols=4, rules=2, words=8)
  want = (math.log(4) + math.log(2) + 2 * math.log(8)) / 3
  assert grammar.entropy == pytest.approx(want)
  assert pcfg.Grammar(1.5).entropy < pcfg.Grammar(0.5).entropy
  # Rows are the same for the same seed only.
  a, b, c = (grammar.sample(4, (seed,)) for seed in (0, 0, 1))
  assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.slow
def test_measures_at_matched_losses_and_resumes(tmp_path, capsys):
  points = muon_curvature.run(options(tmp_path))
  path = tmp_path / "r.jsonl"
  assert [r["reached"] for r in points] == [True, True, False]
  for r in points[:2]:
    assert r["loss"] <= r["target"] and r["step"] % 5 == 0 and r["git"]
    whole, hidden = r["whole"], r["hidden"]
    assert whole["within"] + whole["cross"] == pytest.approx(
      whole["curvature"], rel=1e-4, abs=1e-6
    )
    assert whole["nds"] == pytest.approx(
      whole["curvature"] / whole["norm"] ** 2, rel=1e-4
    )
    # The hidden matrices are a part of the step.
    assert 0 < hidden["norm"] < whole["norm"]
    # To second order in a step of this size.
    assert whole["actual"] == pytest.approx(whole["predicted"], abs=0.05)
  # What is missing is run again, and comes out the same.
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[1:]) + '{"cut')
  again = muon_curvature.run(options(tmp_path))
  assert len(records.read(path)) == 3
  assert again[0]["whole"] == points[0]["whole"]
  curvature_picture.draw(again, path)
  assert path.with_suffix(".png").stat().st_size > 1000
  assert "<svg" in path.with_suffix(".svg").read_text()
  table = curvature_picture.table(again).splitlines()
  assert len(table) == 4
  assert table[2].startswith("| exponent 1 | 0.95 | adam | 1 |")


@pytest.mark.slow
def test_searches_the_rate_that_is_soonest(tmp_path):
  points = muon_curvature.run(
    options(tmp_path, search=True, seeds=2, levels=(0.9,))
  )
  tried = collections.defaultdict(list)
  for r in records.read(tmp_path / "r.jsonl"):
    if r["seed"] == 0:
      tried[r["learning_rate"]].append(r.get("step", 26))
  assert len(tried) >= 3 and all(len(x) == 1 for x in tried.values())
  (rate,) = {r["learning_rate"] for r in points}
  assert [r["seed"] for r in points] == [0, 1]
  assert tried[rate] == min(tried.values())
  assert {rate / 2, rate * 2} <= set(tried)


def test_text_is_windows_of_bytes(tmp_path):
  text = sources.Text(str(runs.write_corpus(tmp_path / "text")))
  a, b = (text.batch(step, 4, 0) for step in (0, 1))
  assert a.shape == (4, 73) and a.dtype == np.int32
  assert not np.array_equal(a, b) and text.vocab_size >= 256
  assert text.held_out(2).shape == (2, 73)


def test_blocks_are_layers():
  got = muon_curvature.blocks(
    {"embed": 0, "layers": {"q": np.zeros((3, 2, 2))}, "head": 0}
  )
  assert got["embed"] == "embed" and got["head"] == "head"
  np.testing.assert_array_equal(got["layers"]["q"], [0, 1, 2])


def test_bad_flags_get_one_line(tmp_path):
  make = functools.partial(options, tmp_path)
  for changes, words in (
    ({"optimizers": {"lion": 1.0}}, "--optimizers: got 'lion'; allowed: muon"),
    ({"levels": (1.5,)}, "--levels: got 1.5; allowed: between 0 and 1"),
    ({"d_model": 12}, "--d_model: got 12; allowed: multiples of 8"),
  ):
    with pytest.raises(errors.UserError, match=words):
      make(**changes)
  done = subprocess.run(
    [sys.executable, "-m", "experiments.muon_curvature",
     "--optimizers=adam:fast"],
    cwd=runs.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert "--optimizers: expected numbers" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
