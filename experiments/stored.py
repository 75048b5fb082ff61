"""What a run left in a directory, for others and for itself."""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

from experiments import configs, errors
from jaxlib_ext import checkpoint, reading, records
from jaxlib_ext import config as config_lib
from models import config as model_config

# What every line of metrics.jsonl has.
_RECORD = {
  "step": int,
  "tokens": int,
  "loss": float,
  "seconds": float,
  "eval_loss?": float,
}


class Stored(NamedTuple):
  """What a run's `config.json` says.

  Attributes:
    config: of the run.
    model: the one that it resolved to.
    corpus_hash: of its data and tokens.
  """

  config: configs.Config
  model: model_config.Config
  corpus_hash: str


def facts(workdir: str | os.PathLike, field: str) -> dict[str, Any]:
  """The content of a run's `config.json`, of any main.

  Args:
    workdir: of the run.
    field: the flag or field that names it, for the message.

  Returns:
    At least "config", "model" and "corpus" with its "hash".

  Raises:
    UserError: there is no run, or the file is damaged.
  """
  path = os.path.join(workdir, "config.json")
  shape = {"config": dict, "model": dict, "corpus": {"hash": str}}
  try:
    return reading.read_json(path, shape)
  except (OSError, reading.ReadError) as e:
    raise errors.UserError(f"{field}: {workdir} is no run's: {e}") from e


def parse(cls: type, values: dict[str, Any], workdir: Any, field: str) -> Any:
  """A dataclass as `facts` holds it.

  Args:
    cls: the class.
    values: its fields.
    workdir: as for `facts`.
    field: as for `facts`.

  Raises:
    UserError: another class's fields, or values that it refuses.
  """
  try:
    return config_lib.from_dict(cls, values)
  except (ValueError, TypeError) as e:
    raise errors.UserError(f"{field}: {workdir} is no run's: {e}") from e


def read(workdir: pathlib.Path, field: str) -> Stored:
  """The description of the run in `workdir`.

  Args:
    workdir: of `experiments.pretrain`.
    field: the flag or field that names it, for the message.

  Raises:
    UserError: there is no run.
  """
  found = facts(workdir, field)
  return Stored(
    parse(configs.Config, found["config"], workdir, field),
    parse(model_config.Config, found["model"], workdir, field),
    found["corpus"]["hash"],
  )


def state(workdir: pathlib.Path, target: Any, field: str) -> tuple[int, Any]:
  """The step and state of the latest checkpoint that can be read.

  Nothing is written: the run may be going on.

  Args:
    workdir: of `experiments.pretrain`.
    target: `Trainer.target` of its config.
    field: as for `read`.

  Raises:
    UserError: there is none.
  """
  checkpoints = checkpoint.Checkpointer(workdir / "checkpoints")
  try:
    return checkpoints.latest_readable(target)
  except checkpoint.CheckpointError as e:
    raise errors.UserError(
      f"{field}: {workdir} has no checkpoint to read: {e}"
    ) from e
  finally:
    checkpoints.close()


def metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a run's `metrics.jsonl`, oldest first.

  Raises:
    UserError: the file is damaged.
  """
  try:
    return records.read(path, _RECORD)
  except reading.ReadError as e:
    raise errors.UserError(
      f"{e}; move {path.name} away to go on without what it says"
    ) from e


def history(
  path: pathlib.Path, steps: int
) -> tuple[list[dict[str, Any]], list[float]]:
  """The records of a finished run and the held-out losses among them.

  Args:
    path: of its `metrics.jsonl`.
    steps: that it has done.

  Raises:
    UserError: the file is damaged, or lacks the last step.
  """
  lines = metrics(path)
  evals = [m["eval_loss"] for m in lines if "eval_loss" in m]
  if not evals or lines[-1]["step"] != steps:
    raise errors.UserError(
      f"{path} has lost the record of the last step, so there can be no "
      "summary.json; the last checkpoint is whole"
    )
  return lines, evals


def check_config(then: dict[str, Any], now: Any, workdir: pathlib.Path) -> None:
  """Sees to it that a directory's run is this one.

  Fields that were added since it began count as at their defaults.

  Args:
    then: of the directory's `config.json`.
    now: the config of what is to be run, of any main.
    workdir: the directory, for the message.

  Raises:
    UserError: they differ in more than `configs.RESUMABLE`.
  """
  try:
    then = config_lib.to_dict(config_lib.from_dict(type(now), then))
  except config_lib.ConfigError:
    pass  # One that is gone shows as a difference.
  changed = [
    line
    for line in config_lib.differences(then, config_lib.to_dict(now))
    if not line.startswith(configs.RESUMABLE)
  ]
  if changed:
    raise errors.UserError(
      f"--workdir: {workdir} holds a run of another config "
      f"({'; '.join(changed)}); choose another --workdir"
    )


def check_corpus(then: str, now: str) -> None:
  """UserError unless the hash of a run's data is what it was.

  Args:
    then: when the run began.
    now: of what its configuration names today.
  """
  if then != now:
    raise errors.UserError(
      f"data: the corpus has changed since this run began: hash {then} then, "
      f"{now} now"
    )
