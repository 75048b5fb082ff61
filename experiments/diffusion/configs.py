"""Named configs of `experiments.train_dit`, and how `--set` changes them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

from experiments import config_checks, configs, errors, optimizers
from jaxlib_ext import config as config_lib
from models import dit

# Fields of the model that the data decide.
_DERIVED = ("num_classes", "context")


@dataclasses.dataclass(frozen=True)
class Data:
  """What is modelled.

  Attributes:
    source: "synthetic" (shapes that move), "images" or "video".
    path: of "images" a directory, a glob or a tar file, of "video" one file.
    held_out: share kept for evaluation: of the images, where none lies under
      a directory "test", else those; of a video's frames, the last ones.
    limit: images to read, evenly spread; 0 is all.
    downscale: of a video's frames, before they are cropped.
    labels: whether the model is told the class, the directory's name.
    context: what the model sees besides: "none", or the target made "grey".
    flip: mirrors half of the training examples.
  """

  source: Literal["synthetic", "images", "video"] = "synthetic"
  path: str = ""
  held_out: float = 0.1
  limit: int = 0
  downscale: int = 1
  labels: bool = True
  context: Literal["none", "grey"] = "none"
  flip: bool = True


@dataclasses.dataclass(frozen=True)
class Training(configs.Training):
  """How long, on what batches, and what is written when (all in steps).

  Attributes:
    seq_len: tokens of an example; the model decides it.
    ema: decay of the mean of the parameters that evaluation and samples use;
      (1 + step) / (10 + step) where that is less.
    times: distribution of the noise, one of `models.dit_flow.TIMES`.
    label_dropout: share of the labels that are hidden.
  """

  seq_len: int = 0
  ema: float = 0.999
  times: Literal["uniform", "logit_normal"] = "logit_normal"
  label_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Samples:
  """What is drawn, from the same noise every time.

  Attributes:
    every: steps of training between two pictures; 0 is the end only.
    count: how many samples.
    steps: of Euler's method.
    guidance: of the class; 1 is none.
  """

  every: int = 0
  count: int = 8
  steps: int = 25
  guidance: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
  """One run; `model` has fields of `models.dit.Config`."""

  name: str
  model: dict[str, Any]
  optimizer: configs.Optimizer = configs.Optimizer(name="adamw", clip_norm=1.0)
  training: Training = Training()
  samples: Samples = Samples()
  data: Data = Data()

  def build(self, num_classes: int) -> dit.Config:
    """The model's config, for data of so many classes.

    Raises:
      UserError: fields that do not fit each other.
    """
    try:
      return dit.Config(
        **self.model,
        num_classes=num_classes if self.data.labels else 0,
        context=self.data.context != "none",
      )
    except ValueError as e:
      raise errors.UserError(f"model: {e}") from e


def _smoke() -> Config:
  """`--config=smoke`: the whole path in seconds, on shapes."""
  return Config(
    name="smoke",
    model=dict(
      input_shape=(16, 16, 3),
      d_model=32,
      num_layers=2,
      num_heads=2,
      tile=(4, 4),
    ),
    training=Training(
      steps=60,
      batch_size=8,
      warmup_steps=6,
      checkpoint_every=20,
      eval_every=20,
      eval_batches=2,
      log_every=5,
    ),
    samples=Samples(every=30, steps=10),
    data=Data(limit=256, context="grey"),
  )


_OPTIMIZER = configs.Optimizer(name="adamw", learning_rate=2e-3, clip_norm=1.0)


def _images() -> Config:
  """Colours images of 32 x 32 pixels: 256 tokens, and 256 of the grey ones.

  An hour or so on 2 CPU cores.
  """
  return Config(
    name="images",
    model=dict(input_shape=(32, 32, 3), tile=(4, 4), scan_layers=False),
    optimizer=_OPTIMIZER,
    training=Training(
      steps=2000,
      batch_size=16,
      warmup_steps=50,
      checkpoint_every=100,
      eval_every=250,
      eval_batches=8,
      log_every=10,
      ema=0.995,
    ),
    samples=Samples(every=250, count=12),
    data=Data(source="images", context="grey"),
  )


def _video() -> Config:
  """Clips of 8 frames of 64 x 64 pixels: 1024 tokens, tiles of 2 x 4 x 4."""
  return Config(
    name="video",
    model=dict(
      input_shape=(8, 64, 64, 3),
      patch=(2, 4, 4),
      tile=(2, 4, 4),
      scan_layers=False,
    ),
    optimizer=_OPTIMIZER,
    training=Training(
      steps=600,
      batch_size=4,
      warmup_steps=30,
      checkpoint_every=100,
      eval_every=200,
      eval_batches=8,
      log_every=10,
      ema=0.99,
    ),
    samples=Samples(every=200, count=4),
    data=Data(source="video", downscale=4, labels=False),
  )


CONFIGS = {"images": _images, "smoke": _smoke, "video": _video}


def resolve(name: str, overrides: Sequence[str] = (), path: str = "") -> Config:
  """The named config with `path.to.field=value` overrides applied.

  Args:
    name: of `CONFIGS`.
    overrides: what `--set` gives.
    path: `data.path`, where not empty.

  Raises:
    UserError: an unknown name, field or value, with the nearest names.
  """
  config = configs.named(CONFIGS, name)
  try:
    for item in overrides:
      config = _override(config, *configs.split(item))
  except ValueError as e:
    raise errors.UserError(f"--set: {e}") from e
  if path:
    config = config_lib.replace(config, "data.path", path)
  return _checked(config)


def _override(config: Config, path: str, value: str) -> Config:
  group, _, field = path.partition(".")
  if group != "model":
    return config_lib.replace(config, path, value)
  kinds = typing.get_type_hints(dit.Config)
  known = [name for name in kinds if name not in _DERIVED]
  if field not in known:
    raise errors.UserError(
      f"unknown field {path!r}; {config_lib.nearest(field, known)}"
    )
  parsed = config_lib.check(value, kinds[field], path)
  return dataclasses.replace(config, model={**config.model, field: parsed})


def _checked(config: Config) -> Config:
  """Fills in what follows from the rest; refuses values out of range."""
  training, data = config.training, config.data
  config_checks.training(training)
  for group, field, least in (
    ("training", "eval_batches", 1),
    ("samples", "every", 0),
    ("samples", "count", 1),
    ("samples", "steps", 1),
    ("data", "limit", 0),
    ("data", "downscale", 1),
  ):
    value = getattr(getattr(config, group), field)
    config_checks.bound(f"{group}.{field}", value, least, config_checks.MOST)
  for name, value in (
    ("training.ema", training.ema),
    ("training.label_dropout", training.label_dropout),
  ):
    _check(name, 0 <= value < 1, value, "0 to below 1")
  _check("data.held_out", 0 < data.held_out < 1, data.held_out, "in (0, 1)")
  guided = config.samples.guidance != 1
  if guided and not (data.labels and training.label_dropout):
    raise errors.UserError(
      f"samples.guidance: got {config.samples.guidance}; allowed: 1 without "
      "data.labels and training.label_dropout"
    )
  if data.source != "synthetic" and not data.path:
    raise errors.UserError(
      f"--data: data.source={data.source} needs a path (or data.path)"
    )
  config_checks.model(config.model)
  cfg = config.build(num_classes=1)
  tokens = cfg.num_tokens * (1 + cfg.context)
  _check(
    "training.seq_len",
    training.seq_len in (0, tokens),
    training.seq_len,
    f"what the model has, {tokens}",
  )
  optimizer = optimizers.with_defaults(config.optimizer)
  config_checks.optimizer(optimizer)
  optimizers.build(optimizer, training.steps, training.warmup_steps, 0)
  return dataclasses.replace(
    config,
    optimizer=optimizer,
    training=dataclasses.replace(training, seq_len=tokens),
  )


def _check(name: str, ok: bool, got: Any, allowed: str) -> None:
  if not ok:
    raise errors.UserError(f"{name}: got {got}; allowed: {allowed}")
