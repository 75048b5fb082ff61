"""Bytes of parameters and optimizer state, by count and by compiler.

`python -m experiments.memory_table --preset=130M` compiles the training step
of several optimizers without running it, and checks that the bytes that XLA
says the step takes are those that `optim.state_bytes` counts from shapes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from experiments import configs, errors, reports, trainer
from jaxlib_ext import config as config_lib
from jaxlib_ext import records, sharding
from models import transformer

ROWS = {
  "adamw": ("optimizer.name=adamw",),
  "muon": ("optimizer.name=muon",),
  "column_normalized_sgd": ("optimizer.name=column_normalized_sgd",),
  "eco int4:32": ("optimizer.name=eco", "quantization.format=int4:32"),
  "eco float8_e4m3fn": (
    "optimizer.name=eco",
    "quantization.format=float8_e4m3fn",
  ),
}


def measure(config: configs.Config, cfg: transformer.Config) -> dict[str, Any]:
  """Compiles one training step for one device.

  Args:
    config: of the optimizer and the batch.
    cfg: the model.

  Returns:
    Bytes: "params", "state" and "total" as `optim.state_bytes` counts them;
    "arguments" and "results", what the compiled step takes and gives of
    parameters and state; "temporaries"; "peak", all that is live at once.

  Raises:
    AssertionError: "results" is not "total", or "arguments" is less by more
      than the scalars of the state that a step writes and never reads.
  """
  mesh = sharding.make_mesh(
    {"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]
  )
  run = trainer.Trainer(config, cfg, mesh)
  size = run.state_bytes()
  plan = run.compiled.memory_analysis()
  training = config.training
  batch = 4 * training.batch_size * (training.seq_len + 1)
  counter, metrics = 4, 2 * 4
  # The results are a tuple, which is a table of pointers.
  pointers = 8 * (len(jax.tree.leaves(run.target)) + 2)
  results = plan.output_size_in_bytes - counter - metrics - pointers
  arguments = plan.argument_size_in_bytes - counter - batch
  # An argument that is not read is dropped: ECO keeps a scalar for exports.
  unread = size["total"] - arguments
  assert results == size["total"] and 0 <= unread <= 4, (
    f"the compiled step of {config.optimizer.name} takes {arguments} and gives "
    f"{results} bytes of parameters and state; optim.state_bytes counts "
    f"{size['total']}"
  )
  return {
    "parameters": run.num_params,
    "params": size["params"],
    "state": size["state"],
    "total": size["total"],
    "per_param": size["per_param"],
    "arguments": arguments,
    "results": results,
    "temporaries": plan.temp_size_in_bytes,
    "peak": run.planned_bytes(),
  }


def line(name: str, size: Mapping[str, float]) -> str:
  """One row of the table."""
  shown = (reports.bytes_text(size[k]) for k in COLUMNS)
  return f"{name:22s}" + "".join(f"{text:>13s}" for text in shown)


COLUMNS = ("params", "state", "total", "arguments", "temporaries", "peak")


def main() -> None:
  """Prints the table and appends its records."""
  values = flags.FLAGS
  unknown = sorted(set(values.optimizers) - set(ROWS))
  if unknown:
    raise errors.UserError(
      f"--optimizers: got {unknown}, allowed: {list(ROWS)}"
    )
  try:
    cfg = transformer.llama(values.preset)
  except ValueError as e:
    raise errors.UserError(f"--preset: {e}") from e
  print(
    f"{values.preset}, batch {values.batch_size} x {values.seq_len}, one device"
  )
  print(f"{'':22s}" + "".join(f"{name:>13s}" for name in COLUMNS))
  for name in values.optimizers:
    config = configs.resolve(
      "smoke",
      (
        f"training.batch_size={values.batch_size}",
        f"training.seq_len={values.seq_len}",
        *ROWS[name],
      ),
    )
    size = measure(config, cfg)
    print(line(name, size), flush=True)
    if values.record:
      os.makedirs(os.path.dirname(values.record) or ".", exist_ok=True)
      record = {
        "name": name,
        "preset": values.preset,
        "model": dataclasses.asdict(cfg),
        "batch_size": values.batch_size,
        "seq_len": values.seq_len,
        "optimizer": config_lib.to_dict(config.optimizer),
        "bytes": size,
        **records.provenance(),
      }
      records.append(values.record, record)


def _define_flags() -> None:
  flags.DEFINE_string("preset", "130M", "Of `transformer.llama`.")
  flags.DEFINE_integer("batch_size", 8, "Sequences per step.", lower_bound=1)
  flags.DEFINE_integer("seq_len", 256, "Tokens per sequence.", lower_bound=1)
  flags.DEFINE_list("optimizers", list(ROWS), "Which rows to make.")
  flags.DEFINE_string(
    "record",
    "experiments/records/memory_table.jsonl",
    "The JSON Lines file that gets one record per row; empty for none.",
  )


if __name__ == "__main__":
  errors.run_main("memory_table", main, _define_flags)
