"""What a comparison's records say: best points, run noise, a table."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from experiments import optimizers
from experiments.comparison import search

# One-sided, as in the speed-runs whose rule this is.
_LEVEL = 0.001


@dataclasses.dataclass(frozen=True)
class Standing:
  """An entrant at its best point.

  Attributes:
    label: the entrant's.
    point: the best one.
    runs: its records, in the order of their seeds.
    edges: of the point's fields, those whose neighbours at this point have
      not both been tried; the fallback's only where it has been searched.
  """

  label: str
  point: search.Point
  runs: tuple[Mapping[str, Any], ...]
  edges: frozenset[str]

  @property
  def losses(self) -> list[float]:
    """Held-out losses, seed by seed."""
    return [r["final_eval_loss"] for r in self.runs]

  @property
  def mean(self) -> float:
    """Of the losses."""
    return statistics.fmean(self.losses)

  @property
  def deviation(self) -> float:
    """Standard deviation of the losses over seeds; nan of one run."""
    if len(self.losses) < 2 or math.isinf(self.mean):
      return float("nan")
    return statistics.stdev(self.losses)

  @property
  def bytes(self) -> float:
    """Of parameters and optimizer state; nan where no run came to its end."""
    run = self.runs[0]
    if "params_bytes" not in run:
      return float("nan")
    return run["params_bytes"] + run["optimizer_state_bytes"]


def stand(
  label: str, records: Sequence[Mapping[str, Any]], seeds: int
) -> Standing | None:
  """An entrant's best point, from its records alone.

  The best point is that of the least mean loss among those with `seeds` runs,
  or, where none has so many, among those with the most.

  Args:
    label: the entrant's.
    records: its runs.
    seeds: how many runs make a point complete.

  Returns:
    None without records.
  """
  points = collections.defaultdict(dict)
  for r in records:
    points[search.Point.of(r["config"]["optimizer"])][r["seed"]] = r
  if not points:
    return None
  enough = min(seeds, max(map(len, points.values())))
  whole = {p: runs for p, runs in points.items() if len(runs) >= enough}
  losses = lambda runs: [r["final_eval_loss"] for r in runs.values()]
  best = min(whole, key=lambda p: statistics.fmean(losses(whole[p])))
  fields = list(search.Point._fields)
  if all(p.fallback_learning_rate is None for p in points):
    fields.remove(optimizers.FALLBACK_RATE)
  edges = {
    field
    for field in fields
    for factor in (0.5, 2)
    if best.moved(field, factor * best.value(field)) not in points
  }
  runs = tuple(run for _, run in sorted(whole[best].items()))
  return Standing(label, best, runs, frozenset(edges))


@dataclasses.dataclass(frozen=True)
class Noise:
  """The spread of one entrant's runs over seeds, pooled over entrants.

  Attributes:
    deviation: root of the mean variance, weighted by degrees of freedom.
    freedom: degrees of freedom; 0 where no entrant has two runs.
  """

  deviation: float
  freedom: int

  @property
  def threshold(self) -> float:
    """What (difference of two means) · √n has to exceed; inf if unknown."""
    if not self.freedom:
      return math.inf
    quantile = float(stats.t.isf(_LEVEL, self.freedom))
    return quantile * math.sqrt(2) * self.deviation

  def differ(self, a: Standing, b: Standing) -> bool:
    """Whether two means differ by the rule, each over its own seeds.

    n is of the same weight where the numbers are not equal: 2 / (1/a + 1/b).
    """
    n = 2 / (1 / len(a.runs) + 1 / len(b.runs))
    return abs(a.mean - b.mean) * math.sqrt(n) > self.threshold


def noise(standings: Sequence[Standing]) -> Noise:
  """The run noise that standings measure; diverged runs have no part."""
  spread = [s for s in standings if not math.isnan(s.deviation)]
  freedom = sum(len(s.runs) - 1 for s in spread)
  squares = sum((len(s.runs) - 1) * s.deviation**2 for s in spread)
  return Noise(math.sqrt(squares / freedom) if freedom else math.nan, freedom)


def table(standings: Sequence[Standing]) -> str:
  """A Markdown table, the least loss first, under a caption.

  Args:
    standings: the reference first, to which all others are compared.

  Returns:
    The caption, then the table.
  """
  reference = standings[0]
  order = sorted(standings, key=lambda s: s.mean)
  measured = noise(standings)
  lines = [
    caption(standings, measured),
    "",
    "| optimizer | learning rate | weight decay | fallback's rate | held-out "
    f"loss (mean ± sd, n) | minus {reference.label} | minus the best | bits "
    "per byte | parameters + state, bytes |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for s in order:
    searched = [
      "" if value is None else f"{value:g}{'°' * (field in s.edges)}"
      for field, value in s.point._asdict().items()
    ]
    if math.isinf(s.mean):
      lines.append(f"| {s.label} | {' | '.join(searched)} | diverged | | | | |")
      continue
    spread = "" if math.isnan(s.deviation) else f" ± {s.deviation:.4f}"
    cells = [
      s.label,
      *searched,
      f"{s.mean:.4f}{spread} ({len(s.runs)})",
      _difference(s, reference, measured),
      _difference(s, order[0], measured),
      f"{statistics.fmean(r['bits_per_byte'] for r in s.runs):.3f}",
      f"{s.bytes:,.0f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _difference(s: Standing, other: Standing, measured: Noise) -> str:
  if s is other:
    return ""
  mark = "*" if measured.differ(s, other) else ""
  return f"{s.mean - other.mean:+.4f}{mark}"


def caption(standings: Sequence[Standing], measured: Noise) -> str:
  """What was run and how differences are judged."""
  run = next(r for s in standings for r in s.runs if "tokens" in r)
  lines = [
    f"Config {run['name']}: {run['parameters']:,} parameters, "
    f"{run['tokens']:,} training tokens, corpus {run['corpus']['hash']}; "
    "losses in nats per token at the end of the schedule. Learning rate and "
    "weight decay by seed 0, which is one of the n, as is the rate of what an "
    "optimizer leaves to AdamW where it is not the learning rate."
  ]
  if measured.freedom:
    lines.append(
      f"Run noise (standard deviation over seeds, pooled over entrants, "
      f"{measured.freedom} degrees of freedom): {measured.deviation:.4f}. A "
      f"star: |difference| · √n > {measured.threshold:.4f}, which noise alone "
      f"exceeds once in {1 / _LEVEL:.0f} comparisons, one-sided."
    )
  if any(s.edges for s in standings):
    lines.append("°: not both neighbours (half, double) have been tried.")
  return " ".join(lines)
