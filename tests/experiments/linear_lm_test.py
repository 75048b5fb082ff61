"""Sizes are equal, runs are exact and read back, mistakes get one line."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import data, errors, linear_lm
from experiments.linear import learner as learner_lib
from experiments.linear import synthetic
from experiments.linear import tasks as task_lib
from jaxlib_ext import config as config_lib
from jaxlib_ext import records, specs
from models import decode, transformer
from tests.experiments import runs

EVERY = [*linear_lm.MIXERS, "gla", "linear"]


class Bar:
  """Counts the steps it is told of."""

  def __init__(self):
    self.steps, self.total = 0, 0

  def update(self, steps=1):
    self.steps += steps

  def set_postfix_str(self, text, refresh):
    pass

  set_description_str = set_postfix_str


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
  """Compilation is most of the time here: done once."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(learner_lib, "Learner", functools.cache(learner_lib.Learner))
    yield


@pytest.fixture(scope="module")
def small():
  """A task of a second."""
  task = task_lib.get("mqar", 4)
  return dataclasses.replace(
    task,
    model=dict(d_model=8, num_layers=1, num_heads=1, d_ff=64),
    source=synthetic.Recall(seq_len=8, levels=(1, 2), keys=3, values=3),
    training=dataclasses.replace(
      task.training, seq_len=8, batch_size=4, eval_every=3, eval_batches=2
    ),
  )


@pytest.fixture(scope="module")
def learner(small):
  """One compiled model for several tests, and its data."""
  source = small.load(None)
  target = learner_lib.target_size(small, source.vocab_size)
  cfg = learner_lib.matched(small, {}, source.vocab_size, target)
  return learner_lib.Learner(cfg, small.training), source


@pytest.mark.parametrize("name", task_lib.TASKS)
def test_sizes_agree_to_a_percent(name):
  task = task_lib.get(name)
  vocab_size = task.source.vocab_size if task.source else 1024
  target = learner_lib.target_size(task, vocab_size)
  mixers = [*EVERY, "gdn+full"] if task.model["num_layers"] >= 4 else EVERY
  for mixer in mixers:
    cfg = learner_lib.matched(task, linear_lm.fields(mixer), vocab_size, target)
    size = specs.count(transformer.param_specs(cfg))
    assert abs(size - target) <= 0.01 * target, mixer


def test_sizes_that_cannot_agree_are_refused(small):
  task = dataclasses.replace(small, model={**small.model, "d_ff": 4})
  target = learner_lib.target_size(task, 7)
  with pytest.raises(errors.UserError, match="--mixers: kda has .* too far"):
    learner_lib.matched(task, {"mixers": ("kda",)}, 7, target)


def test_state_bytes():
  """Of softmax by hand; of linear mixers whatever the length."""
  cfg = transformer.Config(d_model=32, num_layers=3, num_heads=2)
  assert decode.cache_bytes(cfg, 50) == 3 * 2 * 50 * 32 * 4
  sizes = {}
  for mixer in ("gdn", "mdn"):
    cfg = dataclasses.replace(cfg, mixers=(mixer,))
    sizes[mixer] = decode.cache_bytes(cfg, 50)
    assert decode.cache_bytes(cfg, 5000) == sizes[mixer]
  tails, memory = 3 * 3 * 3 * 32 * 4, 3 * 2 * 16 * 16 * 4
  assert sizes == {"gdn": tails + memory, "mdn": tails + 2 * memory}


@pytest.mark.slow
def test_evaluation_against_a_loop(learner):
  model, source = learner
  params = transformer.init(jax.random.key(0), model.cfg)
  got = model.evaluate(params, source.held_out())
  nats, hits, count = 0.0, {}, {}
  for level, (tokens, targets, weights) in source.held_out():
    out = transformer.apply(params, tokens, cfg=model.cfg).logits
    logits = np.asarray(out, np.float64)
    for b, t in np.argwhere(weights):
      row, answer = logits[b, t], targets[b, t]
      nats -= row[answer] - math.log(sum(math.exp(x) for x in row))
      hits[level] = hits.get(level, 0) + (row.argmax() == answer)
      count[level] = count.get(level, 0) + 1
  # The same float32 logits; sums of 24 float32 terms.
  assert got["eval_loss"] == pytest.approx(nats / sum(count.values()), 1e-5)
  assert got["accuracy"] == pytest.approx(
    {level: hits[level] / count[level] for level in count}, 1e-6
  )
  assert list(got["accuracy"]) == ["1", "2"]


@pytest.mark.slow
def test_a_run_is_exact_and_its_curve_whole(learner):
  model, source = learner
  bar = Bar()
  first, again = (model.run(source, 0.01, 0, bar) for _ in range(2))
  assert first == again
  assert bar.steps == 8
  assert [p["step"] for p in first["curve"]] == [3, 4]
  assert first["curve"][-1]["eval_loss"] == first["final_eval_loss"]
  assert first["tokens"] == 4 * 4 * 8
  for rate, seed in ((0.02, 0), (0.01, 1)):
    other = model.run(source, rate, seed, bar)
    assert other["final_eval_loss"] != first["final_eval_loss"]


def test_a_run_that_diverges_ends_and_is_worst(learner):
  model, source = learner
  bar = Bar()
  result = model.run(source, math.nan, 0, bar)
  assert result["final_eval_loss"] == math.inf
  assert bar.steps == 4 and len(result["curve"]) == 1


