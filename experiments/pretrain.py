"""Pretrains a language model: `python -m experiments.pretrain --config=tiny`.

Runs or resumes. The directory gets config.json, metrics.jsonl, checkpoints/,
tensorboard/, and at the end summary.json and loss.png. See
`experiments.configs` for the fields that --set changes.
"""

from __future__ import annotations

import logging as std_logging
import pathlib
import re
from collections.abc import Sequence

import jax
from absl import flags, logging

from experiments import configs, errors, host_memory, loop

_CONFIG = flags.DEFINE_string(
  "config", "tiny", f"One of {', '.join(sorted(configs.CONFIGS))}."
)
_SET = flags.DEFINE_multi_string(
  "set", [], "path.to.field=value, such as optimizer.name=muon; repeatable."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run lives; by default under runs/, by its name."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "host:port of process 0, for several processes."
)
_PROCESSES = flags.DEFINE_integer("num_processes", 1, "How many processes.")
_PROCESS = flags.DEFINE_integer("process_id", 0, "Which of them this is.")


def main(argv: Sequence[str]) -> None:
  """Runs or resumes one config."""
  del argv
  host_memory.keep_freed()
  logging.set_verbosity(logging.ERROR)
  # A damaged checkpoint is reported by us; asyncio would add its own pages.
  std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
  config = configs.resolve(_CONFIG.value, _SET.value)
  if _COORDINATOR.value:
    jax.distributed.initialize(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    )
  loop.Run(config, _workdir()).train()


def _workdir() -> pathlib.Path:
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value)
  name = "-".join([_CONFIG.value, *sorted(_SET.value)])
  return pathlib.Path("runs") / re.sub(r"[^\w.=:-]", "_", name)


if __name__ == "__main__":
  errors.run_main("pretrain", main)
