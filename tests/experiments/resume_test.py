"""A run that was killed writes the same bits as one that was not."""

import json
import os
import signal

import jax
import pytest

from experiments import configs, errors, loop
from jaxlib_ext import records
from tests.experiments import runs

# Muon's state holds what the others' do: AdamW's under it, momentum. ECO draws
# random bits at every step. With the steps at which they are killed: before the
# first checkpoint (step 4), after it, after the second.
OPTIMIZERS = {
  "muon": ((), (9,)),
  "eco": (("quantization.format=int4:32",), (2, 6, 9)),
}


def losses(workdir):
  return [
    (m["step"], m["loss"], m.get("eval_loss"))
    for m in records.read(workdir / "metrics.jsonl")
  ]


@pytest.fixture
def corpus(tmp_path):
  return runs.write_corpus(tmp_path / "corpus")


def test_what_a_run_leaves(tmp_path, corpus):
  workdir = tmp_path / "run"
  summary = runs.run(workdir, runs.settings(corpus))
  names = {p.name for p in workdir.iterdir()}
  assert names >= {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "summary.json",
    "loss.png",
    "tensorboard",
  }
  metrics = records.read(workdir / "metrics.jsonl")
  assert [m["step"] for m in metrics] == list(range(1, 13))
  for key in ("tokens", "tokens_per_second", "peak_bytes", "corpus"):
    assert metrics[-1][key]
  assert [m["step"] for m in metrics if "eval_loss" in m] == [6, 12]
  assert metrics[-1]["loss"] < metrics[0]["loss"]
  assert summary["final_eval_loss"] == metrics[-1]["eval_loss"]
  assert summary["versions"]["jax"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_resumed_is_bit_identical(tmp_path, corpus, optimizer):
  more, steps = OPTIMIZERS[optimizer]
  settings = runs.settings(corpus, f"optimizer.name={optimizer}", *more)
  runs.run(tmp_path / "whole", settings)
  killed = tmp_path / "killed"
  for step in steps:
    process = runs.start(killed, settings)
    runs.wait_for_step(process, killed, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  runs.run(killed, settings)
  runs.assert_same_bits(
    runs.final_state(tmp_path / "whole", settings),
    runs.final_state(killed, settings),
  )
  assert losses(tmp_path / "whole") == losses(killed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_leaves_cleanly(tmp_path, corpus, name):
  settings = runs.settings(
    corpus, "training.checkpoint_every=0", "training.steps=2000"
  )
  workdir = tmp_path / "run"
  process = runs.start(workdir, settings)
  runs.wait_for_step(process, workdir, 5)
  process.send_signal(getattr(signal, name))
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert f"{name}: saved step" in out
  saved = runs.final_state(workdir, settings).step
  assert saved >= 5
  assert records.read(workdir / "metrics.jsonl")[-1]["step"] == saved


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_previous_used(
  tmp_path, corpus
):
  settings = runs.settings(corpus)
  workdir = tmp_path / "run"
  runs.run(workdir, settings)
  whole = runs.final_state(workdir, settings)
  latest = workdir / "checkpoints" / "step_12"
  files = [p for p in latest.rglob("*") if p.is_file() and "/d/" in str(p)]
  largest = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 64] = bytes(64)
  largest.write_bytes(content)
  # In a process of its own: what tensorstore drops when a read fails is an
  # error of whatever test the garbage collector finds it in.
  process = runs.start(workdir, settings)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  assert "checkpoint of step 12 is damaged" in err
  assert (workdir / "damaged_step_12").is_dir()
  runs.assert_same_bits(whole, runs.final_state(workdir, settings))


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(tmp_path, corpus):
  settings = runs.settings(corpus)
  runs.run(tmp_path, settings)
  before = losses(tmp_path)
  summary = runs.run(tmp_path, settings)
  assert summary["step"] == 12
  assert losses(tmp_path) == before


@pytest.mark.slow
def test_a_refused_run_leaves_no_tokenizer_behind(tmp_path, corpus):
  settings = runs.settings(
    corpus, "training.steps=1", "training.warmup_steps=0"
  )
  refused = settings + ["data.tokenizer=bpe:300", "model.vocab_size=10"]
  with pytest.raises(errors.UserError, match="model.vocab_size"):
    runs.run(tmp_path / "run", refused)
  assert os.listdir(tmp_path / "run") == ["run.lock"]
  runs.run(tmp_path / "run", settings + ["data.tokenizer=bpe:280"])
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["model"]["vocab_size"] == 280


@pytest.mark.slow
def test_an_evaluation_between_two_logged_steps_is_a_whole_record(
  tmp_path, corpus
):
  settings = runs.settings(
    corpus, "training.log_every=5", "training.eval_every=4"
  )
  runs.run(tmp_path, settings)
  metrics = records.read(tmp_path / "metrics.jsonl")
  assert [m["step"] for m in metrics] == [4, 5, 8, 10, 12]
  assert all("loss" in m and "seconds" in m for m in metrics)


def test_a_large_step_on_a_cpu_waits_for_the_one_before(
  tmp_path, corpus, monkeypatch
):
  """Whose memory it takes, and nothing else changes."""
  settings = runs.settings(corpus, "training.log_every=6")
  runs.run(tmp_path / "small", settings)
  monkeypatch.setattr(loop, "_LARGE_STEP", 0)
  run = loop.Run(configs.resolve("smoke", settings), tmp_path / "large")
  step, waited = run.trainer.step, []
  assert run.trainer.compiled  # From the step that is replaced here.

  def watched(state, tokens):
    waited.append(all(x.is_ready() for x in jax.tree.leaves(state)))
    return step(state, tokens)

  run.trainer.step = watched
  run.train()
  assert waited == [True] * 12
  assert losses(tmp_path / "large") == losses(tmp_path / "small")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_not_saved(tmp_path, corpus):
  """Though the step is neither logged nor evaluated."""
  settings = runs.settings(
    corpus,
    "optimizer.name=sgd",
    "optimizer.learning_rate=1e38",
    "training.warmup_steps=0",
    "training.log_every=6",
  )
  with pytest.raises(errors.UserError, match="loss is nan at step 4"):
    runs.run(tmp_path / "run", settings)
  assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
