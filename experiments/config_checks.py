"""Checks of a config: numbers out of range, overrides without effect."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from experiments import errors, optimizers
from models import config as model_config
from models import transformer

# The largest whole number of a run: steps and positions are 32-bit integers.
MOST = 2**31 - 1

# Layers that are not scanned are compiled one by one, most of a second each.
_MOST_UNROLLED = 1024

# Fields of a model that are compared with 32-bit positions.
_POSITIONS = ("window", "sink", "context")

# The mixers that read a field of the model.
_MIXERS_OF = {
  "window": ("window",),
  "sink": ("window",),
  "tail": ("sparse",),
  "density": ("sparse", "in_context"),
  "block_size": ("window", "sparse", "in_context"),
  "context": ("in_context",),
  "keep": ("in_context",),
  "sharp": ("in_context",),
  "num_kv_heads": model_config.SOFTMAX,
  "rope_theta": model_config.SOFTMAX,
  "min_log_mu": ("mdn",),
  "tau_factor": ("mdn",),
  "linear_heads": model_config.LINEAR,
  "linear_key_heads": model_config.LINEAR,
  "linear_key_dim": model_config.LINEAR,
  "linear_value_dim": model_config.LINEAR,
  "conv_width": model_config.LINEAR,
  "output_gate": tuple(n for n in model_config.LINEAR if n != "mamba2"),
}  # fmt: skip


def effects(
  config: Any, model: transformer.Config, given: Collection[str]
) -> None:
  """Refuses what was given on the command line and has no effect.

  Args:
    config: an `experiments.configs.Config`, all overrides applied.
    model: its model, for any vocabulary.
    given: the paths of the overrides.

  Raises:
    UserError: naming the override and what gives it an effect.
  """
  for path in given:
    group, _, field = path.partition(".")
    if group == "model" and field in _MIXERS_OF:
      _mixer(path, _MIXERS_OF[field], model)
    elif path in _CONDITIONS:
      remedy = _CONDITIONS[path](config)
      if remedy:
        raise errors.UserError(f"{path} has no effect with {remedy}")


def _mixer(path, needed, model):
  used = sorted(set(model.mixers[: model.num_layers]))
  if not set(used) & set(needed):
    raise errors.UserError(
      f"{path} has no effect with model.mixers={','.join(used)}; it needs a "
      f"layer that is {' or '.join(needed)}"
    )


def _path(config):
  if config.data.source == "python":
    return "data.source=python; set data.source=files or data.source=shards"
  return None


def _shards(config):
  # Their meta.json says which tokens they are, and which are held out.
  made = pathlib.Path(config.data.path) / "meta.json"
  if config.data.source == "shards" and made.exists():
    return f"data.source=shards where there is a {made}; leave it out"
  return None


def _format(config):
  name = optimizers.canonical(config.optimizer.name)
  if optimizers.quantized(name):
    return None
  return (
    f"optimizer.name={name}, whose matrices are not quantized; set "
    f"optimizer.name to one of {', '.join(sorted(optimizers.FORMATS))}"
  )


def _final_fraction(config):
  if config.optimizer.schedule == "constant":
    return (
      "optimizer.schedule=constant; set optimizer.schedule=cosine or linear"
    )
  return None


def _clip_norm(config):
  if (
    optimizers.needs_loss(config.optimizer.name) and config.optimizer.clip_norm
  ):
    return f"optimizer.name={config.optimizer.name}, which has no gradients"
  return None


def _warmup(config):
  training = config.training
  if training.warmup_steps > training.steps:
    return (
      f"training.steps={training.steps}: got {training.warmup_steps}; allowed: "
      "at most as many steps"
    )
  return None


_CONDITIONS: dict[str, Callable[[Any], str | None]] = {
  "data.path": _path,
  "data.tokenizer": _shards,
  "data.held_out": _shards,
  "quantization.format": _format,
  "optimizer.final_fraction": _final_fraction,
  "optimizer.clip_norm": _clip_norm,
  "training.warmup_steps": _warmup,
}


def training(fields: Any) -> None:
  """Refuses whole numbers of a run's `training` that are out of range.

  Args:
    fields: the `training` of any main's config.

  Raises:
    UserError: naming the field.
  """
  for field in ("steps", "batch_size", "log_every"):
    bound(f"training.{field}", getattr(fields, field), 1, MOST)
  for field in (
    "warmup_steps",
    "checkpoint_every",
    "eval_every",
    "eval_batches",
  ):
    bound(f"training.{field}", getattr(fields, field), 0, MOST)
  # JAX's keys take 32 bits: a larger seed would repeat a smaller one's run.
  bound("training.seed", fields.seed, 0, 2**32 - 1)


def model(fields: Mapping[str, Any]) -> None:
  """Refuses whole numbers of a model that no array's size can be.

  Args:
    fields: by name.

  Raises:
    UserError: naming the field.
  """
  for name, value in fields.items():
    for number in value if isinstance(value, tuple) else (value,):
      if type(number) is int:
        most = MOST if name in _POSITIONS else 2**63 - 1
        # Whether it is too small depends on the field: the model knows.
        bound(f"model.{name}", number, min(number, 0), most)


def unrolled(cfg: Any) -> None:
  """Refuses layers that would not be compiled in a day.

  Args:
    cfg: a model with `num_layers` and `scan_layers`.

  Raises:
    UserError: with the remedy.
  """
  if not cfg.scan_layers and cfg.num_layers > _MOST_UNROLLED:
    raise errors.UserError(
      f"model.num_layers: got {cfg.num_layers}; allowed: at most "
      f"{_MOST_UNROLLED} with model.scan_layers=False, for each is compiled; "
      "set model.scan_layers=True"
    )


def block_size(cfg: transformer.Config, length: int) -> None:
  """Refuses blocks that are longer than the sequences, which are padded.

  Args:
    cfg: the model.
    length: of the sequences; blocks of the default size are never refused.

  Raises:
    UserError: with the largest size.
  """
  most = max(length, model_config.Config.block_size)
  if set(cfg.pattern) & set(_MIXERS_OF["block_size"]):
    bound("model.block_size", cfg.block_size, 1, most)


def optimizer(fields: Any) -> None:
  """Refuses numbers of an optimizer and its schedule that are out of range.

  Args:
    fields: an `experiments.configs.Optimizer`, its defaults filled in.

  Raises:
    UserError: naming the field.
  """
  for field in ("learning_rate", "weight_decay", "clip_norm"):
    value = getattr(fields, field)
    bound(f"optimizer.{field}", value, 0, sys.float_info.max)
  bound("optimizer.final_fraction", fields.final_fraction, 0, 1)


def bound(
  name: str, value: float, least: float, most: float, *, strict: bool = False
) -> None:
  """Refuses a number outside a range, NaN too.

  Args:
    name: of the field, for the message.
    value: the number.
    least: the smallest that is allowed.
    most: the largest.
    strict: whether these two are refused as well.

  Raises:
    UserError: with what is allowed.
  """
  inside = least < value < most if strict else least <= value <= most
  if not inside:
    if strict:
      allowed = f"between {least} and {most}"
    elif most in (MOST, sys.float_info.max) and value < least:
      allowed = f"at least {least}"
    else:
      allowed = f"{least} to {most}"
    raise errors.UserError(f"{name}: got {value}, allowed: {allowed}")
