"""Trains a diffusion transformer on images or video, or on drawn shapes.

  python -m experiments.train_dit --config=images --data=DIRECTORY
  python -m experiments.train_dit --config=video --data=FILE

Images are a directory, a glob or a tar file; the name of the directory that
an image lies in is its class. Runs or resumes: the directory gets
config.json, metrics.jsonl, checkpoints/, samples/ (PNG), tensorboard/, and at
the end summary.json and loss.png. See `experiments.diffusion.configs` for the
fields that --set changes; with data.context=grey the model colours grey
images, which stand behind the target in its sequence.
"""

from __future__ import annotations

import logging
import pathlib

from absl import flags

from experiments import errors
from experiments.diffusion import configs
from experiments.diffusion import run as run_lib
from jaxlib_ext import host


def main() -> None:
  """Runs or resumes one config."""
  values = flags.FLAGS
  host.keep_freed_memory()
  # A damaged checkpoint is reported by us; asyncio would add its own pages.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  config = configs.resolve(values.config, values["set"].value, values.data)
  workdir = values.workdir or f"runs/dit_{values.config}"
  run_lib.Run(config, pathlib.Path(workdir)).train()


def _define_flags() -> None:
  flags.DEFINE_string(
    "config", "smoke", f"One of {', '.join(sorted(configs.CONFIGS))}."
  )
  flags.DEFINE_multi_string(
    "set", [], "path.to.field=value, such as training.steps=500."
  )
  flags.DEFINE_string("data", "", "Where the images or the video are.")
  flags.DEFINE_string(
    "workdir", None, "Where the run lives; by default under runs/."
  )


if __name__ == "__main__":
  errors.run_main("train_dit", main, _define_flags)
