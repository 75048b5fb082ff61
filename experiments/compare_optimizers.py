"""Compares optimizers on one job: a learning-rate search, then seeds.

  python -m experiments.compare_optimizers --config=compare --workdir=DIR

For each optimizer the learning rate is searched by factors of two from its
default until the best one has a worse neighbour on both sides (seed 0); the
best one is then run with further seeds. Every run is an ordinary
`experiments.pretrain` directory below --workdir, so the comparison continues
where it was stopped. All runs go into --record, one JSON object each, and a
table of mean and standard deviation is printed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import tqdm
from absl import flags

from experiments import configs, errors, optimizers
from jaxlib_ext import records

ENTRANTS = (
  "adamw",
  "muon",
  "column_normalized_sgd",
  "eco,quantization.format=int4:32",
  "eco,quantization.format=float8_e4m3fn",
)


@dataclasses.dataclass(frozen=True)
class Entrant:
  """An optimizer and what distinguishes its runs."""

  name: str
  overrides: tuple[str, ...]

  @property
  def label(self) -> str:
    values = [o.split("=", 1)[1] for o in self.overrides]
    return " ".join([self.name, *values])

  @classmethod
  def parse(cls, text: str) -> Entrant:
    """Reads "name,path.to.field=value,..."."""
    name, *overrides = text.split(",")
    return cls(optimizers.canonical(name), tuple(overrides))


class Runner:
  """Runs jobs in processes of their own and remembers what they gave.

  Args:
    config: the config's name.
    shared: overrides of every run.
    workdir: holds one directory per run.
    jobs: how many run at once.
  """

  def __init__(
    self, config: str, shared: Sequence[str], workdir: pathlib.Path, jobs: int
  ):
    self._config, self._shared, self._workdir = config, shared, workdir
    cpus = sorted(os.sched_getaffinity(0))
    share = max(1, len(cpus) // jobs)
    self._cpus = queue.SimpleQueue()
    for i in range(jobs):
      self._cpus.put({cpus[(i * share + k) % len(cpus)] for k in range(share)})
    self._pool = concurrent.futures.ThreadPoolExecutor(jobs)
    self._bar = tqdm.tqdm(unit="run", mininterval=1)
    self.results: list[dict[str, Any]] = []

  def submit(
    self, entrant: Entrant, rate: float, seed: int
  ) -> concurrent.futures.Future:
    """The run's record, in the future."""
    self._bar.total = (self._bar.total or 0) + 1
    self._bar.refresh()
    return self._pool.submit(self._run, entrant, rate, seed)

  def _run(self, entrant: Entrant, rate: float, seed: int) -> dict[str, Any]:
    name = f"{entrant.label} {rate:g} {seed}".replace(" ", "_")
    directory = self._workdir / name.replace("/", "_").replace(":", "-")
    overrides = [
      *self._shared,
      f"optimizer.name={entrant.name}",
      *entrant.overrides,
      f"optimizer.learning_rate={rate!r}",
      f"training.seed={seed}",
    ]
    if not (directory / "summary.json").exists():
      self._execute(directory, overrides)
    summary = json.loads((directory / "summary.json").read_text())
    result = {
      "optimizer": entrant.label,
      "learning_rate": rate,
      "seed": seed,
      "overrides": overrides,
      **summary,
    }
    self.results.append(result)
    self._bar.set_postfix_str(f"{name} {result['final_eval_loss']:.4f}")
    self._bar.update()
    return result

  def _execute(self, directory: pathlib.Path, overrides: list[str]) -> None:
    cpus = self._cpus.get()
    try:
      done = subprocess.run(
        [
          sys.executable,
          "-m",
          "experiments.pretrain",
          f"--config={self._config}",
          f"--workdir={directory}",
          *(f"--set={o}" for o in overrides),
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
      )
    finally:
      self._cpus.put(cpus)
    if done.returncode and "the loss is" not in done.stderr:
      last = (done.stderr.strip().splitlines() or ["no message"])[-1]
      raise errors.UserError(f"{directory.name}: {last}")
    if done.returncode:  # diverged: worse than any finite loss
      records.write_json(
        directory / "summary.json",
        {"final_eval_loss": float("inf"), "diverged": True},
      )

  def close(self) -> None:
    """Waits for no one: what has not begun is dropped."""
    self._pool.shutdown(cancel_futures=True)
    self._bar.close()


def search(runner: Runner, entrant: Entrant, start: float) -> float:
  """The best learning rate of a grid of factor two, never at its edge."""
  losses = {}
  pending = [start / 2, start, start * 2]
  while pending:
    futures = [(r, runner.submit(entrant, r, 0)) for r in pending]
    losses |= {r: f.result()["final_eval_loss"] for r, f in futures}
    best = min(losses, key=losses.get)
    pending = [r for r in (best / 2, best * 2) if r not in losses]
  return best


def table(results: Sequence[dict[str, Any]], best: dict[str, float]) -> str:
  """A Markdown table of the runs at each optimizer's best rate."""
  lines = [
    "| optimizer | learning rate | held-out loss (mean ± sd, n) | bits per "
    "byte | parameters + state, bytes |",
    "|---|---|---|---|---|",
  ]
  for label, rate in best.items():
    runs = [
      r
      for r in results
      if r["optimizer"] == label and r["learning_rate"] == rate
    ]
    losses = [r["final_eval_loss"] for r in runs]
    spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
    bits = statistics.mean(r["bits_per_byte"] for r in runs)
    size = runs[0]["params_bytes"] + runs[0]["optimizer_state_bytes"]
    lines.append(
      f"| {label} | {rate:g} | {statistics.mean(losses):.4f} ± {spread:.4f} "
      f"({len(losses)}) | {bits:.3f} | {size:,.0f} |"
    )
  return "\n".join(lines)


def main() -> None:
  """Searches, repeats, records, prints."""
  values = flags.FLAGS
  shared = values["set"].value
  if not values.workdir:
    raise errors.UserError("--workdir: expected a directory for the runs")
  workdir = pathlib.Path(values.workdir)
  entrants = [Entrant.parse(text) for text in values.optimizer]
  for e in entrants:
    name = f"optimizer.name={e.name}"
    configs.resolve(values.config, [*shared, name, *e.overrides])
  workdir.mkdir(parents=True, exist_ok=True)
  runner = Runner(values.config, shared, workdir, values.jobs)
  best = {}
  try:
    with concurrent.futures.ThreadPoolExecutor(len(entrants)) as searches:
      rates = {
        e: searches.submit(
          search, runner, e, optimizers.DEFAULTS[e.name]["learning_rate"]
        )
        for e in entrants
      }
    best = {e.label: f.result() for e, f in rates.items()}
    repeats = [
      runner.submit(e, best[e.label], seed)
      for e in entrants
      for seed in range(1, values.seeds)
    ]
    for future in repeats:
      future.result()
  finally:
    runner.close()
  order = sorted(
    runner.results,
    key=lambda r: (r["optimizer"], r["learning_rate"], r["seed"]),
  )
  lines = [json.dumps(r) for r in order]
  record = pathlib.Path(values.record or workdir / "record.jsonl")
  record.parent.mkdir(parents=True, exist_ok=True)
  records.write_atomically(record, "\n".join(lines) + "\n")
  print(table(order, best))


def _define_flags() -> None:
  flags.DEFINE_string("config", "compare", "Of `experiments.configs`.")
  flags.DEFINE_multi_string("set", [], "Overrides shared by all runs.")
  flags.DEFINE_multi_string(
    "optimizer",
    list(ENTRANTS),
    "A name, and overrides of its own behind commas.",
  )
  flags.DEFINE_integer(
    "seeds", 3, "Runs at the best learning rate.", lower_bound=1
  )
  flags.DEFINE_string("workdir", None, "Where the runs live.")
  flags.DEFINE_string(
    "record", None, "JSON Lines file, rewritten; default DIR/record.jsonl."
  )
  flags.DEFINE_integer(
    "jobs",
    1,
    "Runs at once; each gets its share of the processors.",
    lower_bound=1,
  )


if __name__ == "__main__":
  errors.run_main("compare_optimizers", main, _define_flags)
