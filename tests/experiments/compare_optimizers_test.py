"""Searches end inside their grids; the table says what the runs gave."""

import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from scipy import stats

from experiments import compare_optimizers, configs, errors, optimizers
from experiments.comparison import entrants, picture, runner, search, standings
from jaxlib_ext import config as config_lib
from jaxlib_ext import records
from tests.experiments import runs


def asked(loss, log):
  def losses_of(values):
    log.extend(values)
    return [loss(v) for v in values]

  return losses_of


@pytest.mark.parametrize("optimum", [0.001, 0.004, 0.016, 0.064])
def test_search_ends_inside_its_grid(optimum):
  log = []
  losses_of = asked(lambda rate: abs(math.log2(rate / optimum)), log)
  best, spent = search.along(losses_of, 0.004)
  assert best == pytest.approx(optimum)
  assert min(log) < best < max(log)
  assert len(set(log)) == len(log) == spent + 1


def test_divergence_is_worse_than_anything():
  losses_of = asked(lambda rate: math.inf if rate > 0.001 else 1.0, [])
  assert search.along(losses_of, 0.004)[0] <= 0.001


def test_search_without_an_optimum_ends():
  log = []
  search.along(asked(lambda rate: rate, log), 1.0)
  assert len(log) <= 13
  log.clear()
  point = search.coordinates(
    asked(lambda p: math.inf, log), search.Point(1.0, 0.1), {"weight_decay": 6}
  )
  assert point.weight_decay == 0.1


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 20])
def test_both_coordinates(budget):
  # The best rate depends on the decay, as it does of a network.
  def loss(p):
    rate, decay = np.log2(p[:2])
    return (rate + decay - 3) ** 2 + 0.1 * (decay - 2) ** 2

  log, start = [], search.Point(1.0, 1.0)
  best = search.coordinates(asked(loss, log), start, {"weight_decay": budget})
  assert len(set(log)) == len(log)
  step = lambda field, factor: best._replace(
    **{field: factor * getattr(best, field)}
  )
  for factor in (0.5, 2.0):
    other = step("learning_rate", factor)
    assert other in log and loss(other) > loss(best)
  if budget == 20:
    for factor in (0.5, 2.0):
      other = step("weight_decay", factor)
      assert other in log and loss(other) > loss(best)
  if budget < 2:
    assert {p.weight_decay for p in log} == {1.0}
  assert loss(best) == min(map(loss, log))


def test_no_decay_stays():
  log = []
  search.coordinates(
    asked(lambda p: p.learning_rate, log),
    search.Point(1.0, 0.0),
    {"weight_decay": 6},
  )
  assert {p.weight_decay for p in log} == {0.0}


@pytest.mark.parametrize("optimum", [0.25, 1.0, 8.0])
def test_a_rate_for_the_fallback(optimum):
  # The matrices' best rate is 2, whatever that of the rest is.
  def loss(p):
    rate, rest = p.learning_rate, p.value(optimizers.FALLBACK_RATE)
    return math.log2(rate / 2) ** 2 + 0.3 * math.log2(rest / optimum) ** 2

  log = []
  best = search.coordinates(
    asked(loss, log), search.Point(1.0, 0.1), {optimizers.FALLBACK_RATE: 20}
  )
  assert best == (2.0, 0.1, optimum)
  # A rate that is the learning rate is none of its own: never asked for twice.
  assert len(set(log)) == len(log)
  assert all(p.fallback_learning_rate != p.learning_rate for p in log)
  log.clear()
  best = search.coordinates(
    asked(loss, log), search.Point(1.0, 0.1), {optimizers.FALLBACK_RATE: 0}
  )
  assert {p.fallback_learning_rate for p in log} == {None}


def test_entrants():
  entrant = entrants.Entrant.parse("eco,quantization.format=int4:32")
  assert entrant.label == "eco int4:32"
  assert entrants.Entrant.parse("scale").name == "column_normalized_sgd"
  with pytest.raises(errors.UserError, match="did you mean 'muon'"):
    entrants.Entrant.parse("muonn")


def line(label, rate, decay, seed, loss, size=128.0, fallback=None):
  optimizer = {"learning_rate": rate, "weight_decay": decay, "arguments": {}}
  if fallback is not None:
    optimizer["arguments"][optimizers.FALLBACK_RATE] = fallback
  return {
    "config": {"optimizer": optimizer},
    "optimizer": label,
    "learning_rate": rate,
    "weight_decay": decay,
    "seed": seed,
    "final_eval_loss": loss,
    "bits_per_byte": 2.0,
    "params_bytes": 100.0,
    "optimizer_state_bytes": size - 100,
    "name": "job",
    "parameters": 25,
    "tokens": 1000,
    "corpus": {"hash": "abc"},
  }


