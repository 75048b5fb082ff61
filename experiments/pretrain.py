"""Pretrains a language model: `python -m experiments.pretrain --config=tiny`.

Runs or resumes. The directory gets config.json, metrics.jsonl, checkpoints/,
tensorboard/, and at the end summary.json and loss.png. See
`experiments.configs` for the fields that --set changes.
"""

from __future__ import annotations

import logging
import pathlib
import re

import jax
from absl import flags

from experiments import configs, errors, loop
from jaxlib_ext import host


def main() -> None:
  """Runs or resumes one config."""
  values = flags.FLAGS
  host.keep_freed_memory()
  # A damaged checkpoint is reported by us; asyncio would add its own pages.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  config = configs.resolve(values.config, values["set"].value)
  if values.coordinator_address:
    jax.distributed.initialize(
      values.coordinator_address, values.num_processes, values.process_id
    )
  loop.Run(config, _workdir(values)).train()


def _workdir(values: flags.FlagValues) -> pathlib.Path:
  if values.workdir:
    return pathlib.Path(values.workdir)
  name = "-".join([values.config, *sorted(values["set"].value)])
  return pathlib.Path("runs") / re.sub(r"[^\w.=:-]", "_", name)


def _define_flags() -> None:
  flags.DEFINE_string(
    "config", "tiny", f"One of {', '.join(sorted(configs.CONFIGS))}."
  )
  flags.DEFINE_multi_string(
    "set", [], "path.to.field=value, such as optimizer.name=muon."
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "Where the run lives; by default under runs/, by its name.",
  )
  flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, if several."
  )
  flags.DEFINE_integer("num_processes", 1, "How many processes.")
  flags.DEFINE_integer("process_id", 0, "Which of them this is.")


if __name__ == "__main__":
  errors.run_main("pretrain", main, _define_flags)
