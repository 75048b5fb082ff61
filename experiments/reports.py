"""What a run shows: progress, plots, TensorBoard, the machine's matmul rate."""

from __future__ import annotations

import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import tqdm


def matmul_rate(dtype: Any) -> float:
  """FLOP/s of one large square matmul on one device, the best of five.

  Args:
    dtype: of the operands; sums are float32.
  """
  n = 1024 if jax.default_backend() == "cpu" else 8192
  x = jnp.ones((n, n), dtype)
  dot = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  dot(x).block_until_ready()
  best = float("inf")
  for _ in range(5):
    start = time.perf_counter()
    dot(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best


def progress(total: int, done: int, visible: bool) -> tqdm.tqdm:
  """A bar with rate and ETA; in a log file, a line every ten seconds."""
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    total=total,
    initial=done,
    unit="step",
    disable=not visible,
    dynamic_ncols=True,
    mininterval=0.5 if terminal else 10,
  )


def bytes_text(count: float) -> str:
  """`1536` → `"1.5 KiB"`."""
  power = 0
  while abs(count) >= 1024 and power < 4:
    count, power = count / 1024, power + 1
  unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
  return f"{count:.1f} {unit}" if power else f"{count:.0f} {unit}"


def plot_loss(
  path: str | os.PathLike,
  metrics: list[dict[str, Any]],
  *,
  title: str,
  lines: dict[str, float],
) -> None:
  """Draws training and held-out loss against steps.

  Args:
    path: of the PNG, replaced atomically.
    metrics: records with "step", "loss" and sometimes "eval_loss".
    title: above the plot.
    lines: label → nats per token, drawn as horizontal lines to compare with.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
  train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
  held_out = [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m]
  axes.plot(*zip(*train, strict=True), lw=0.8, color="0.6", label="training")
  if held_out:
    axes.plot(*zip(*held_out, strict=True), "o-", ms=3, label="held out")
  for (label, value), style in zip(
    lines.items(), ("--", ":", "-."), strict=False
  ):
    axes.axhline(value, color="tab:red", ls=style, lw=1, label=label)
  axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
  axes.grid(alpha=0.3)
  axes.legend()
  part = pathlib.Path(path).with_suffix(".part.png")
  figure.savefig(part, dpi=120)
  os.replace(part, path)
  pyplot.close(figure)


class TensorBoard:
  """Scalar events under `directory`; records after `step` are superseded."""

  def __init__(self, directory: str | os.PathLike, step: int):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(
      str(directory), purge_step=step + 1 if step else None
    )

  def write(self, record: dict[str, Any]) -> None:
    """Writes every number of a record at its "step"."""
    for name, value in record.items():
      if name != "step" and isinstance(value, int | float):
        self._writer.add_scalar(name, value, record["step"])
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()