def test_text_shifts_by_one():
  tokens = np.arange(100, dtype=np.int32)
  tokenizer = type("T", (), {"vocab_size": 100})()
  corpus = data.Corpus(tokens, tokens[:12], tokenizer, "0", {})
  training = dataclasses.replace(
    task_lib.get("text").training, batch_size=2, seq_len=5
  )
  text = task_lib.Text(corpus, training)
  batch = text.batch(0, 7)
  np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
  assert batch.tokens.shape == (2, 5) and np.all(batch.weights == 1)
  batches = [b for _, b in text.held_out()]
  answers = np.concatenate([b.targets[b.weights == 1] for b in batches])
  np.testing.assert_array_equal(np.sort(answers), np.arange(1, 12))


def test_names_of_mixers():
  own = {"output_gate": "own"}
  assert linear_lm.fields("gdn") == {"mixers": ("gdn",), **own}
  assert linear_lm.fields("gdn+full") == {
    "mixers": ("gdn", "gdn", "gdn", "full"),
    **own,
  }
  assert linear_lm.fields("mdn:silu") == {
    "mixers": ("mdn",),
    "output_gate": "silu",
  }
  for text, words in (
    ("gnd", "did you mean 'gdn'"),
    ("a+b", "'a'"),
    ("gdn+kda+full", "a hybrid is of two"),
    ("gdn:relu", "behind the colon: silu"),
  ):
    with pytest.raises(errors.UserError, match=words):
      linear_lm.fields(text)


def options(path, **changes):
  return linear_lm.Options(
    **{
      "tasks": ("mqar",),
      "mixers": ("linear", "full"),
      "seeds": 2,
      "steps": 0,
      "workdir": path,
      "record": path / "record.jsonl",
    }
    | changes
  )


@pytest.mark.slow
def test_the_comparison_resumes(tmp_path, small, monkeypatch, capsys):
  monkeypatch.setitem(task_lib.TASKS, "mqar", small)
  settings = options(tmp_path)
  linear_lm.compare(settings)
  table = capsys.readouterr().out
  whole = records.read(settings.record)
  for mixer in settings.mixers:
    own = [r for r in whole if r["mixer"] == mixer]
    losses = {
      r["learning_rate"]: r["final_eval_loss"] for r in own if r["seed"] == 0
    }
    best = min(losses, key=losses.get)
    assert min(losses) < best < max(losses)
    assert [r["learning_rate"] for r in own if r["seed"] == 1] == [best]
    assert f"| {mixer} |" in table
  plots = {p: p.read_bytes() for p in tmp_path.glob("record_mqar.*")}
  assert {p.suffix for p in plots} == {".png", ".svg"}

  # A kill between two runs, and in the middle of a line.
  text = settings.record.read_text()
  settings.record.write_text(text[: len(text) - len(text.splitlines()[-1])])
  linear_lm.compare(settings)
  assert capsys.readouterr().out == table
  strip = lambda rs: [{**r, "git": None} for r in rs]
  assert strip(records.read(settings.record)) == strip(whole)
  assert plots == {p: p.read_bytes() for p in plots}

  # Other settings are other runs; a field that a record lacks, as it came
  # later, has its default.
  old = records.read(settings.record)
  for record in old:
    del record["model"]["output_gate"]
  settings.record.write_text("".join(json.dumps(r) + "\n" for r in old))
  changed = dataclasses.replace(small, model={**small.model, "norm_eps": 1e-5})
  trained = []
  monkeypatch.setattr(
    linear_lm.Runner, "_train", lambda *args: trained.append(args) or {}
  )
  for task in (small, changed):
    runner = linear_lm.Runner(task, settings, Bar())
    runner.expected = 1
    runner.run("full", small.learning_rate, 0)
  assert len(trained) == 1


def test_the_table():
  make = lambda seed, loss: {
    "mixer": "gdn",
    "learning_rate": 0.1,
    "seed": seed,
    "final_eval_loss": loss,
    "accuracy": {"4": 0.5, "8": 0.25 * seed},
    "parameters": 1234,
    "state_bytes": 99,
  }
  results = [make(1, 5.0), make(0, 3.0), {**make(0, 9.0), "mixer": "x"}]
  best = linear_lm.summarize(results, {"gdn": 0.1})
  row = linear_lm.table("mqar", best).splitlines()[-1]
  assert row == (
    "| gdn | 1,234 | 99 | 0.1 | 4.0000 ± 1.4142 (2) | 50.0 ± 0.0 % | "
    "12.5 ± 17.7 % |"
  )


def test_options_are_checked_before_anything_is_written(tmp_path):
  for changes, words in (
    ({"tasks": ("mqar", "mqar")}, "--task: got 'mqar,mqar'"),
    ({"mixers": ()}, "--mixers: got ''"),
    ({"tasks": ("mqar", "mqr")}, "--task: .* did you mean 'mqar'"),
    ({"mixers": ("gdn+full",)}, "--mixers: gdn.full needs 4 layers"),
  ):
    with pytest.raises(errors.UserError, match=words):
      linear_lm.compare(options(tmp_path / "new", **changes))
  assert not (tmp_path / "new").exists()


def test_bad_flags_get_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.linear_lm", f"--workdir={tmp_path}",
     "--mixers=full,gnd"],
    cwd=runs.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert len(done.stderr.strip().splitlines()) == 1
  assert "linear_lm: --mixers: no mixer 'gnd'; did you mean" in done.stderr


def test_settings_are_plain_json():
  for name in task_lib.TASKS:
    task = task_lib.get(name, 30)
    settings = config_lib.to_dict(task.training)
    assert json.loads(json.dumps(settings)) == settings
    assert settings["steps"] == 30 and settings["eval_every"] == 3
