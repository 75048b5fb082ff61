"""Teaches a language model a longer context, with less attention than full.

  python -m experiments.long_context --workdir=DIR

A model with full attention is trained on short sequences. From its weights
each of --mixers continues on longer ones, with the same tokens in the same
order and the same learning rates; what they remember while decoding differs:

  full        every key, in all layers
  hybrid      every key in the middle third of the layers, a window and the
              first tokens in the others (LongGen, arXiv:2410.01485)
  heads       windows of four lengths in the heads of all layers (MoA,
              arXiv:2406.14909), with the hybrid's keys in all
  window      one window in all layers, with the hybrid's keys in all
  blocks      chosen blocks with the others pooled (PISA), every key kept

Every run is an `experiments.pretrain` directory below --workdir, so a study
that was stopped continues. The loss of each token of the held-out windows is
then averaged by position; a record per model goes into --record, a table is
printed, and the curves lie beside the record as PNG and SVG.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import configs, data, errors, loop, reports, stored
from jaxlib_ext import config as config_lib
from jaxlib_ext import records
from models import config as model_config
from models import decode, losses, transformer

VARIANTS = ("full", "hybrid", "heads", "window", "blocks")
_SINK = 4


@dataclasses.dataclass(frozen=True)
class Options:
  """What the flags say.

  Attributes:
    mixers: of `VARIANTS`.
    workdir: of the runs.
    record: JSON Lines file; the plots lie beside it.
    config: of `experiments.configs`, for both stages.
    shared: overrides of all runs.
    batch_tokens: tokens of a step, whole sequences of both stages.
    short: tokens of a sequence of the first stage.
    long: tokens of a sequence of the second stage.
    short_steps: of the first stage.
    long_steps: of the second stage.
    theta: base of the rotary wavelengths in the second stage.
    seeds: of both stages, 0, 1, ...
    examples: held-out windows of `long` tokens.
  """

  mixers: tuple[str, ...]
  workdir: pathlib.Path
  record: pathlib.Path
  config: str
  shared: tuple[str, ...]
  batch_tokens: int
  short: int
  long: int
  short_steps: int
  long_steps: int
  theta: float
  seeds: int
  examples: int


def variant(name: str, cfg: model_config.Config, length: int) -> dict[str, Any]:
  """The fields of a model's config that make it the named variant.

  Args:
    name: of `VARIANTS`.
    cfg: the model with full attention.
    length: tokens of a sequence.
  """
  n, heads = cfg.num_layers, cfg.num_heads
  short = length // 8
  outer = n // 3 or 1
  if name == "full":
    return dict(mixers=("full",))
  if name == "blocks":
    return dict(mixers=("sparse",), density=0.125)
  if name == "hybrid":
    pattern = tuple(
      "window" if i < outer or i >= n - outer else "full" for i in range(n)
    )
    return dict(mixers=pattern, window=(short,), sink=_SINK)
  kept = ((n - 2 * outer) * length + 2 * outer * (short + _SINK)) / n - _SINK
  if name == "window":
    return dict(mixers=("window",), window=(round(kept),), sink=_SINK)
  # Each window twice the one before, the longest at most the sequence.
  ratio = 2.0 ** np.arange(4)[np.arange(heads) * 4 // heads]
  windows = np.minimum(ratio * kept / ratio.mean(), length)
  return dict(
    mixers=("window",), window=tuple(int(w) for w in windows), sink=_SINK
  )


def _overrides(
  options: Options, seed: int, length: int, **training: Any
) -> list[str]:
  training |= {
    "seed": seed,
    "seq_len": length,
    "batch_size": options.batch_tokens // length,
  }
  return [
    *options.shared,
    *(f"training.{name}={value}" for name, value in training.items()),
  ]


def _spelled(fields: dict[str, Any]) -> list[str]:
  text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else str(v)
  return [f"model.{name}={text(value)}" for name, value in fields.items()]


def _trained(
  options: Options, name: str, overrides: Sequence[str]
) -> loop.Run | None:
  """A finished run, trained now unless it was before; None at a signal."""
  config = configs.resolve(options.config, overrides)
  workdir = options.workdir / name
  finished = (workdir / "summary.json").exists()
  run = loop.Run(config, workdir, read_only=finished)
  if not finished:
    print(f"-- {name}", flush=True)
    if not run.train():
      return None
  return run


def by_position(run: loop.Run, params: Any, examples: int) -> np.ndarray:
  """Mean nats at each position of held-out windows: float64 `[T]`.

  Args:
    run: whose model, data and length are meant.
    params: the model's.
    examples: windows, evenly spread over the held-out tokens.
  """

  @jax.jit
  def nats(tokens):
    out = transformer.apply(params, tokens[:, :-1], cfg=run.trainer.cfg)
    return losses.cross_entropy(out.logits, tokens[:, 1:])[0]

  total, count = 0.0, 0.0
  for tokens, weights in data.eval_batches(
    run.corpus.eval,
    batch_size=1,
    seq_len=run.config.training.seq_len,
    max_batches=examples,
  ):
    loss = np.asarray(nats(jnp.asarray(tokens)), np.float64)
    total, count = total + (loss * weights).sum(0), count + weights.sum(0)
  return total / np.maximum(count, 1)


def _buckets(loss: np.ndarray) -> dict[int, float]:
  """Means over (0, 64], (64, 128], (128, 256] ...: by the last position."""
  ends = [64]
  while ends[-1] < len(loss):
    ends.append(min(2 * ends[-1], len(loss)))
  starts = [0, *ends[:-1]]
  return {
    b: round(float(loss[a:b].mean()), 5)
    for a, b in zip(starts, ends, strict=True)
  }


def _measure(options: Options, name: str, seed: int, run: loop.Run):
  """The record of a finished run, or the one that is there."""
  cfg = run.trainer.cfg
  job = {
    "mixers": name,
    "seed": seed,
    "short": options.short,
    "long": options.long,
    "short_steps": options.short_steps,
    "long_steps": options.long_steps,
    "examples": options.examples,
    "data": run.corpus.hash,
    "model": config_lib.to_dict(cfg),
  }
  known = records.find(records.read(options.record), job)
  if known:
    return known
  _, state = stored.state(run.workdir, run.trainer.target, "--workdir")
  loss = by_position(run, state.params, options.examples)
  training = config_lib.to_dict(run.config.training)
  del training["init_from"]  # A path of this machine.
  record = {
    **job,
    "loss": round(float(loss.mean()), 5),
    "by_position": {str(k): v for k, v in _buckets(loss).items()},
    "cache_bytes": decode.cache_bytes(cfg, options.long),
    "training": training,
    "optimizer": config_lib.to_dict(run.config.optimizer),
    **records.provenance(),
  }
  records.append(options.record, record)
  return record


def study(options: Options) -> list[dict[str, Any]] | None:
  """Trains and measures everything; None where a signal ended it."""
  found = []
  for seed in range(options.seeds):
    base = _trained(
      options,
      f"short_{seed}",
      _overrides(options, seed, options.short, steps=options.short_steps),
    )
    if base is None:
      return None
    for name in options.mixers:
      fields = variant(name, base.trainer.cfg, options.long)
      fields["rope_theta"] = options.theta
      overrides = [
        *_overrides(
          options,
          seed,
          options.long,
          steps=options.long_steps,
          init_from=base.workdir,
        ),
        *_spelled(fields),
      ]
      run = _trained(options, f"{name}_{seed}", overrides)
      if run is None:
        return None
      found.append(_measure(options, name, seed, run))
  return found


def _groups(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  names = dict.fromkeys(r["mixers"] for r in found)
  return {n: [r for r in found if r["mixers"] == n] for n in names}


def table(found: Sequence[dict[str, Any]]) -> str:
  """A Markdown table: loss by position, and what decoding remembers."""
  ends = list(found[0]["by_position"])
  lines = [
    "| attention | cache of a sequence | loss, all positions | "
    + " | ".join(f"≤ {end}" for end in ends)
    + " |",
    "|---" * (3 + len(ends)) + "|",
  ]
  for name, runs in _groups(found).items():
    means = [np.mean([r["by_position"][end] for r in runs]) for end in ends]
    loss = [r["loss"] for r in runs]
    spread = f" ± {np.std(loss, ddof=1):.4f}" if len(loss) > 1 else ""
    size = reports.bytes_text(runs[0]["cache_bytes"])
    lines.append(
      f"| {name} | {size} | {np.mean(loss):.4f}{spread} (n={len(loss)}) | "
      + " | ".join(f"{m:.3f}" for m in means)
      + " |"
    )
  return "\n".join(lines)


def plot(path: pathlib.Path, found: Sequence[dict[str, Any]]) -> None:
  """Draws the loss by position as `path` with .png and with .svg."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  # So that the same records give the same bytes.
  with pyplot.rc_context({"svg.hashsalt": "long_context"}):
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, runs), marker in zip(
      _groups(found).items(), "osD^vP" * len(found), strict=False
    ):
      x = [int(end) for end in runs[0]["by_position"]]
      y = np.array([list(r["by_position"].values()) for r in runs])
      size = reports.bytes_text(runs[0]["cache_bytes"])
      label = f"{name} ({size})"
      (line,) = axes.plot(x, y.mean(0), marker=marker, ms=4, label=label)
      axes.fill_between(
        x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, lw=0
      )
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(end) for end in x])
    axes.minorticks_off()
    axes.set(
      xlabel="position in the sequence, up to",
      ylabel="held-out loss (nats per token)",
      title=f"After {found[0]['long']} tokens of context were learned",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="attention (cache)")
    reports.save_figure(figure, path, dpi=120)
    pyplot.close(figure)