def test_the_best_point_is_among_the_complete_ones():
  lines = [
    line("a", 0.1, 0.1, 0, 3.0),
    line("a", 0.1, 0.1, 1, 5.0),
    line("a", 0.2, 0.1, 0, 2.0),
    line("a", 0.05, 0.1, 0, 9.0),
    line("a", 0.1, 0.2, 0, 9.0),
  ]
  s = standings.stand("a", lines, seeds=2)
  assert s.point == (0.1, 0.1, None) and s.losses == [3.0, 5.0]
  assert s.edges == {"weight_decay"}
  assert standings.stand("a", lines, seeds=3).point == (0.1, 0.1, None)
  s = standings.stand("a", lines, seeds=1)
  assert s.point == (0.2, 0.1, None)
  assert s.edges == {"learning_rate", "weight_decay"}
  assert standings.stand("a", [], seeds=1) is None


def test_a_fallbacks_rate_has_edges_where_it_was_searched():
  lines = [
    line("a", 0.1, 0.1, 0, 3.0, fallback=0.2),
    line("a", 0.1, 0.1, 0, 4.0),
    line("a", 0.1, 0.1, 0, 5.0, fallback=0.4),
    line("a", 0.1, 0.1, 1, 3.0, fallback=0.2),
  ]
  s = standings.stand("a", lines, seeds=1)
  # Silence is the learning rate: half of 0.2.
  assert s.point == (0.1, 0.1, 0.2)
  assert s.edges == {"learning_rate", "weight_decay"}
  s = standings.stand("a", lines[:2], seeds=1)
  assert optimizers.FALLBACK_RATE in s.edges
  assert "| 0.1° | 0.1° | 0.2° | 3.0000 (1) |" in standings.table([s])


def three(label, losses, size=128.0):
  lines = [line(label, 0.1, 0.1, i, x, size) for i, x in enumerate(losses)]
  return standings.stand(label, lines, len(losses))


def test_noise_and_the_rule():
  a, b = three("a", [3.0, 3.1, 3.2]), three("b", [2.0, 2.3])
  lost = three("c", [2.0, math.inf])
  noise = standings.noise([a, b, lost])
  # Two degrees of freedom at variance 0.01 and one at 0.045.
  assert noise.freedom == 3
  assert noise.deviation == pytest.approx(math.sqrt((0.02 + 0.045) / 3))
  # The rule against the t-test that it restates.
  t = (a.mean - b.mean) / (noise.deviation * math.sqrt(1 / 3 + 1 / 2))
  assert noise.differ(a, b) == (stats.t.sf(t, 3) < 0.001)
  close = standings.Noise(0.01, 50)
  assert close.differ(a, b) and not close.differ(a, three("d", [3.1, 3.12]))
  unknown = standings.noise([three("a", [1.0]), three("b", [2.0])])
  assert not unknown.differ(three("a", [1.0]), three("b", [2.0]))


def test_table():
  text = standings.table(
    [
      three("a", [3.0, 3.1]),
      three("b", [1.0, 1.1]),
      three("c", [math.inf]),
      three("d", [9.0]),
    ]
  )
  caption, _, _, _, *rows = text.splitlines()
  assert "25 parameters, 1,000 training tokens, corpus abc" in caption
  assert "2 degrees of freedom): 0.0707" in caption
  assert rows == [
    "| b | 0.1° | 0.1° |  | 1.0500 ± 0.0707 (2) | -2.0000* |  | 2.000 | 128 |",
    "| a | 0.1° | 0.1° |  | 3.0500 ± 0.0707 (2) |  | +2.0000* | 2.000 | 128 |",
    "| d | 0.1° | 0.1° |  | 9.0000 (1) | +5.9500* | +7.9500* | 2.000 | 128 |",
    "| c | 0.1° | 0.1° |  | diverged | | | | |",
  ]


def test_front_and_labels():
  found = [
    three("small", [3.0], 120.0),
    three("bad", [3.5], 130.0),
    three("good", [2.0], 140.0),
    three("big", [2.5], 150.0),
  ]
  assert [s.label for s in picture.front(found)] == ["small", "good"]
  assert picture.apart([0.0, 0.1, 5.0], 1.0) == [0.0, 1.0, 5.0]
  assert picture.top([1.0, 1.1, 1.2, 9.0]) == pytest.approx(1.45)


