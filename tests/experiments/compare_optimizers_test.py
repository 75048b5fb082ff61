"""The search brackets its best rate; the table says what the runs gave."""

import concurrent.futures
import json
import math
import subprocess
import sys

import pytest

from experiments import compare_optimizers, errors
from tests.experiments import runs


class FakeRunner:
  """Losses by formula instead of training."""

  def __init__(self, loss):
    self.loss, self.rates = loss, []

  def submit(self, entrant, rate, seed):
    del entrant, seed
    self.rates.append(rate)
    future = concurrent.futures.Future()
    future.set_result({"final_eval_loss": self.loss(rate)})
    return future


@pytest.mark.parametrize("optimum", [0.001, 0.004, 0.016, 0.064])
def test_search_ends_inside_its_grid(optimum):
  runner = FakeRunner(lambda rate: abs(math.log2(rate / optimum)))
  best = compare_optimizers.search(runner, None, 0.004)
  assert best == pytest.approx(optimum)
  assert min(runner.rates) < best < max(runner.rates)
  assert len(set(runner.rates)) == len(runner.rates)


def test_divergence_is_worse_than_anything():
  runner = FakeRunner(lambda rate: math.inf if rate > 0.001 else 1.0)
  assert compare_optimizers.search(runner, None, 0.004) <= 0.001


def test_entrants():
  entrant = compare_optimizers.Entrant.parse("eco,quantization.format=int4:32")
  assert entrant.label == "eco int4:32"
  assert compare_optimizers.Entrant.parse("scale").name == (
    "column_normalized_sgd"
  )
  with pytest.raises(errors.UserError, match="did you mean 'muon'"):
    compare_optimizers.Entrant.parse("muonn")


def test_table_takes_the_best_rate_only():
  base = {"bits_per_byte": 2.0, "params_bytes": 100.0}
  base["optimizer_state_bytes"] = 28.0
  results = [
    {"optimizer": "a", "learning_rate": r, "seed": s, "final_eval_loss": x}
    | base
    for r, s, x in [(0.1, 0, 3.0), (0.1, 1, 5.0), (0.2, 0, 9.0)]
  ]
  row = compare_optimizers.table(results, {"a": 0.1}).splitlines()[-1]
  assert row == "| a | 0.1 | 4.0000 ± 1.4142 (2) | 2.000 | 128 |"


@pytest.mark.slow
def test_the_main_resumes_and_records(tmp_path):
  corpus = runs.write_corpus(tmp_path / "corpus")
  command = [
    sys.executable, "-m", "experiments.compare_optimizers", "--config=smoke",
    "--optimizer=scale", "--seeds=2", f"--workdir={tmp_path / 'runs'}",
    *(f"--set={s}" for s in runs.settings(corpus, "training.steps=2")),
  ]  # fmt: skip
  outputs = []
  for _ in range(2):
    done = subprocess.run(
      command, cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outputs.append(done.stdout)
  assert outputs[0] == outputs[1]
  lines = (tmp_path / "runs" / "record.jsonl").read_text().splitlines()
  seeds = {json.loads(line)["seed"] for line in lines}
  assert seeds == {0, 1}
