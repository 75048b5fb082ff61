"""Training throughput beside PyTorch's, on this machine's CPU.

`python -m experiments.bench_train` trains the same weights on the same batch
by our trainer and by a plain PyTorch LLaMA, eager and under `torch.compile`,
each in its own process, first comparing losses and then taking turns at a few
steps each. Without PyTorch it measures ours and says how to install it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import (
  bench_train_torch,
  bench_train_worker,
  errors,
  workers,
)
from jaxlib_ext import records

POINTS = {
  point.name: point
  for point in (
    bench_train_worker.Point("tiny-float32", (), 2048),
    bench_train_worker.Point(
      "tiny-bfloat16", ("model.compute_dtype=bfloat16",), 2048
    ),
    bench_train_worker.Point(
      "256-bfloat16",
      (
        "model.d_model=256",
        "model.num_layers=4",
        "model.num_heads=4",
        "model.d_ff=688",
        "model.compute_dtype=bfloat16",
        "training.batch_size=8",
        "training.seq_len=256",
      ),
      8192,
    ),
  )
}

# Relative, of the first losses and of those after AdamW steps. A float32 loss
# is a mean of log-sum-exps that each round a few times by 2**-24. AdamW's
# first step is lr * sign(g): where g is rounding noise its sign is too, but
# such an element moves the loss by lr * |g|, hence only one digit is given
# up. In bfloat16 every activation rounds by 2**-9, at random, and the mean
# over thousands of tokens averages that out, but not the two frameworks'
# different places of rounding.
TOLERANCES = {"float32": (1e-6, 1e-5), "bfloat16": (2.0**-13, 2.0**-10)}


class Side(workers.Worker):
  """A framework in a process of its own.

  Args:
    framework: "ours", "eager" or "compiled".
    point: what it trains.
    directory: where it finds the weights and leaves its messages.
    python: the interpreter that runs it.
  """

  def __init__(
    self,
    framework: str,
    point: bench_train_worker.Point,
    directory: pathlib.Path,
    python: str = sys.executable,
  ):
    super().__init__(
      "experiments.bench_train_worker",
      python,
      directory / f"{framework}.log",
      framework=framework,
      point=dataclasses.asdict(point),
      weights=str(directory / "weights.npz"),
    )

  def __call__(self, do: str, steps: int = 0) -> Any:
    """The reply to one request; WorkerError if the process ended instead."""
    return self.ask(do=do, steps=steps)


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, least and greatest."""
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }


def disagreement(
  ours: Sequence[float], theirs: Sequence[float], dtype: str
) -> str | None:
  """Says where two runs' losses differ by more than `TOLERANCES` allow.

  Args:
    ours: losses of successive steps.
    theirs: likewise.
    dtype: "float32" or "bfloat16", of the activations.

  Returns:
    None where they agree.
  """
  first, later = TOLERANCES[dtype]
  for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
    allowed = later if step else first
    difference = abs(a - b) / abs(b)
    if not difference <= allowed:
      return (
        f"loss {a:.7f} and {b:.7f} after {step} steps differ by "
        f"{difference:.1e}, allowed {allowed:.1e}"
      )
  return None


def _start(
  point: bench_train_worker.Point,
  directory: pathlib.Path,
  compiled: bool,
  torch_python: str,
) -> tuple[dict[str, Side], dict[str, str]]:
  """The sides that run, with ours first, and why the others do not."""
  sides, missing = {"ours": Side("ours", point, directory)}, {}
  wanted = ["eager", *(["compiled"] if compiled else [])]
  for framework in wanted:
    if not torch_python and importlib.util.find_spec("torch") is None:
      missing[framework] = f"pip install {bench_train_torch.REQUIREMENT}"
      continue
    try:
      python = torch_python or sys.executable
      sides[framework] = Side(framework, point, directory, python)
    except workers.WorkerError as e:
      missing[framework] = str(e)
  return sides, missing


def _check(
  sides: dict[str, Side], missing: dict[str, str], dtype: str, steps: int
) -> dict[str, Any]:
  """Compares losses; a side that fails or disagrees moves to `missing`."""
  losses = {}
  for framework, side in list(sides.items()):
    try:
      losses[framework] = side("losses", steps)
      wrong = disagreement(losses["ours"], losses[framework], dtype)
    except workers.WorkerError as e:
      if framework == "ours":
        raise
      wrong = str(e)
    if wrong:
      missing[framework] = wrong
      sides.pop(framework).close()
  return losses


