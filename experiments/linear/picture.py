"""The picture of `experiments.linear_stability`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import reports

_COLORS = {"unconstrained": "tab:red", "constrained": "tab:blue"}


def draw(arrays: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws what `linear_stability.study` returns; suffixes .png and .svg."""
  import matplotlib

  matplotlib.use("Agg")
  # So that the same data give the same file.
  matplotlib.rcParams["svg.hashsalt"] = path.stem
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
  _plane(axes[0, 0], arrays["eigenvalues"])
  _steps(axes[0, 1], arrays["gain"])
  _products(axes[1, 0], arrays["running"])
  _coefficients(axes[1, 1], arrays["coefficients"])
  for ax in axes.flat:
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
  reports.save_figure(figure, path, dpi=110)
  pyplot.close(figure)


def _color(name):
  return _COLORS[name.split(", ")[1]]


def _untrained(named):
  return {n: x for n, x in named.items() if n.startswith("untrained")}.items()


def _plane(ax, eigenvalues):
  for name, points in _untrained(eigenvalues):
    ax.plot(
      points.real.ravel(),
      points.imag.ravel(),
      ".",
      ms=1,
      color=_color(name),
      label=name,
      rasterized=True,
    )
  angle = np.linspace(0, 2 * np.pi, 200)
  ax.plot(np.cos(angle), np.sin(angle), color="0.5", lw=0.8)
  ax.set(title="eigenvalues of one step", xlabel="real", ylabel="imaginary")
  ax.set_aspect("equal")


def _steps(ax, gain):
  share = np.linspace(0, 1, 201)
  for name, values in gain.items():
    style = "-" if name.startswith("untrained") else "--"
    ax.plot(
      np.quantile(values, share), share, style, color=_color(name), label=name
    )
  ax.axvline(1, color="0.5", lw=0.8)
  ax.set(
    title="growth in one step", xlabel="spectral norm", ylabel="share below"
  )


def _products(ax, running):
  styles = {"median": (0.5, ":"), "99%": (0.99, "-"), "largest": (1.0, "--")}
  for name, norms in _untrained(running):
    steps = np.arange(1, len(norms) + 1)
    for label, (q, style) in styles.items():
      ax.plot(
        steps,
        np.quantile(norms, q, axis=1),
        style,
        color=_color(name),
        label=f"{label}, {name}",
      )
  ax.axhline(1, color="0.5", lw=0.8)
  ax.set(
    title="growth over steps with one key",
    xlabel="steps",
    ylabel="spectral norm of their product",
    xscale="log",
    yscale="log",
    ylim=(1e-4, None),
  )


def _coefficients(ax, errors):
  for form, (sizes, values) in errors.items():
    ax.plot(sizes, np.minimum(values, 10), ".-", label=form)
  ax.set(
    title="coefficients of a chunk, float32, log alpha = -0.1",
    xlabel="-log mu",
    ylabel="largest relative error (10: not finite)",
    xscale="log",
    yscale="log",
  )