def test_the_picture_is_the_same_twice(tmp_path):
  found = [three("a", [3.0, 3.1], 120.0), three("b", [9.0], 150.0)]
  drawn = []
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
    picture.draw(tmp_path / name / "job_pareto", found)
    drawn.append((tmp_path / name / "job_pareto.svg").read_bytes())
    assert (tmp_path / name / "job_pareto.png").stat().st_size > 1000
  assert drawn[0] == drawn[1]


def test_which_records_are_of_a_job():
  adamw = entrants.Entrant.parse("adamw")
  comparison = runner.Comparison("smoke", ["data.source=files", "data.path=x"])
  job = comparison.job(adamw)

  def recorded(*overrides):
    config = configs.resolve("smoke", overrides)
    return comparison.recorded({"config": config_lib.to_dict(config)})

  same = ["data.source=files", "data.path=x"]
  assert recorded(*same, "training.seed=7", "mesh.data=2") == job
  assert recorded(*same, "optimizer.learning_rate=1") == job
  muon = comparison.job(entrants.Entrant.parse("muon"))
  other = "optimizer.fallback_learning_rate=1"
  assert recorded(*same, "optimizer.name=muon", other) == muon
  assert recorded(*same, "training.steps=7") != job
  assert recorded(*same, "optimizer.b1=0.5") != job
  assert comparison.recorded({}) is None
  # The interpreter's library is another corpus with another version.
  python = runner.Comparison("smoke", [])
  config = config_lib.to_dict(configs.resolve("smoke"))
  old = {"config": config, "corpus": {"python": "3.1.4"}}
  assert python.recorded(old) != python.job(adamw)


def test_the_record_of_the_repository_is_read():
  comparison = runner.Comparison("compare", [])
  path = runs.ROOT / "experiments/records/compare_optimizers.jsonl"
  lines = [r for r in records.read(path) if r["name"] == "compare"]
  assert len(lines) == 28
  assert all(comparison.recorded(r) for r in lines)


STUB = """
import json, math, pathlib, signal, sys, time
arguments = [a.split("=", 1) for a in sys.argv[1:]]
workdir = pathlib.Path(dict(arguments)["--workdir"])
given = dict(v.split("=", 1) for k, v in arguments if k == "--set")
rate = math.log2(float(given["optimizer.learning_rate"]) / RATE)
rest = 2
if given["optimizer.name"] == "muon":
  field = "optimizer.fallback_learning_rate"
  rest = math.log2(float(given.get(field, RATE * 2**rate)) / RATE) - rate
decay = math.log2(float(given["optimizer.weight_decay"]) / 0.1)
workdir.mkdir(parents=True)
(workdir / "checkpoints").mkdir()
corpus = {"hash": "abc"}
config = {"config": {"name": "smoke"}, "model": {}, "corpus": corpus}
(workdir / "config.json").write_text(json.dumps(config))
if SLEEP:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  time.sleep(20)
if rate > 1:
  sys.exit("pretrain: the loss is nan at step 7")
if rate < -2:
  sys.exit("pretrain: the disk is full")
loss = 2 + (rate + decay - 1) ** 2 + decay**2 / 4 + (rest - 2) ** 2
summary = {
  "name": "smoke", "parameters": 25, "tokens": 1000, "corpus": corpus,
  "final_eval_loss": loss + 0.01 * int(given["training.seed"]),
  "bits_per_byte": 2.0, "params_bytes": 100, "optimizer_state_bytes": 28,
  "sample": "text",
}
(workdir / "summary.json").write_text(json.dumps(summary))
"""


def options(tmp_path, monkeypatch, rate, sleep=False, *names):
  """A comparison of stubs with the optimum at twice `rate`, decay 0.1."""
  stub = tmp_path / "stub.py"
  stub.write_text(f"RATE, SLEEP = {rate}, {sleep}\n{STUB}")
  monkeypatch.setattr(runner, "PROGRAM", (str(stub),))
  shared = ["data.source=files", "data.path=x"]
  return compare_optimizers.Options(
    comparison=runner.Comparison("smoke", shared),
    entrants=tuple(map(entrants.Entrant.parse, names or ["adamw"])),
    seeds=3,
    budgets={optimizers.FALLBACK_RATE: 6, "weight_decay": 6},
    jobs=2,
    workdir=tmp_path / "runs",
    record=tmp_path / "all.jsonl",
  )


