"""Prefill and decode against the length of the context, by token mixer.

  python -m experiments.bench_decode --lengths=512,2048,8192

Models of one shape that differ only in how their layers mix tokens take a
prompt of each length through `transformer.apply`, and then decode one token at
a time from a cache that is as full. First, on a short prompt, the logits of
`decode.prefill` and of the tokens decoded after it are compared with those of
`transformer.apply`; no time is taken unless they agree. Caches of random
models hold no text either, so those that are timed hold zeros. One JSON line
is appended to
`experiments/records/bench_decode.jsonl`, with a picture beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import bench_train, errors, reports
from jaxlib_ext import host, records
from models import decode, transformer

MIXERS = ("mdn", "gdn", "kda", "mamba2", "full")
CONFIG = transformer.Config(
  vocab_size=2048,
  d_model=256,
  num_layers=4,
  num_heads=4,
  d_ff=688,
)
# Of the values' check: a prompt that ends inside a chunk, then some tokens.
_CHECKED = (70, 4)
# Of the largest logit. Through the layers the two forms round their float32
# activations differently, some hundred roundings of 2**-24 each.
_TOLERANCE = 1e-5


class DisagreementError(Exception):
  """Decoding gives other logits than the parallel form."""


def _tokens(cfg: transformer.Config, length: int) -> jax.Array:
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.integers(0, cfg.vocab_size, (1, length)), jnp.int32)


class Side:
  """One model of random parameters.

  Args:
    cfg: the model.

  Attributes:
    parameters: how many.
  """

  def __init__(self, cfg: transformer.Config):
    self._cfg = cfg
    init = functools.partial(transformer.init, cfg=cfg)
    self._params = jax.jit(init)(jax.random.key(0))
    self.parameters = sum(x.size for x in jax.tree.leaves(self._params))

    def apply(params, tokens):
      logits = transformer.apply(params, tokens, cfg=cfg).logits
      return logits[:, -_CHECKED[1] - 1 :]

    self._apply = jax.jit(apply)
    # The cache is donated: a decoder has only one.
    step = functools.partial(decode.decode_step, cfg=cfg)
    self._step = jax.jit(step, donate_argnums=1)

  def check(self) -> float:
    """Compares prefill and decode with the parallel form.

    Returns:
      The largest difference of a logit over the largest logit.

    Raises:
      DisagreementError: it is above what rounding explains.
    """
    prompt, steps = _CHECKED
    tokens = _tokens(self._cfg, prompt + steps)
    want = self._apply(self._params, tokens)
    cache = decode.init_cache(self._cfg, 1, prompt + steps)
    prefill = jax.jit(functools.partial(decode.prefill, cfg=self._cfg))
    logits, cache = prefill(self._params, cache, tokens[:, :prompt])
    got = [logits]
    for i in range(prompt, prompt + steps):
      logits, cache = self._step(self._params, cache, tokens[:, i])
      got.append(logits)
    difference = jnp.stack(got, axis=1) - want
    worst = float(jnp.abs(difference).max() / jnp.abs(want).max())
    if not worst <= _TOLERANCE:
      raise DisagreementError(
        f"{self._cfg.mixers[0]}: decoded logits differ from the parallel "
        f"form's by {worst:.1e} of the largest, allowed {_TOLERANCE:.0e}; no "
        "time is taken"
      )
    return worst

  def prefill(self, length: int) -> float:
    """Seconds of a prefill."""
    tokens = jax.block_until_ready(_tokens(self._cfg, length))
    start = time.perf_counter()
    self._apply(self._params, tokens).block_until_ready()
    return time.perf_counter() - start

  def decode(self, length: int, steps: int) -> float:
    """Seconds of one of `steps` tokens decoded after `length`."""
    cache = decode.init_cache(self._cfg, 1, length + steps)
    cache = cache._replace(length=jnp.asarray(length, jnp.int32))
    token = _tokens(self._cfg, 1)[:, 0]
    jax.block_until_ready((cache, token))
    start = time.perf_counter()
    for _ in range(steps):
      logits, cache = self._step(self._params, cache, token)
    jax.block_until_ready((logits, cache))
    return (time.perf_counter() - start) / steps


def measure(
  base: transformer.Config,
  mixers: Sequence[str],
  lengths: Sequence[int],
  *,
  rounds: int,
  steps: int,
) -> dict[str, Any]:
  """Checks all models, then takes their times.

  Args:
    base: the shape; its mixers are replaced.
    mixers: names.
    lengths: of the contexts, tokens.
    rounds: turns of each model at each length.
    steps: tokens decoded in a turn.

  Returns:
    "errors", "parameters" by mixer; "rows", one per length and mixer with
    "cache_bytes", "prefill" and "decode" (tokens per second: median, min,
    max) and "seconds" of the turns; "load" of the machine before and after.

  Raises:
    DisagreementError: a model does not decode what it computes in parallel.
  """
  cfgs = {m: dataclasses.replace(base, mixers=(m,)) for m in mixers}
  sides = {m: Side(cfg) for m, cfg in cfgs.items()}
  worst = {m: side.check() for m, side in sides.items()}
  load = [os.getloadavg()]
  rows = []
  for length in lengths:
    turns = {m: [] for m in mixers}
    for round_ in range(rounds + 1):
      for m, side in sides.items():
        seconds = side.prefill(length), side.decode(length, steps)
        if round_:  # The first warms up.
          turns[m].append(seconds)
    for m, values in turns.items():
      prefill, each = zip(*values, strict=True)
      rows.append(
        {
          "length": length,
          "mixer": m,
          "cache_bytes": decode.cache_bytes(cfgs[m], length),
          "prefill": bench_train.spread([length / s for s in prefill]),
          "decode": bench_train.spread([1 / s for s in each]),
          "seconds": {"prefill": prefill, "decode": each},
        }
      )
  load.append(os.getloadavg())
  return {
    "model": dataclasses.asdict(base),
    "parameters": {m: side.parameters for m, side in sides.items()},
    "rounds": rounds,
    "steps": steps,
    "errors": worst,
    "rows": rows,
    "load": load,
  }


def report(record: Mapping[str, Any]) -> str:
  """The table printed."""
  lines = [
    "tokens  mixer    prefill, tokens/s         decode, tokens/s          cache"
  ]
  for row in record["rows"]:
    shown = []
    for name in ("prefill", "decode"):
      low, middle, high = (row[name][k] for k in ("min", "median", "max"))
      shown.append(f"{middle:,.0f} ({low:,.0f} to {high:,.0f})")
    lines.append(
      f"{row['length']:6d}  {row['mixer']:7s}  {shown[0]:24s}  {shown[1]:24s}  "
      f"{reports.bytes_text(row['cache_bytes'])}"
    )
  return "\n".join(lines)


def draw(record: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws rates and cache sizes against the length, `path` with .png, .svg."""
  import matplotlib

  matplotlib.use("Agg")
  matplotlib.rcParams["svg.hashsalt"] = path.stem
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
  panels = {
    "prefill": "prefill, tokens per second",
    "decode": "decode, tokens per second",
    "cache_bytes": "cache of a sequence, bytes",
  }
  lengths = sorted({row["length"] for row in record["rows"]})
  for ax, (field, title) in zip(axes, panels.items(), strict=True):
    for mixer in record["errors"]:
      rows = [r for r in record["rows"] if r["mixer"] == mixer]
      x = [r["length"] for r in rows]
      values = [r[field] for r in rows]
      if field != "cache_bytes":
        ax.fill_between(
          x, [v["min"] for v in values], [v["max"] for v in values], alpha=0.2
        )
        values = [v["median"] for v in values]
      ax.plot(x, values, "o-", ms=3, label=mixer)
    ax.set(title=title, xlabel="tokens of context", xscale="log", yscale="log")
    ax.set_xticks(lengths, [str(x) for x in lengths])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
  axes[0].legend(fontsize=8)
  reports.save_figure(figure, path, dpi=110)
  pyplot.close(figure)


