"""Runs the jobs of a comparison in processes, and remembers them in a file."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import math
import os
import pathlib
import platform
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm

from experiments import configs, errors, optimizers, stored
from experiments.comparison import entrants, search
from jaxlib_ext import config as config_lib
from jaxlib_ext import reading, records

# What a run is, for the interpreter.
PROGRAM = ("-m", "experiments.pretrain")

# Of a run's summary, what a comparison has no use for.
_DROPPED = ("sample",)


class Comparison:
  """The job that all entrants do, and which records are of it.

  Args:
    config: the config's name.
    shared: overrides of every run.

  Raises:
    UserError: an unknown config, field or value.
  """

  def __init__(self, config: str, shared: Sequence[str]):
    self.name, self.shared = config, tuple(shared)
    source = configs.resolve(config, shared).data.source
    # The interpreter's own library is another text with another version.
    self._python = platform.python_version() if source == "python" else None

  def overrides(
    self,
    entrant: entrants.Entrant,
    point: search.Point | None = None,
    seed: int = 0,
  ) -> list[str]:
    """A run's; the defaults of the name are its point where none is given."""
    out = [*self.shared, f"optimizer.name={entrant.name}", *entrant.overrides]
    if point:
      out.append(f"optimizer.learning_rate={point.learning_rate!r}")
      out.append(f"optimizer.weight_decay={point.weight_decay!r}")
      path = f"optimizer.{optimizers.FALLBACK_RATE}="
      # Silence is the learning rate, but not after an override of it.
      if point.fallback_learning_rate or any(o.startswith(path) for o in out):
        out.append(f"{path}{point.value(optimizers.FALLBACK_RATE)!r}")
    return [*out, f"training.seed={seed}"]

  def start(self, entrant: entrants.Entrant) -> search.Point:
    """Where the entrant's search begins."""
    config = configs.resolve(self.name, self.overrides(entrant))
    return search.Point.of(config_lib.to_dict(config)["optimizer"])

  def job(self, entrant: entrants.Entrant) -> str:
    """What the runs of an entrant have in common."""
    config = configs.resolve(self.name, self.overrides(entrant))
    return _common(config, self._python)

  def recorded(self, record: Mapping[str, Any]) -> str | None:
    """The `job` of a record; None of one that cannot be read any more."""
    try:
      config = config_lib.from_dict(configs.Config, record["config"])
    except (KeyError, config_lib.ConfigError):
      return None
    return _common(config, record.get("corpus", {}).get("python"))


def _common(config: configs.Config, python: str | None) -> str:
  """A config without what is searched for and what changes no numbers."""
  plain = config_lib.to_dict(config)
  plain["optimizer"] |= {"learning_rate": None, "weight_decay": None}
  plain["optimizer"]["arguments"].pop(optimizers.FALLBACK_RATE, None)
  plain["training"] |= {"seed": None}
  for path in configs.RESUMABLE:
    group, _, field = path.partition(".")
    if field:
      plain[group].pop(field)
    else:
      plain.pop(group)
  return json.dumps([plain, python], sort_keys=True)


