"""Tables and figures of `experiments.sparse_quality`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import reports
from experiments.sparse import measure

_COLORS = {
  "drop": "0.45",
  "mean": "tab:blue",
  "mean_global": "tab:orange",
  "mean_local": "tab:green",
  "mean_var": "tab:red",
  "window": "tab:brown",
  "window_sink": "tab:olive",
  "tokens": "tab:pink",
}
# With a tail where they are lists of blocks.
_CHOICES = {
  "topk": "o-",
  "topk_sink": "v-",
  "topk_cov": "^-",
  "threshold": "s-",
  "top_p": "D-",
  "oracle": "*-",
  "window": "x--",
  "window_sink": "+--",
  "tokens": "P--",
}
_TAIL = "mean"
_DENSITY = 0.15


class Results:
  """The results of one source and layout, by layer.

  Args:
    layers: records of its layers.
  """

  def __init__(self, layers: Sequence[dict[str, Any]]):
    self.layers = sorted(layers, key=lambda record: record["layer"])

  def __getitem__(self, key: tuple[str, str, float]) -> tuple:
    """Achieved density, kept mass and errors, each `[L, H]`, of a key.

    The key is (choice, tail, density). A choice of tokens has no tail.
    """
    choice, tail, density = key
    found = [
      result
      for record in self.layers
      for result in record["results"]
      if (result["choice"], result["density"]) == (choice, density)
    ]
    errors = [r["error"].get(tail, r["error"]["drop"]) for r in found]
    return tuple(
      np.array(x)
      for x in (
        [r["achieved"] for r in found],
        [r["mass"] for r in found],
        errors,
      )
    )

  @property
  def densities(self) -> list[float]:
    """Those that were asked for."""
    first = self.layers[0]["results"]
    return sorted({r["density"] for r in first if "mass" in r})

  @property
  def choices(self) -> list[str]:
    """In the order of `_CHOICES`."""
    first = self.layers[0]["results"]
    present = {r["choice"] for r in first}
    return [name for name in _CHOICES if name in present]

  def tails(self, choice: str) -> list[str]:
    """Those that a choice was measured with."""
    for result in self.layers[0]["results"]:
      if result["choice"] == choice:
        return list(result["error"])
    return []

  def grouped(self, keep: float) -> list[tuple[float, dict[str, float]]]:
    """Density and mean errors of in-context attention and its equals.

    Args:
      keep: share of the context that it keeps.
    """
    out = {}
    for record in self.layers:
      for result in record["results"]:
        # Records from before it was varied have the published one.
        kept = result.get("keep", measure.KEEP)
        if result["choice"] == "in_context" and kept == keep:
          out.setdefault(result["sharp"], []).append(result)
    mean = lambda values: float(np.mean(list(values)))
    return [
      (
        mean(r["density"] for r in results),
        {
          name: mean(r["error"][name] for r in results)
          for name in results[0]["error"]
        },
      )
      for _, results in sorted(out.items())
    ]


def table(title: str, results: Results) -> str:
  """Markdown: mean error over layers and heads, and the kept mass."""
  densities = results.densities
  heads = []
  for density in densities:
    achieved = results["topk", _TAIL, density][0].mean()
    heads.append(f"{density:g} ({achieved:.3f})")
  lines = [
    f"| {title}: blocks | tail | {' | '.join(heads)} | mass at "
    f"{_nearest(densities):g} |",
    "|---" * (3 + len(heads)) + "|",
  ]
  for choice in results.choices:
    for tail in results.tails(choice):
      values = [results[choice, tail, d][2].mean() for d in densities]
      mass = results[choice, tail, _nearest(densities)][1].mean()
      errors = " | ".join(f"{x:.3f}" for x in values)
      lines.append(f"| {choice} | {tail} | {errors} | {mass:.3f} |")
  for keep in (measure.KEEP, 1.0):
    for density, errors in results.grouped(keep):
      text = ", ".join(f"{name} {x:.3f}" for name, x in errors.items())
      lines.append(
        f"\nin-context, {keep:g} kept, at {density:.3f} exact, beside top-k: "
        f"{text}"
      )
  return "\n".join(lines)


def _nearest(densities: Sequence[float]) -> float:
  """The density that single numbers are shown at."""
  return min(densities, key=lambda x: abs(x - _DENSITY))


def draw(
  path: pathlib.Path, title: str, results: Results, raster: Results | None
) -> None:
  """Draws one source as `path` with .png and with .svg.

  Args:
    path: of the figure.
    title: above it.
    results: of the source.
    raster: of the same in raster order.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  # So that the same results give the same bytes.
  with pyplot.rc_context({"svg.hashsalt": title}):
    figure, axes = pyplot.subplots(
      2, 2, figsize=(11, 8.2), layout="constrained"
    )
    _tails(axes[0, 0], results)
    _choices(axes[0, 1], results)
    _layers(axes[1, 0], results)
    if raster is None:
      _masses(axes[1, 1], results)
    else:
      _layouts(axes[1, 1], results, raster)
    for ax in axes.flat:
      ax.grid(alpha=0.3, which="both")
      ax.legend(fontsize=7)
    figure.suptitle(title)
    reports.save_figure(figure, path, dpi=110)
    pyplot.close(figure)


