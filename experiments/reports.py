"""What a run shows: progress, plots, TensorBoard, the machine's matmul rate."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from experiments import errors
from jaxlib_ext import records


def matmul_rate(dtype: Any) -> float:
  """FLOP/s of one large square matmul on one device, the best of five.

  Args:
    dtype: of the operands; sums are float32.
  """
  n = 1024 if jax.default_backend() == "cpu" else 8192
  x = jnp.ones((n, n), dtype)
  dot = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
  return flop_rate(lambda: dot(x), 2 * n**3)


def flop_rate(run: Callable[[], jax.Array], flops: float) -> float:
  """FLOP/s of a call that does `flops`, the best of five after the first."""
  run().block_until_ready()
  best = float("inf")
  for _ in range(5):
    start = time.perf_counter()
    run().block_until_ready()
    best = min(best, time.perf_counter() - start)
  return flops / best


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
  if count >= 1024**7:  # Such a number is not divided as a float.
    return f"10^{math.floor(math.log10(count))} B"
  power = 0
  while abs(count) >= 1024 and power < 6:
    count, power = count / 1024, power + 1
  unit = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")[power]
  return f"{count:.1f} {unit}" if power else f"{count:.0f} {unit}"


def save_figure(
  figure: Any,
  path: str | os.PathLike,
  *,
  dpi: int,
  suffixes: Sequence[str] = (".png", ".svg"),
) -> None:
  """Writes `path` with each suffix, whole or not at all.

  Without a date, so that the same figure gives the same bytes.
  """
  path = pathlib.Path(path)
  for suffix in suffixes:
    part = path.with_suffix(f".part{suffix}")
    metadata = {"Date": None} if suffix == ".svg" else None
    with open(part, "wb", opener=records.own_file) as f:
      figure.savefig(f, format=suffix[1:], dpi=dpi, metadata=metadata)
    os.replace(part, path.with_suffix(suffix))


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
  save_figure(figure, path, dpi=120, suffixes=(".png",))
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


class Meter:
  """Turns a step's metrics into a record, a progress bar and events.

  Args:
    run: the `experiments.loop.Run` that it measures.
    first: steps completed before.
  """

  def __init__(self, run: Any, first: int):
    self._run = run
    self._flops = run.trainer.flops_per_token()
    rate = matmul_rate(jnp.dtype(run.trainer.cfg.compute_dtype))
    mesh = run.trainer.mesh
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # Simulated CPU devices share one processor.
    self._peak = rate * (jax.process_count() if on_cpu else mesh.size)
    past = records.read(run.metrics_path)
    self._seconds = past[-1]["seconds"] if past else 0.0
    self._bar = progress(run.config.training.steps, first, run.main)
    self._board = None
    if run.main:
      self._board = TensorBoard(run.workdir / "tensorboard", first)
    self.restart(first)

  def __enter__(self) -> Meter:
    return self

  def __exit__(self, *exc) -> None:
    self._bar.close()
    if self._board:
      self._board.close()

  def restart(self, step: int) -> None:
    """Begins a new interval: evaluations and checkpoints are not training."""
    self._step, self._start = step, time.perf_counter()

  def measure(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, Any]:
    """Waits for the step and measures the interval that it ends.

    Raises:
      UserError: the loss is not finite.
    """
    config = self._run.config
    values = {name: float(value) for name, value in metrics.items()}
    elapsed = time.perf_counter() - self._start
    self._seconds += elapsed
    if not math.isfinite(values["loss"]):
      raise errors.UserError(
        f"the loss is {values['loss']} at step {step}; the last checkpoint is "
        "kept; try a lower optimizer.learning_rate or optimizer.clip_norm=1"
      )
    per_step = config.training.batch_size * config.training.seq_len
    rate = (step - self._step) * per_step / elapsed
    share = rate * self._flops / self._peak
    self._bar.set_postfix_str(
      f"loss {values['loss']:.3f}, {rate:,.0f} tok/s, {share:.0%} of matmul "
      "rate",
      refresh=False,
    )
    self._bar.update(step - self._bar.n)
    return {
      "tokens": step * per_step,
      **values,
      "tokens_per_second": rate,
      "matmul_share": share,
      "peak_bytes": self._run.trainer.peak_bytes(),
      "seconds": self._seconds,
    }

  def write(self, step: int, record: dict[str, Any]) -> None:
    """Appends one line to metrics.jsonl and to TensorBoard's events."""
    record = {"step": step, **record, "corpus": self._run.corpus.hash}
    if self._run.main:
      records.append(self._run.metrics_path, record)
      self._board.write(record)