class Runner:
  """Runs what the record does not hold yet.

  Args:
    comparison: of all runs.
    workdir: holds one directory for each run.
    record: JSON Lines file that every finished run is appended to at once.
    jobs: how many run at a time; each has its share of the processors.
    expected: how many runs each entrant will probably ask for.
  """

  def __init__(
    self,
    comparison: Comparison,
    workdir: pathlib.Path,
    record: pathlib.Path,
    jobs: int,
    expected: Mapping[entrants.Entrant, int],
  ):
    self._comparison, self._workdir = comparison, workdir
    self._record, self._lock = record, threading.Lock()
    self._expected = collections.Counter(expected)
    self._known = {
      (job, search.Point.of(r["config"]["optimizer"]), r["seed"]): r
      for r in records.read(record)
      if (job := comparison.recorded(r))
    }
    self._processes: set[subprocess.Popen] = set()
    self._closed = False
    self._pool = concurrent.futures.ThreadPoolExecutor(
      jobs, initializer=_pin, initargs=(_shares(jobs),)
    )
    self._bar = tqdm.tqdm(
      total=self._expected.total(), unit="run", mininterval=1
    )

  def submit(
    self, entrant: entrants.Entrant, point: search.Point, seed: int
  ) -> concurrent.futures.Future:
    """The run's record, in the future."""
    config = configs.resolve(
      self._comparison.name, self._comparison.overrides(entrant, point, seed)
    )
    known = self._known.get((self._comparison.job(entrant), point, seed))
    with self._lock:
      planned = self._expected[entrant] > 0
      self._expected[entrant] -= planned
      # What is known takes no time: the forecast is of what is left to do.
      self._bar.total += (known is None) - planned
    if known is None:
      return self._pool.submit(self._run, entrant, point, seed, config)
    future = concurrent.futures.Future()
    future.set_result(known)
    return future

  def losses(
    self, entrant: entrants.Entrant, points: Sequence[search.Point]
  ) -> list[float]:
    """Held-out losses of seed 0, found at once."""
    futures = [self.submit(entrant, point, 0) for point in points]
    return [f.result()["final_eval_loss"] for f in futures]

  def _run(self, entrant, point, seed, config) -> dict[str, Any]:
    overrides = self._comparison.overrides(entrant, point, seed)
    values = [f"{value:g}" for value in point if value is not None]
    name = "_".join([*entrant.label.split(), *values, str(seed)])
    directory = self._workdir / name.replace("/", "_").replace(":", "-")
    if not _is_finished(directory, config):
      self._execute(directory, overrides)
    # A finished run is not continued.
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    summary = reading.read_json(
      directory / "summary.json", {"final_eval_loss": float}, nan=True
    )
    result = {
      "optimizer": entrant.label,
      **point._asdict(),
      "seed": seed,
      "overrides": overrides,
      "config": config_lib.to_dict(config),
      **{k: v for k, v in summary.items() if k not in _DROPPED},
    }
    if not math.isfinite(result["final_eval_loss"]):
      result |= {"final_eval_loss": math.inf, "diverged": True}
    with self._lock:
      records.append(self._record, result)
      self._bar.set_postfix_str(f"{name} {result['final_eval_loss']:.4f}")
      self._bar.update()
    return result

  def _execute(self, directory: pathlib.Path, overrides: list[str]) -> None:
    command = [
      sys.executable,
      *PROGRAM,
      f"--config={self._comparison.name}",
      f"--workdir={directory}",
      *(f"--set={o}" for o in overrides),
    ]
    with self._lock:
      if self._closed:
        raise errors.UserError("stopped")
      process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # The terminal's interrupt is for the comparison, which passes it on.
        start_new_session=True,
      )
      self._processes.add(process)
    _, stderr = process.communicate()
    with self._lock:
      self._processes.remove(process)
    if process.returncode and "the loss is" in stderr:
      _write_diverged(directory)
    elif process.returncode or not (directory / "summary.json").exists():
      last = (stderr.strip().splitlines() or ["it was stopped"])[-1]
      raise errors.UserError(f"{directory.name}: {last}")

  def close(self) -> None:
    """Drops what has not begun; has running jobs save their state and end."""
    with self._lock:
      self._closed = True
      for process in self._processes:
        process.terminate()
    self._pool.shutdown(cancel_futures=True)
    self._bar.close()


def _is_finished(directory: pathlib.Path, config: configs.Config) -> bool:
  """Whether a run of this config has ended there; others' are refused."""
  if not (directory / "summary.json").exists():
    return False
  begun = stored.facts(directory, "--workdir")
  stored.check_config(begun["config"], config, directory)
  return True


def _shares(jobs: int) -> queue.SimpleQueue:
  """The processors of each of several jobs."""
  cpus = sorted(os.sched_getaffinity(0))
  share = max(1, len(cpus) // jobs)
  out = queue.SimpleQueue()
  for i in range(jobs):
    out.put({cpus[(i * share + k) % len(cpus)] for k in range(share)})
  return out


def _pin(shares: queue.SimpleQueue) -> None:
  """Binds this thread, and the processes that it starts, to a share."""
  os.sched_setaffinity(0, shares.get())


def _write_diverged(directory: pathlib.Path) -> None:
  """The summary of a run whose loss was not finite: worse than any other."""
  begun = stored.facts(directory, "--workdir")
  records.write_json(
    directory / "summary.json",
    {
      "name": begun["config"]["name"],
      "final_eval_loss": float("inf"),
      "diverged": True,
      "corpus": begun["corpus"],
      **records.provenance(),
    },
  )