def measure(
  point: bench_train_worker.Point,
  *,
  rounds: int,
  steps: int,
  checked_steps: int,
  compiled: bool,
  torch_python: str = "",
) -> dict[str, Any]:
  """Checks and times one row.

  Args:
    point: what is trained.
    rounds: turns of each side.
    steps: per turn.
    checked_steps: whose losses must agree.
    compiled: whether to measure `torch.compile` as well.
    torch_python: the interpreter of PyTorch's sides; empty is this one.

  Returns:
    The record: losses, seconds per step of every turn, rates and ratios.

  Raises:
    workers.WorkerError: our own process ended.
  """
  config = point.config()
  cfg = config.model.build(point.vocab_size)
  tokens = config.training.batch_size * config.training.seq_len
  with tempfile.TemporaryDirectory() as name:
    sides, missing = _start(point, pathlib.Path(name), compiled, torch_python)
    try:
      losses = _check(sides, missing, cfg.compute_dtype, checked_steps)
      facts = {f: side("describe") for f, side in sides.items()}
      for side in sides.values():
        side("seconds", steps)
      turns = {framework: [] for framework in sides}
      for _ in range(rounds):
        for framework, side in sides.items():
          seconds = side("seconds", steps)
          turns[framework].append(seconds / steps)
    finally:
      for side in sides.values():
        side.close()
  return {
    "point": point.name,
    "model": dataclasses.asdict(cfg),
    "batch_size": config.training.batch_size,
    "seq_len": config.training.seq_len,
    "steps_per_turn": steps,
    "losses": losses,
    "facts": facts,
    "missing": missing,
    "seconds_per_step": turns,
    **rates(turns, tokens, facts["ours"]),
    **records.provenance(),
  }


def rates(
  turns: Mapping[str, Sequence[float]], tokens: int, facts: Mapping[str, float]
) -> dict[str, Any]:
  """What the seconds per step mean.

  Args:
    turns: framework → seconds per step of each of its turns.
    tokens: per step.
    facts: "flops_per_token" and "matmul_rate", as the worker describes them.

  Returns:
    "rates": framework → tokens per second (median, min, max), FLOP/s and its
    share of the matmul rate; "ratios": other framework → its seconds over
    ours, turn by turn (median, min, max).
  """
  out = {}
  for framework, seconds in turns.items():
    rate = spread([tokens / s for s in seconds])
    flops = rate["median"] * facts["flops_per_token"]
    out[framework] = {
      "tokens_per_second": rate,
      "flops": flops,
      "matmul_share": flops / facts["matmul_rate"],
    }
  ratios = {
    framework: spread(
      [b / a for a, b in zip(turns["ours"], seconds, strict=True)]
    )
    for framework, seconds in turns.items()
    if framework != "ours"
  }
  return {"rates": out, "ratios": ratios}


def report(record: Mapping[str, Any]) -> str:
  """The lines printed for one record."""
  model, facts = record["model"], record["facts"]["ours"]
  lines = [
    f"{record['point']}: {facts['parameters']:,} parameters, batch "
    f"{record['batch_size']} x {record['seq_len']}, {model['compute_dtype']}; "
    f"one large matmul runs at {facts['matmul_rate'] / 1e9:.0f} GFLOP/s"
  ]
  names = {"ours": "ours", "eager": "PyTorch", "compiled": "torch.compile"}
  for framework, losses in record["losses"].items():
    shown = " ".join(f"{x:.6f}" for x in losses)
    lines.append(f"  {names[framework]:14s} losses {shown}")
  for framework, rate in record["rates"].items():
    speed = rate["tokens_per_second"]
    line = (
      f"  {names[framework]:14s} {speed['median']:8,.0f} tokens/s "
      f"({speed['min']:,.0f} to {speed['max']:,.0f}), "
      f"{rate['flops'] / 1e9:4.0f} GFLOP/s, {rate['matmul_share']:.0%} of the "
      "matmul rate"
    )
    ratio = record["ratios"].get(framework)
    if ratio:
      line += (
        f"; ours is {ratio['median']:.2f} times as fast "
        f"({ratio['min']:.2f} to {ratio['max']:.2f})"
      )
    lines.append(line)
  for framework, why in record["missing"].items():
    lines.append(f"  {names[framework]:14s} not measured: {why}")
  return "\n".join(lines)


def main() -> None:
  """Measures the rows asked for."""
  values = flags.FLAGS
  unknown = sorted(set(values.points) - set(POINTS))
  if unknown:
    raise errors.UserError(f"--points: got {unknown}, allowed: {list(POINTS)}")
  if values.torch_python and not shutil.which(values.torch_python):
    raise errors.UserError(
      f"--torch_python: got {values.torch_python!r}, which is no program"
    )
  for name in values.points:
    record = measure(
      POINTS[name],
      rounds=values.rounds,
      steps=values.steps,
      checked_steps=values.checked_steps,
      compiled=values.compile,
      torch_python=values.torch_python,
    )
    print(report(record), flush=True)
    if values.record:
      os.makedirs(os.path.dirname(values.record) or ".", exist_ok=True)
      records.append(values.record, record)


def _define_flags() -> None:
  flags.DEFINE_list("points", list(POINTS), "Which rows to measure.")
  flags.DEFINE_integer(
    "rounds", 7, "Turns of each side; a ratio is taken in each.", lower_bound=1
  )
  flags.DEFINE_integer("steps", 5, "Steps per turn.", lower_bound=1)
  flags.DEFINE_integer(
    "checked_steps", 4, "Steps whose losses must agree.", lower_bound=1
  )
  flags.DEFINE_bool("compile", True, "Measure torch.compile as well.")
  flags.DEFINE_string(
    "torch_python",
    "",
    "The interpreter that has PyTorch, and this project's packages, where the "
    "one that runs this (another Python, a newer JAX) has none.",
  )
  flags.DEFINE_string(
    "record",
    "experiments/records/bench_train.jsonl",
    "The JSON Lines file that gets one record per row; empty for none.",
  )


if __name__ == "__main__":
  errors.run_main("bench_train", main, _define_flags)
