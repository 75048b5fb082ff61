"""Linear attention's chunk forms beside the token scan and another library.

  python -m experiments.bench_linear --ops=mdn --shapes=T4096_H4_D128

Outputs, final states and gradients are compared first, with those of the scan
(`implementation="reference"`); nothing is timed unless they agree. Then all
contenders take turns, forward and with their gradient, and each time is set
against the scan's of the same round and against a floor: the matmul FLOPs that
`experiments.linear.floors` counts, at the rate of one large matmul on this
machine, and at that of the products which take a state through the chunks, one
after the other, and nothing else. With `--peer_python` jax-linear-attention's
plain JAX form runs on the same arrays in another interpreter. One JSON line per
op and shape is appended to `experiments/records/bench_linear.jsonl`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from experiments import (
  bench_train,
  contender,
  errors,
  reports,
  workers,
)
from experiments.linear import cases, floors, worker
from jaxlib_ext import host, records
from kernels_pallas.linear import problem

MODES = contender.MODES
SCAN, PEER = "reference", "jla"
AUTO = "auto"


class DisagreementError(Exception):
  """Ours gives other values than the scan; there is nothing to time."""


def chunk_size(op: str, shape: cases.Shape, name: str) -> int | None:
  """Tokens of a contender's chunks; of "auto", those it takes for gradients.

  Args:
    op: a key of `experiments.linear.cases.OPS`.
    shape: the sizes.
    name: a contender, "implementation/chunk size".

  Returns:
    None for contenders without chunks.
  """
  size = name.partition("/")[2]
  if not size:
    return None
  sizes = problem.check_chunk_size(
    None if size == AUTO else int(size),
    shape.length,
    delta=op not in cases.PLAIN,
    channels=shape.key if op in cases.CHANNELS else 0,
  )
  return sizes[jax.default_backend() == "cpu"]


class Trial:
  """The contenders of one op at one shape.

  Args:
    op: a key of `experiments.linear.cases.OPS`.
    names: of our contenders, "implementation/chunk size", the size may be
      "auto"; the scan is added.
    dtype: of q, k and v.
    peer_python: the interpreter that has `jla`, or empty.

  Attributes:
    sides: contender's name to what is timed.
    errors: name to array to the largest relative difference from the scan's.
    missing: who is not measured, and why.
  """

  def __init__(
    self, op: str, names: Sequence[str], dtype: str, peer_python: str
  ):
    self._op, self._names, self._dtype = op, names, dtype
    self._python = peer_python
    self.sides, self.errors, self.missing = {}, {}, {}
    if peer_python and op not in worker.PEER_KINDS:
      self.missing[PEER] = f"has no {op}"

  @contextlib.contextmanager
  def started(self, problem: Any, scan_modes: Sequence[str] = MODES):
    """Compiles the contenders for a problem; ends the peer's process."""
    with tempfile.TemporaryDirectory() as name:
      self.sides = {SCAN: self._ours(SCAN, problem, scan_modes)}
      for ours in self._names:
        self.sides[ours] = self._ours(ours, problem, MODES)
      if self._python and PEER not in self.missing:
        directory = pathlib.Path(name)
        with self._excusing_the_peer():
          self.sides[PEER] = worker.Peer(
            self._op, *problem, directory, self._python
          )
      try:
        yield
      finally:
        self._drop_the_peer()

  def _ours(self, name, problem, modes):
    implementation, _, size = name.partition("/")
    how = {"implementation": implementation}
    if size and size != AUTO:
      how["chunk_size"] = int(size)
    op = cases.OPS[self._op][0]
    run = lambda **arrays: op(**arrays, **how)
    try:
      return contender.Contender(run, *problem, modes)
    except (ValueError, NotImplementedError) as e:
      raise errors.UserError(f"{name}: {e}") from e

  @contextlib.contextmanager
  def _excusing_the_peer(self):
    try:
      yield
    except workers.WorkerError as e:
      self.missing[PEER] = str(e)
      self._drop_the_peer()

  def _drop_the_peer(self):
    peer = self.sides.pop(PEER, None)
    if peer:
      peer.close()

  def check(self) -> None:
    """Compares with the scan; a peer that disagrees is not measured.

    Raises:
      DisagreementError: one of ours disagrees.
    """
    want = self.sides[SCAN].values()
    for name in self._names:
      wrong = self._compare(name, want)
      if wrong:
        raise DisagreementError(f"{name}: {wrong}; no time is taken")
    if PEER in self.sides:
      with self._excusing_the_peer():
        wrong = self._compare(PEER, want)
        if wrong:
          raise workers.WorkerError(wrong)

  def _compare(self, name, want):
    found = cases.largest_errors(self.sides[name].values(), want)
    self.errors.setdefault(name, {}).update(found)
    return cases.disagreement(found, self._dtype)

  def seconds(self, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Mode to contender to its seconds of each round."""
    out = {}
    for mode in MODES:
      turns = {n: x for n, x in self.sides.items() if mode in x.modes}
      warm = {name: side.seconds(mode, 1) for name, side in turns.items()}
      calls = {name: contender.calls(seconds) for name, seconds in warm.items()}
      out[mode] = {name: [] for name in turns}
      for _ in range(rounds):
        for name, side in turns.items():
          out[mode][name].append(side.seconds(mode, calls[name]))
    return out


def measure(
  op: str,
  shape: cases.Shape,
  names: Sequence[str],
  *,
  dtype: str = "float32",
  rounds: int = 9,
  peer_python: str = "",
) -> dict[str, Any]:
  """Checks and times one op at one shape.

  Args:
    op: a key of `experiments.linear.cases.OPS`.
    shape: the sizes.
    names: of our contenders, "implementation/chunk size"; the scan is added.
    dtype: of q, k and v, "float32" or "bfloat16".
    rounds: turns of each contender.
    peer_python: the interpreter that has `jla`, or empty.

  Returns:
    "errors", "missing" (see `Trial`), "temp_bytes", "chunk_sizes" (see
    `chunk_size`), "matmul_rate" (FLOP/s), "walk_rates" (`floors.walk_rate` by
    contender), "load" (of the machine, before and after), and what `judge`
    returns.

  Raises:
    DisagreementError: one of ours gives other values than the scan.
    UserError: one of ours does not run here.
  """
  trial = Trial(op, names, dtype, peer_python)
  whole = cases.make(op, shape, dtype)
  length = cases.scan_length(op, shape)
  scan_modes = MODES
  if length < shape.length:
    scan_modes = ("forward",)
    trial.missing[f"{SCAN} gradient"] = "it would keep too much"
    with trial.started(cases.first_tokens(whole, length)):
      trial.check()
  load = [os.getloadavg()]
  rates = [reports.matmul_rate(dtype)]
  sizes = {name: chunk_size(op, shape, name) for name in names}
  walks = {
    name: floors.walk_rate(shape, size, dtype)
    for name, size in sizes.items()
    if size
  }
  with trial.started(whole, scan_modes):
    trial.check()
    temp_bytes = {name: x.temp_bytes() for name, x in trial.sides.items()}
    seconds = trial.seconds(rounds)
  rates.append(reports.matmul_rate(dtype))
  load.append(os.getloadavg())
  return {
    "op": op,
    "shape": dataclasses.asdict(shape),
    "dtype": dtype,
    "errors": trial.errors,
    "missing": trial.missing,
    "temp_bytes": temp_bytes,
    "chunk_sizes": sizes,
    "matmul_rate": max(rates),
    "walk_rates": walks,
    "load": load,
    **judge(op, shape, seconds, max(rates), walks),
  }


def judge(
  op: str,
  shape: cases.Shape,
  seconds: Mapping[str, Mapping[str, Sequence[float]]],
  matmul_rate: float,
  walk_rates: Mapping[str, float],
) -> dict[str, Any]:
  """What the seconds mean.

  Args:
    op: a key of `experiments.linear.cases.OPS`.
    shape: the sizes.
    seconds: mode to contender to its seconds of each round.
    matmul_rate: FLOP/s.
    walk_rates: FLOP/s by contender, of the chunk forms.

  Returns:
    By mode and contender: "seconds" as given; "spread" (median, min, max);
    "flops" of a pass, for chunk forms; "floor", those at the matmul rate;
    "of_floor", the median over it; "of_walk", over those at the walk's rate;
    "ratio", of ours, the scan's and the peer's seconds over the contender's,
    round by round (median, min, max).
  """
  names = ("spread", "flops", "floor", "of_floor", "of_walk", "ratio")
  out = {name: {mode: {} for mode in seconds} for name in names}
  for mode, turns in seconds.items():
    for name, values in turns.items():
      spread = bench_train.spread(values)
      out["spread"][mode][name] = spread
      size = chunk_size(op, shape, name)
      if size:
        sizes = op, size, shape.key, shape.value
        flops = floors.forward(*sizes)
        if mode == "gradient":
          flops += floors.backward(*sizes)
        flops *= shape.token_heads
        floor = flops / matmul_rate
        out["flops"][mode][name] = flops
        out["floor"][mode][name] = floor
        out["of_floor"][mode][name] = spread["median"] / floor
        out["of_walk"][mode][name] = spread["median"] * walk_rates[name] / flops
        out["ratio"][mode][name] = {
          other: bench_train.spread(
            [a / b for a, b in zip(turns[other], values, strict=True)]
          )
          for other in (SCAN, PEER)
          if other in turns
        }
  return {"seconds": seconds, **out}


def report(record: Mapping[str, Any]) -> str:
  """The lines printed for one record."""
  shape = cases.Shape(**record["shape"])
  lines = [
    f"{record['op']}: B {shape.batch}, T {shape.length}, H {shape.heads}, K "
    f"{shape.key}, V {shape.value}, {record['dtype']}; one large matmul runs "
    f"at {record['matmul_rate'] / 1e9:.0f} GFLOP/s"
  ]
  for mode, spreads in record["spread"].items():
    for name, spread in spreads.items():
      low, middle, high = (1e3 * spread[k] for k in ("min", "median", "max"))
      line = (
        f"  {mode:8s} {name:14s} {middle:8.1f} ms ({low:.1f} to {high:.1f})"
      )
      floor = record["floor"][mode].get(name)
      if floor:
        times = record["of_floor"][mode][name]
        walk = record["of_walk"][mode][name]
        line += (
          f", {times:.2f} of the floor of {1e3 * floor:.1f}, {walk:.2f} at the "
          "rate of its walk"
        )
      for other, ratio in record["ratio"][mode].get(name, {}).items():
        line += (
          f", {ratio['median']:.2f} times as fast as {other} "
          f"({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
      size = reports.bytes_text(record["temp_bytes"][name][mode])
      lines.append(f"{line}, {size} of temporaries")
  for name, found in record["errors"].items():
    worst = max(found, key=found.get)
    lines.append(f"  {name}: largest difference {found[worst]:.1e}, of {worst}")
  for name, why in record["missing"].items():
    lines.append(f"  {name} not measured: {why}")
  return "\n".join(lines)


def _chosen(flag: str, values: Sequence[str], allowed: Any) -> Sequence[str]:
  unknown = sorted(set(values) - set(allowed))
  if unknown or not values:
    raise errors.UserError(
      f"--{flag}: got {unknown or 'nothing'}, allowed: {list(allowed)}"
    )
  return values


def main() -> None:
  """Measures the ops and shapes asked for."""
  values = flags.FLAGS
  ops = _chosen("ops", values.ops, cases.OPS)
  shapes = _chosen("shapes", values.shapes, cases.SHAPES)
  sizes = [str(size) for size in problem.CHUNK_SIZES]
  chosen = _chosen("chunk_sizes", values.chunk_sizes, [AUTO, *sizes])
  if values.peer_python and not shutil.which(values.peer_python):
    raise errors.UserError(
      f"--peer_python: got {values.peer_python!r}, which is no program"
    )
  host.keep_freed_memory()
  for shape_name in shapes:
    shape = cases.SHAPES[shape_name]
    for op in ops:
      names = [f"{i}/{size}" for i in values.implementations for size in chosen]
      try:
        record = measure(
          op,
          shape,
          names,
          dtype=values.dtype,
          rounds=values.rounds,
          peer_python=values.peer_python,
        )
      except DisagreementError as e:
        sys.exit(f"bench_linear: {op} at {shape_name}: {e}")
      print(report(record), flush=True)
      if values.record:
        os.makedirs(os.path.dirname(values.record) or ".", exist_ok=True)
        record = {"name": shape_name, **record, **records.provenance()}
        records.append(values.record, record)


def _define_flags() -> None:
  flags.DEFINE_list("ops", list(cases.OPS), "Which ops.")
  flags.DEFINE_list("shapes", list(cases.CPU_SHAPES), "Which shapes, by name.")
  flags.DEFINE_list(
    "implementations", ["xla"], "Which of ours to set beside the scan."
  )
  flags.DEFINE_list(
    "chunk_sizes", [AUTO], "Tokens per chunk; auto is what None chooses."
  )
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of q, k and v."
  )
  flags.DEFINE_integer("rounds", 9, "Turns of each contender.", lower_bound=1)
  flags.DEFINE_string(
    "peer_python",
    "",
    "An interpreter with jax-linear-attention, to measure beside ours.",
  )
  flags.DEFINE_string(
    "record",
    "experiments/records/bench_linear.jsonl",
    "The JSON Lines file that gets one record per op and shape; empty: none.",
  )


if __name__ == "__main__":
  errors.run_main("bench_linear", main, _define_flags)