def _curve(ax, results, choice, tail, band=False, **style):
  """Mean over layers and heads; the band is of the layers' means."""
  found = [results[choice, tail, d] for d in results.densities]
  x = [achieved.mean() for achieved, _, _ in found]
  by_layer = np.array([errors.mean(axis=1) for _, _, errors in found])
  (line,) = ax.plot(x, by_layer.mean(axis=1), **style)
  if band:
    ax.fill_between(
      x,
      by_layer.min(axis=1),
      by_layer.max(axis=1),
      color=line.get_color(),
      alpha=0.12,
      lw=0,
    )


def _scales(ax, title):
  ax.set_xscale("log")
  ax.set_yscale("log")
  ticks = [0.05, 0.1, 0.2, 0.5]
  ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
  ax.set_xticks([], minor=True)
  ax.set(title=title, xlabel="exact share of what is seen")
  ax.set_ylabel("relative error of the output")


def _tails(ax, results):
  for tail in results.tails("topk"):
    _curve(
      ax,
      results,
      "topk",
      tail,
      band=tail in ("drop", "mean"),
      color=_COLORS[tail],
      marker="o",
      ms=3,
      label=tail,
    )
  _scales(ax, "tails of top-k blocks (bands: least and most of the layers)")


def _choices(ax, results):
  for choice in results.choices:
    style = _CHOICES[choice]
    label = choice if style.endswith("--") else f"{choice}, {_TAIL}"
    _curve(
      ax,
      results,
      choice,
      _TAIL,
      marker=style[0],
      linestyle=style[1:],
      ms=4,
      label=label,
    )
  _scales(ax, "choices (dashed: tokens, the rest dropped)")


def _layers(ax, results):
  density = _nearest(results.densities)
  entries = [("topk", tail) for tail in results.tails("topk")]
  entries += [(c, "drop") for c in results.choices if "--" in _CHOICES[c]]
  width = 0.8 / len(entries)
  for i, (choice, tail) in enumerate(entries):
    errors = results[choice, tail, density][2]
    x = np.arange(len(errors)) + (i - len(entries) / 2 + 0.5) * width
    name = tail if choice == "topk" else choice
    color = _COLORS[name]
    ax.bar(x, errors.mean(axis=1), width * 0.9, color=color, label=name)
    # Every head.
    ax.plot(x, errors, "k.", ms=2)
  ax.set_xticks(range(len(results.layers)))
  ax.set(
    title=f"layers at density {density:g} (points: heads)",
    xlabel="layer",
    ylabel="relative error of the output",
  )


def _masses(ax, results):
  for choice in results.choices:
    found = [results[choice, _TAIL, d] for d in results.densities]
    x = [achieved.mean() for achieved, _, _ in found]
    y = [1 - mass.mean() for _, mass, _ in found]
    style = _CHOICES[choice]
    ax.plot(x, y, style, ms=4, label=choice)
  _scales(ax, "attention that is not exact")
  ax.set_ylabel("share of the attention's mass")


def _layouts(ax, results, raster):
  for name, found, style in (
    ("tiles", results, "-"),
    ("raster order", raster, ":"),
  ):
    for tail in ("drop", "mean", "mean_global"):
      _curve(
        ax,
        found,
        "topk",
        tail,
        color=_COLORS[tail],
        linestyle=style,
        marker="o",
        ms=3,
        label=f"{name}, {tail}",
      )
  grouped = results.grouped(measure.KEEP)
  if grouped:
    ax.plot(
      [density for density, _ in grouped],
      [errors["in_context"] for _, errors in grouped],
      "k*--",
      label="in-context attention, tiles",
    )
  _scales(ax, "tiles and raster order, top-k blocks")
