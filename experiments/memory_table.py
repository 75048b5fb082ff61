"""Bytes of weights, gradients, state and a step, beside the papers' figures.

  python -m experiments.memory_table --presets=60M,130M,350M,1B,7B

What is held between steps is counted from shapes, for parameters in float32
and in bfloat16; nothing is allocated. Our moments are float32 whatever the
parameters are in, those of the papers bfloat16: so bfloat16 is given twice,
as we hold it and with every number of the state in two bytes, as the papers
count. For the presets in --peak the whole training step is compiled, without
running it, for the bytes that XLA plans for at once; it must agree with the
count of what goes in and out. All figures are in GB of 10^9 bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import optim
from experiments import configs, errors, optimizers, trainer
from experiments.comparison import entrants
from jaxlib_ext import config as config_lib
from jaxlib_ext import quantization, records, sharding
from models import transformer

# Weights and optimizer state in GB, bfloat16: the table of the SCALE paper's
# release (arXiv 2506.16659) with its baselines.
PAPERS = {
  "adamw": {"60M": 0.35, "130M": 0.81, "350M": 2.21, "1B": 8.04},
  "stable_spam": {"60M": 0.35, "130M": 0.81, "350M": 2.21, "1B": 8.04},
  "muon": {"60M": 0.23, "130M": 0.54, "350M": 1.47, "1B": 5.36},
  "galore": {"60M": 0.28, "130M": 0.61, "350M": 1.59, "1B": 4.76},
  "fira": {"60M": 0.28, "130M": 0.61, "350M": 1.59, "1B": 4.76},
  "swan": {"60M": 0.25, "130M": 0.46, "350M": 1.00, "1B": 3.20},
  "apollo": {
    "60M": 0.28, "130M": 0.61, "350M": 1.59, "1B": 4.76, "7B": 16.14
  },
  "apollo_mini": {
    "60M": 0.25, "130M": 0.46, "350M": 1.00, "1B": 3.20, "7B": 14.53
  },
  "column_normalized_sgd": {
    "60M": 0.15, "130M": 0.32, "350M": 0.80, "1B": 2.81, "7B": 13.74
  },
}  # fmt: skip

# Of the projections, in the papers.
_GALORE = {"60M": 128, "130M": 256, "350M": 256, "1B": 512, "7B": 1024}
RANKS = {
  "galore": _GALORE,
  "q_galore": _GALORE,
  "fira": _GALORE,
  "apollo": {**_GALORE, "7B": 256},
}

COLUMNS = (
  "weights", "gradients", "state", "total", "bfloat16", "papers' way", "papers",
  "peak",
)  # fmt: skip


def rows() -> dict[str, entrants.Entrant]:
  """Every optimizer, by the label of its row."""
  every = (*entrants.ALL, *optimizers.ZEROTH_ORDER)
  parsed = (entrants.Entrant.parse(text) for text in every)
  # The control has AdamW's bytes.
  return {e.label: e for e in parsed if e.name != "scaled_adamw"}


def resolve(
  entrant: entrants.Entrant, preset: str, batch_size: int = 8, length: int = 256
) -> configs.Config:
  """The run of a row: the optimizer's defaults, at the papers' rank."""
  overrides = [
    f"training.batch_size={batch_size}",
    f"training.seq_len={length}",
    f"optimizer.name={entrant.name}",
    *entrant.overrides,
  ]
  rank = RANKS.get(entrant.name, {}).get(preset)
  if rank:
    overrides.append(f"optimizer.rank={rank}")
  return configs.resolve("smoke", overrides)


def count(config: configs.Config, cfg: transformer.Config) -> dict[str, Any]:
  """What a run holds between steps, from shapes.

  Args:
    config: of the optimizer.
    cfg: the model, whose `param_dtype` the weights are in.

  Returns:
    Bytes: "weights", "gradients", "state", "total" (weights and state), and
    "two_byte_total", the same with every number of the state that is not an
    integer in two bytes.
  """
  training = config.training
  tx = optimizers.build(config.optimizer, training.steps, 0, training.seed)

  def init():
    params = transformer.init(jax.random.key(0), cfg)
    if optimizers.quantized(config.optimizer.name):
      params = quantization.quantize_tree(params, config.quantization.format)
    return params

  params = jax.eval_shape(init)
  size = optim.state_bytes(tx, params)
  grads = jax.eval_shape(quantization.dequantize_tree, params)
  if optimizers.needs_loss(config.optimizer.name):
    grads = {}  # There are losses instead.
  numbers = [
    x
    for x in jax.tree.leaves(jax.eval_shape(tx.init, params))
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  spared = sum(max(x.dtype.itemsize - 2, 0) * x.size for x in numbers)
  return {
    "weights": size["params"],
    "gradients": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grads)),
    "state": size["state"],
    "total": size["total"],
    "two_byte_total": size["total"] - spared,
  }


def plan(config: configs.Config, cfg: transformer.Config) -> dict[str, int]:
  """Compiles one training step for one device.

  Args:
    config: of the optimizer and the batch.
    cfg: the model.

  Returns:
    Bytes: "arguments" and "results", what the compiled step takes and gives
    of parameters and state; "temporaries"; "peak", all that is live at once.

  Raises:
    AssertionError: "results" is not what `optim.state_bytes` counts, or
      "arguments" is less by more than the scalars of the state that a step
      writes and never reads.
  """
  mesh = sharding.make_mesh(
    {"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]
  )
  run = trainer.Trainer(config, cfg, mesh)
  total = run.state_bytes()["total"]
  planned = run.compiled.memory_analysis()
  training = config.training
  batch = 4 * training.batch_size * (training.seq_len + 1)
  counter = 4
  metrics = jax.tree.leaves(run.compiled.out_info[1])
  # The results are a tuple, which is a table of pointers.
  pointers = 8 * (len(jax.tree.leaves(run.target)) + len(metrics))
  results = planned.output_size_in_bytes - counter - pointers
  results -= sum(x.size * x.dtype.itemsize for x in metrics)
  arguments = planned.argument_size_in_bytes - counter - batch
  # An argument that is not read is dropped: ECO keeps a scalar for exports.
  unread = total - arguments
  assert results == total and 0 <= unread <= 4, (
    f"the compiled step of {config.optimizer.name} takes {arguments} and gives "
    f"{results} bytes of parameters and state; optim.state_bytes counts {total}"
  )
  return {
    "arguments": arguments,
    "results": results,
    "temporaries": planned.temp_size_in_bytes,
    "peak": run.planned_bytes(),
  }


def measure(
  entrant: entrants.Entrant,
  preset: str,
  compiled: bool,
  batch_size: int = 8,
  length: int = 256,
) -> dict[str, Any]:
  """One row of one preset: the record of `main` without its provenance.

  Raises:
    UserError: an unknown preset.
  """
  config = resolve(entrant, preset, batch_size, length)
  try:
    cfg = transformer.llama(preset)
  except ValueError as e:
    raise errors.UserError(f"--presets: {e}") from e
  half = dataclasses.replace(cfg, param_dtype="bfloat16")
  return {
    "name": entrant.label,
    "preset": preset,
    "model": config_lib.to_dict(cfg),
    "batch_size": batch_size,
    "seq_len": length,
    "optimizer": config_lib.to_dict(config.optimizer),
    "bytes": {
      "float32": count(config, cfg),
      "bfloat16": count(config, half),
      "step": plan(config, cfg) if compiled else None,
    },
    "papers_gb": PAPERS.get(entrant.label, {}).get(preset),
  }


def line(record: Mapping[str, Any]) -> str:
  """One row of the table."""
  wide, half = record["bytes"]["float32"], record["bytes"]["bfloat16"]
  step = record["bytes"]["step"]
  sizes = [
    *(wide[k] for k in ("weights", "gradients", "state", "total")),
    half["total"],
    half["two_byte_total"],
  ]
  cells = [f"{size / 1e9:.3f}" for size in sizes]
  papers = record["papers_gb"]
  cells.append("" if papers is None else f"{papers:.2f}")
  cells.append("" if step is None else f"{step['peak'] / 1e9:.3f}")
  return f"{record['name']:22s}" + "".join(f"{text:>12s}" for text in cells)


def write(path: str, record: dict[str, Any]) -> None:
  """Puts a record in the place of an older one of the same row."""
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  key = ("name", "preset", "batch_size", "seq_len")
  records.keep(path, lambda r: any(r[k] != record[k] for k in key))
  records.append(path, record | records.provenance())


def main() -> None:
  """Prints the tables and writes their records."""
  values, known = flags.FLAGS, rows()
  unknown = sorted(set(values.optimizers) - set(known))
  if unknown:
    raise errors.UserError(
      f"--optimizers: got {unknown}, allowed: {list(known)}"
    )
  for preset in values.presets:
    print(
      f"{preset}, in GB; peak: float32, batch {values.batch_size} x "
      f"{values.seq_len}, one device"
    )
    print(f"{'':22s}" + "".join(f"{name:>12s}" for name in COLUMNS))
    for name in values.optimizers:
      compiled = preset in values.peak
      record = measure(
        known[name], preset, compiled, values.batch_size, values.seq_len
      )
      print(line(record), flush=True)
      if values.record:
        write(values.record, record)


def _define_flags() -> None:
  flags.DEFINE_list(
    "presets", list(_GALORE), "Of `transformer.llama`, one or several."
  )
  flags.DEFINE_list(
    "peak", list(_GALORE), "The presets whose step is compiled."
  )
  flags.DEFINE_integer("batch_size", 8, "Sequences per step.", lower_bound=1)
  flags.DEFINE_integer("seq_len", 256, "Tokens per sequence.", lower_bound=1)
  flags.DEFINE_list("optimizers", list(rows()), "Which rows to make.")
  flags.DEFINE_string(
    "record",
    "experiments/records/memory_table.jsonl",
    "The JSON Lines file that gets one record per row; empty for none.",
  )


if __name__ == "__main__":
  errors.run_main("memory_table", main, _define_flags)
