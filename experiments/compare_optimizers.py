"""Compares optimizers on one job: a search for each, then seeds.

  python -m experiments.compare_optimizers --config=optimizers --workdir=DIR

For each optimizer the learning rate is searched by factors of two from its
default until the best one has a worse neighbour on both sides, then likewise
the weight decay and, of an optimizer that leaves embeddings, head and norms to
AdamW, their learning rate, in turns until none moves (seed 0); the best point
is then run with further seeds. All runs see the same data and end at the end of
the same schedule. Every finished run is a line of --record, and a run that
stands there is not run again; one that was stopped continues in its directory
below --workdir. At the end, or with --plot_only at any time, there are a table
and, beside the record, a picture of loss against bytes as PNG and SVG.

Runs are processes of their own, on this machine's devices: a mesh of several
is --set=mesh.fsdp=4, as for `experiments.pretrain`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Mapping

from absl import flags

from experiments import errors, optimizers
from experiments.comparison import entrants as entrants_lib
from experiments.comparison import picture, runner, search, standings
from jaxlib_ext import records


@dataclasses.dataclass(frozen=True)
class Options:
  """What the flags say.

  Attributes:
    comparison: the job of all runs.
    entrants: the reference first.
    seeds: runs at the best point.
    budgets: as for `experiments.comparison.search.coordinates`.
    jobs: runs at a time.
    workdir: holds one directory for each run.
    record: JSON Lines file; the picture lies beside it.
  """

  comparison: runner.Comparison
  entrants: tuple[entrants_lib.Entrant, ...]
  seeds: int
  budgets: Mapping[str, int]
  jobs: int
  workdir: pathlib.Path
  record: pathlib.Path

  def __post_init__(self):
    jobs = {self.comparison.job(e) for e in self.entrants}
    if not jobs or len(jobs) < len(self.entrants):
      raise errors.UserError(
        "--optimizer: expected different ones, which do not differ in what is "
        f"searched alone, got {[e.label for e in self.entrants]}"
      )

  def budgets_of(self, entrant: entrants_lib.Entrant) -> dict[str, int]:
    """Those of the coordinates that the entrant has."""
    out = dict(self.budgets)
    if not optimizers.has_fallback(entrant.name):
      out.pop(optimizers.FALLBACK_RATE, None)
    return out


def run(options: Options) -> dict[str, str]:
  """Runs what is missing.

  Returns:
    Of the entrants that could not be run to the end, what went wrong.
  """
  searched = lambda e: 1 + sum(b > 1 for b in options.budgets_of(e).values())
  # Both neighbours of every coordinate.
  expected = {e: 2 * searched(e) + options.seeds for e in options.entrants}
  for directory in (options.workdir, options.record.parent):
    directory.mkdir(parents=True, exist_ok=True)
  if options.record.exists() and not options.record.read_text().endswith("\n"):
    records.keep(options.record, lambda r: True)
  runs = runner.Runner(
    options.comparison,
    options.workdir,
    options.record,
    options.jobs,
    expected,
  )

  def compete(entrant):
    point = search.coordinates(
      lambda points: runs.losses(entrant, points),
      options.comparison.start(entrant),
      options.budgets_of(entrant),
    )
    seeds = range(1, options.seeds)
    for future in [runs.submit(entrant, point, seed) for seed in seeds]:
      future.result()

  pool = concurrent.futures.ThreadPoolExecutor(len(options.entrants))
  try:
    futures = {e.label: pool.submit(compete, e) for e in options.entrants}
    concurrent.futures.wait(futures.values())
  finally:
    runs.close()
    pool.shutdown()
  failed = {label: f.exception() for label, f in futures.items()}
  return {label: str(error) for label, error in failed.items() if error}


def report(options: Options) -> str:
  """Draws the picture of what the record holds.

  Returns:
    The table.

  Raises:
    UserError: the record holds no runs of the job.
  """
  comparison = options.comparison
  groups = {comparison.job(e): [] for e in options.entrants}
  for line in records.read(options.record):
    groups.get(comparison.recorded(line), []).append(line)
  found = [
    standings.stand(e.label, lines, options.seeds)
    for e, lines in zip(options.entrants, groups.values(), strict=True)
    if lines
  ]
  if not found:
    raise errors.UserError(
      f"--record: {options.record} holds no runs of this job"
    )
  picture.draw(options.record.with_name(f"{comparison.name}_pareto"), found)
  return standings.table(found)


def _stop(number, frame):
  raise KeyboardInterrupt


def main() -> None:
  """Searches, repeats, records, prints, draws."""
  values = flags.FLAGS
  if not values.workdir and not (values.plot_only and values.record):
    raise errors.UserError("--workdir: expected a directory for the runs")
  workdir = pathlib.Path(values.workdir or ".")
  options = Options(
    comparison=runner.Comparison(values.config, values["set"].value),
    entrants=tuple(map(entrants_lib.Entrant.parse, values.optimizer)),
    seeds=values.seeds,
    budgets={
      optimizers.FALLBACK_RATE: values.fallback_rate_search,
      "weight_decay": values.weight_decay_search,
    },
    jobs=values.jobs,
    workdir=workdir,
    record=pathlib.Path(values.record or workdir / "record.jsonl"),
  )
  failed = {}
  if not values.plot_only:
    signal.signal(signal.SIGTERM, _stop)
    try:
      failed = run(options)
    except KeyboardInterrupt:
      sys.exit("compare_optimizers: stopped; the same command continues")
  print(report(options), flush=True)
  if failed:
    raise errors.UserError(
      "; ".join(f"{label}: {error}" for label, error in failed.items())
    )


def _define_flags() -> None:
  flags.DEFINE_string("config", "compare", "Of `experiments.configs`.")
  flags.DEFINE_multi_string("set", [], "Overrides shared by all runs.")
  flags.DEFINE_multi_string(
    "optimizer",
    list(entrants_lib.ALL),
    "A name, and overrides of its own behind commas. The table sets all others "
    "against the first.",
  )
  flags.DEFINE_integer("seeds", 3, "Runs at the best point.", lower_bound=1)
  flags.DEFINE_integer(
    "weight_decay_search",
    6,
    "The most runs of an optimizer that look for a better weight decay; 0 "
    "keeps its default.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    "fallback_rate_search",
    6,
    "The most runs of an optimizer that look for a learning rate for what it "
    "leaves to AdamW; 0 keeps the optimizer's own, or --optimizer's.",
    lower_bound=0,
  )
  flags.DEFINE_string("workdir", None, "Where the runs live.")
  flags.DEFINE_string(
    "record", None, "JSON Lines file, appended to; default DIR/record.jsonl."
  )
  flags.DEFINE_bool(
    "plot_only", False, "Runs nothing: table and picture of the record."
  )
  flags.DEFINE_integer(
    "jobs",
    1,
    "Runs at once; each gets its share of the processors.",
    lower_bound=1,
  )


if __name__ == "__main__":
  errors.run_main("compare_optimizers", main, _define_flags)