def test_a_comparison(tmp_path, monkeypatch):
  job = options(tmp_path, monkeypatch, 0.003)
  assert not compare_optimizers.run(job)
  text = compare_optimizers.report(job)
  # A worse neighbour on all four sides; one of them diverged.
  assert "| adamw | 0.006 | 0.1 |  | 2.0100 ± 0.0100 (3) |" in text
  lines = records.read(job.record)
  points = [(r["learning_rate"], r["weight_decay"], r["seed"]) for r in lines]
  assert len(set(points)) == len(points)
  assert any(r.get("diverged") for r in lines)
  assert "sample" not in lines[0]
  assert not list(job.workdir.glob("*/checkpoints"))
  # From the record alone, with a line that a kill cut short.
  job.workdir.rename(tmp_path / "elsewhere")
  with open(job.record, "a") as f:
    f.write('{"optimizer": "ada')
  assert not compare_optimizers.run(job)
  assert compare_optimizers.report(job) == text
  assert records.read(job.record) == lines
  job.workdir.rmdir()
  # Nor is another job's directory taken for a run's.
  job.record.unlink()
  (tmp_path / "elsewhere").rename(job.workdir)
  failed = compare_optimizers.run(job)
  assert "holds a run of another config" in failed["adamw"]
  for suffix in (".png", ".svg"):
    assert (tmp_path / f"smoke_pareto{suffix}").exists()


def test_muons_rest_has_a_rate_of_its_own(tmp_path, monkeypatch):
  # The stub's optimum is at four times the matrices' rate.
  job = options(tmp_path, monkeypatch, 0.008, False, "muon")
  assert not compare_optimizers.run(job)
  row = "| 0.016 | 0.1 | 0.064 | 2.0100 ± 0.0100 (3) |"
  assert f"| muon {row}" in compare_optimizers.report(job)
  # Another start of the search is the same job: no run is made twice, ...
  name = "muon,optimizer.fallback_learning_rate=0.032"
  job = options(tmp_path, monkeypatch, 0.008, False, name)
  assert not compare_optimizers.run(job)
  assert f"| muon 0.032 {row}" in compare_optimizers.report(job)
  found = records.read(job.record)
  point = lambda r: search.Point.of(r["config"]["optimizer"])
  done = [(point(r), r["seed"]) for r in found]
  assert len(set(done)) == len(done)
  # ... and both at once are refused.
  with pytest.raises(errors.UserError, match="differ in what is searched"):
    options(tmp_path, monkeypatch, 0.008, False, "muon", name)


def test_what_fails_is_said_and_the_others_go_on(tmp_path, monkeypatch):
  # Lion begins at a sixth of AdamW's rate, where the stub's disk is full.
  job = options(tmp_path, monkeypatch, 0.003, False, "adamw", "lion")
  failed = compare_optimizers.run(job)
  assert list(failed) == ["lion"]
  assert failed["lion"].endswith("pretrain: the disk is full")
  # What there is of it is shown as not complete.
  text = compare_optimizers.report(job)
  assert "| adamw | 0.006 | 0.1 |" in text and "| lion | 0.001° |" in text


def test_a_signal_stops_all_runs(tmp_path, monkeypatch):
  job = options(tmp_path, monkeypatch, 0.003, True)
  main = threading.main_thread().ident
  timer = threading.Timer(1.0, signal.pthread_kill, [main, signal.SIGTERM])
  previous = signal.signal(signal.SIGTERM, compare_optimizers._stop)
  timer.start()
  try:
    with pytest.raises(KeyboardInterrupt):
      compare_optimizers.run(job)
  finally:
    signal.signal(signal.SIGTERM, previous)
  assert not records.read(job.record)


def test_bad_input(tmp_path, monkeypatch):
  with pytest.raises(errors.UserError, match="expected different ones"):
    options(tmp_path, monkeypatch, 0.003, False, "scale", "scale")
  job = options(tmp_path, monkeypatch, 0.003)
  with pytest.raises(errors.UserError, match="holds no runs"):
    compare_optimizers.report(job)


@pytest.mark.slow
def test_the_main_runs_on_a_mesh(tmp_path):
  corpus = runs.write_corpus(tmp_path / "corpus")
  command = [
    sys.executable, "-m", "experiments.compare_optimizers", "--config=smoke",
    f"--workdir={tmp_path / 'runs'}", "--jobs=2",
    # Near the best rate of two steps: the search is short.
    "--optimizer=scale,optimizer.learning_rate=0.1", "--seeds=1",
    "--weight_decay_search=0", "--set=mesh.data=2",
    *(f"--set={s}" for s in runs.settings(corpus, "training.steps=2")),
  ]  # fmt: skip
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
  outputs = []
  for more in ([], ["--plot_only"]):
    done = subprocess.run(
      [*command, *more], cwd=runs.ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outputs.append(done.stdout)
  assert outputs[0] == outputs[1] and "column_normalized_sgd" in outputs[0]
  lines = records.read(tmp_path / "runs" / "record.jsonl")
  assert len(lines) >= 3
  assert all(r["device"]["count"] == 2 for r in lines)