def main() -> None:
  """Checks the values, takes the times, writes record and picture."""
  values = flags.FLAGS
  try:
    lengths = [int(x) for x in values.lengths]
  except ValueError as e:
    raise errors.UserError(f"--lengths: {e}") from e
  if not lengths or min(lengths) < 1:
    raise errors.UserError(f"--lengths: got {lengths}, allowed: 1 or more")
  unknown = sorted(set(values.mixers) - set(MIXERS))
  if unknown or not values.mixers:
    raise errors.UserError(
      f"--mixers: got {unknown or 'nothing'}, allowed: {list(MIXERS)}"
    )
  host.keep_freed_memory()
  try:
    record = measure(
      CONFIG,
      values.mixers,
      lengths,
      rounds=values.rounds,
      steps=values.steps,
    )
  except DisagreementError as e:
    sys.exit(f"bench_decode: {e}")
  print(report(record))
  if values.record:
    path = pathlib.Path(values.record)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(record, path)
    records.append(path, {**record, **records.provenance()})


def _define_flags() -> None:
  flags.DEFINE_list("mixers", list(MIXERS), "Which models.")
  flags.DEFINE_list(
    "lengths", ["512", "1024", "2048", "4096", "8192"], "Tokens of context."
  )
  flags.DEFINE_integer("rounds", 5, "Turns of each.", lower_bound=1)
  flags.DEFINE_integer("steps", 32, "Tokens decoded in a turn.", lower_bound=1)
  flags.DEFINE_string(
    "record",
    "experiments/records/bench_decode.jsonl",
    "The JSON Lines file that gets the record, pictures beside it; empty: "
    "none.",
  )


if __name__ == "__main__":
  errors.run_main("bench_decode", main, _define_flags)