def main() -> None:
  """Trains, measures, prints and draws."""
  values = flags.FLAGS
  unknown = sorted(set(values.mixers) - set(VARIANTS))
  if unknown or not values.mixers:
    raise errors.UserError(
      f"--mixers: got {unknown}, allowed: {', '.join(VARIANTS)}"
    )
  if not values.workdir:
    raise errors.UserError("--workdir: expected a directory for the runs")
  if values.long <= values.short:
    raise errors.UserError(
      f"--long: got {values.long}, allowed: more than --short={values.short}"
    )
  for name in ("short", "long"):
    if values.batch_tokens % values[name].value:
      raise errors.UserError(
        f"--batch_tokens: got {values.batch_tokens}, allowed: whole sequences "
        f"of --{name}={values[name].value}"
      )
  workdir = pathlib.Path(values.workdir)
  options = Options(
    tuple(values.mixers),
    workdir,
    pathlib.Path(values.record or workdir / "long_context.jsonl"),
    values.config,
    tuple(values["set"].value),
    values.batch_tokens,
    values.short,
    values.long,
    values.short_steps,
    values.long_steps,
    values.rope_theta,
    values.seeds,
    values.examples,
  )
  options.record.parent.mkdir(parents=True, exist_ok=True)
  found = study(options)
  if found is not None:
    print(table(found))
    plot(options.record.with_suffix(""), found)


def _define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Where the runs live.")
  flags.DEFINE_string(
    "record", None, "JSON Lines file; default DIR/long_context.jsonl."
  )
  flags.DEFINE_list("mixers", list(VARIANTS), "What continues.")
  flags.DEFINE_string("config", "long_context", "Of `experiments.configs`.")
  flags.DEFINE_multi_string("set", [], "Overrides shared by all runs.")
  whole = lambda name, value, text: flags.DEFINE_integer(
    name, value, text, lower_bound=1
  )
  whole("batch_tokens", 4096, "Tokens of a step.")
  whole("short", 256, "Tokens of a sequence at first.")
  whole("long", 2048, "Tokens of a sequence afterwards.")
  whole("short_steps", 600, "Steps of the first stage.")
  whole("long_steps", 200, "Steps of the second stage.")
  whole("seeds", 1, "Runs of both stages.")
  whole("examples", 32, "Held-out windows whose loss is read.")
  flags.DEFINE_float(
    "rope_theta",
    80000.0,
    "Base of the rotary wavelengths in the second stage.",
    lower_bound=1.0,
  )


if __name__ == "__main__":
  errors.run_main("long_context", main, _define_flags)
