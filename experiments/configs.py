"""Named experiments, and how `--set` changes them.

A config says everything that decides a run's numbers. `resolve` turns a name
and a list of overrides into one; the result is written as `config.json`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments import config_checks, errors, optimizers
from jaxlib_ext import config as config_lib
from jaxlib_ext import quantization
from models import transformer


def _as_tuples(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields with JSON's lists as what they were: a config is its JSON."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


@dataclasses.dataclass(frozen=True)
class Model:
  """The model: a preset's fields, then these.

  Attributes:
    preset: of `models.transformer.preset`; "" starts from `Config()`.
    fields: any fields of `models.transformer.Config`. Where they do not give
      `vocab_size`, it is the tokenizer's, whatever the preset says.
  """

  preset: str = ""
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    object.__setattr__(self, "fields", _as_tuples(self.fields))

  def build(self, vocab_size: int) -> transformer.Config:
    """The model's config, for a tokenizer of `vocab_size` ids."""
    fields = {"vocab_size": vocab_size, **self.fields}
    if self.preset:
      return transformer.preset(self.preset, **fields)
    return transformer.Config(**fields)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The optimizer and its learning-rate schedule.

  Attributes:
    name: one of `experiments.optimizers.names()`.
    learning_rate: at the top of the schedule; None takes the name's own
      default (`experiments.optimizers.DEFAULTS`).
    weight_decay: decoupled, not applied to vectors; None as above.
    schedule: what follows the warm-up.
    final_fraction: the last step's share of `learning_rate`.
    clip_norm: bound on the global norm of the gradient; 0 is none.
    arguments: further keyword arguments of the factory.
  """

  name: str = "adamw"
  learning_rate: float | None = None
  weight_decay: float | None = None
  schedule: Literal["cosine", "linear", "constant"] = "cosine"
  final_fraction: float = 0.1
  clip_norm: float = 0.0
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    object.__setattr__(self, "arguments", _as_tuples(self.arguments))


@dataclasses.dataclass(frozen=True)
class Quantization:
  """How the matrices are stored under an optimizer that keeps few bits.

  Attributes:
    format: of `jaxlib_ext.quantization`; None takes the optimizer's own
      (`experiments.optimizers.FORMATS`).
  """

  format: str | None = None


@dataclasses.dataclass(frozen=True)
class Training:
  """How long, on what batches, and what is written when (all in steps).

  Attributes:
    steps: optimizer steps in all.
    batch_size: sequences per step, over all devices.
    seq_len: tokens per sequence.
    warmup_steps: linear warm-up to the full learning rate.
    seed: of the parameters, the data order and the rounding.
    checkpoint_every: 0 saves only at the end and on a signal.
    eval_every: 0 evaluates only at the end.
    eval_batches: held-out batches per evaluation, evenly spread; 0 is all.
    log_every: records and progress.
    init_from: directory of another run, whose last parameters this one begins
      with; "" draws them. The models may differ in what has no parameters,
      such as `mixers` of softmax attention, their windows, or `rope_theta`.
  """

  steps: int = 1000
  batch_size: int = 16
  seq_len: int = 256
  warmup_steps: int = 100
  seed: int = 0
  checkpoint_every: int = 200
  eval_every: int = 200
  eval_batches: int = 16
  log_every: int = 10
  init_from: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; their product is what the run uses."""

  data: int = 1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Data:
  """Where the text comes from.

  Attributes:
    source: "python" (this interpreter's standard library), "files" or
      "shards" (what `experiments.write_shards` wrote).
    path: file, directory or glob, for "files" and "shards".
    tokenizer: "bytes", "bpe:SIZE" (trained on the training files) or the
      path of a tokenizer.json; shards bring their own.
    held_out: share of the bytes, in whole files, kept for evaluation.
  """

  source: Literal["python", "files", "shards"] = "python"
  path: str = ""
  tokenizer: str = "bytes"
  held_out: float = 0.05


@dataclasses.dataclass(frozen=True)
class Config:
  """One pretraining run."""

  name: str
  model: Model = Model()
  optimizer: Optimizer = Optimizer()
  quantization: Quantization = Quantization()
  training: Training = Training()
  mesh: Mesh = Mesh()
  data: Data = Data()


# What a resumed run may change: none of it changes the numbers, save that
# another mesh adds the same terms in another order.
RESUMABLE = ("mesh.", "training.checkpoint_every", "training.log_every")


def _smoke() -> Config:
  """`--config=smoke`: the whole path in under 30 seconds; learns little."""
  return Config(
    name="smoke",
    model=Model(fields=dict(d_model=64, num_layers=2, num_heads=2, d_ff=176)),
    training=Training(
      steps=60,
      batch_size=8,
      seq_len=128,
      warmup_steps=6,
      checkpoint_every=20,
      eval_every=20,
      eval_batches=4,
      log_every=5,
    ),
  )


def _tiny() -> Config:
  """`make pretrain`: a small language model of Python source code.

  Two to five minutes on 2 CPU cores; about 1.35 bits per byte held out, where
  `xz -9` needs 1.52.
  """
  return Config(
    name="tiny",
    model=Model(
      fields=dict(
        d_model=192, num_layers=4, num_heads=3, d_ff=512, scan_layers=False
      )
    ),
    optimizer=Optimizer(name="muon"),
    training=Training(
      steps=800,
      batch_size=8,
      seq_len=256,
      warmup_steps=80,
      checkpoint_every=100,
      eval_every=100,
      eval_batches=32,
      log_every=10,
    ),
    data=Data(tokenizer="bpe:2048"),
  )


def _compare() -> Config:
  """What `experiments.compare_optimizers` runs: a minute on one CPU core."""
  return Config(
    name="compare",
    model=Model(
      fields=dict(
        d_model=128, num_layers=3, num_heads=4, d_ff=352, scan_layers=False
      )
    ),
    training=Training(
      steps=300,
      batch_size=16,
      seq_len=128,
      warmup_steps=30,
      checkpoint_every=100,
      eval_every=100,
      eval_batches=32,
      log_every=10,
    ),
    data=Data(tokenizer="bpe:1024"),
  )


def _optimizers() -> Config:
  """The comparison of the whole family: about two minutes on one CPU core."""
  return Config(
    name="optimizers",
    model=Model(
      fields=dict(
        d_model=192, num_layers=4, num_heads=4, d_ff=512, scan_layers=False
      )
    ),
    training=Training(
      steps=400,
      batch_size=8,
      seq_len=128,
      warmup_steps=40,
      checkpoint_every=200,
      eval_every=200,
      eval_batches=64,
      log_every=20,
    ),
    data=Data(tokenizer="bpe:1024"),
  )


def _long_context() -> Config:
  """What `experiments.long_context` runs: 4,096 tokens a step, any length."""
  return Config(
    name="long_context",
    model=Model(
      fields=dict(
        d_model=192, num_layers=6, num_heads=4, d_ff=512, scan_layers=False
      )
    ),
    optimizer=Optimizer(name="muon"),
    training=Training(
      batch_size=2,
      warmup_steps=20,
      checkpoint_every=100,
      eval_every=100,
      eval_batches=16,
      log_every=10,
    ),
    data=Data(tokenizer="bpe:2048"),
  )


CONFIGS = {
  "compare": _compare,
  "long_context": _long_context,
  "optimizers": _optimizers,
  "smoke": _smoke,
  "tiny": _tiny,
}


def resolve(name: str, overrides: Sequence[str] = ()) -> Config:
  """The named config with `path.to.field=value` overrides applied.

  Raises:
    UserError: an unknown name, field or value, with the nearest names.
  """
  config = named(CONFIGS, name)
  try:
    for item in sorted(overrides, key=_order):
      config = _override(config, *split(item))
    config = _checked(config)
    given = {split(item)[0] for item in overrides}
    config_checks.effects(config, config.model.build(vocab_size=256), given)
  except ValueError as e:
    raise errors.UserError(f"--set: {e}") from e
  return config


def named(known: Mapping[str, Callable[[], Any]], name: str) -> Any:
  """The config of that name; UserError with the nearest names for others."""
  if name not in known:
    raise errors.UserError(
      f"--config: no config {name!r}; {config_lib.nearest(name, known)}"
    )
  return known[name]()


def split(item: str) -> tuple[str, str]:
  """path.to.field and value of an override; UserError without a `=`."""
  path, equals, value = item.partition("=")
  if not equals:
    raise errors.UserError(f"got {item!r}, expected path.to.field=value")
  return path, value


def _order(item: str) -> int:
  """The preset and the optimizer's name go first: others refine them."""
  first = ("model.preset=", "optimizer.name=")
  return 0 if item.startswith(first) else 1


def _override(config: Config, path: str, value: str) -> Config:
  group, _, field = path.partition(".")
  kind = transformer.Config
  kinds = kind.__annotations__
  if path == "model":
    raise errors.UserError(
      f"'model' is a group of fields, set one of: preset, {', '.join(kinds)}"
    )
  if group == "model" and field != "preset":
    if field not in kinds:
      raise errors.UserError(
        f"unknown field {path!r}; "
        f"{config_lib.nearest(field, ['preset', *kinds])}"
      )
    # The finished model is checked, not this field in the default one.
    parsed = config_lib.check(value, typing.get_type_hints(kind)[field], path)
    fields = {**config.model.fields, field: parsed}
    return dataclasses.replace(
      config, model=dataclasses.replace(config.model, fields=fields)
    )
  if path == "model.preset" and value:
    # The preset replaces the config's own shape; all else starts afresh too.
    return dataclasses.replace(config, model=Model(preset=value))
  own = {f.name for f in dataclasses.fields(Optimizer)} - {"arguments"}
  if group == "optimizer" and field and field not in own:
    name = config.optimizer.name
    parsed = optimizers.parse_argument(name, field, value, sorted(own))
    arguments = {**config.optimizer.arguments, field: parsed}
    return dataclasses.replace(
      config,
      optimizer=dataclasses.replace(config.optimizer, arguments=arguments),
    )
  return config_lib.replace(config, path, value)


def _checked(config: Config) -> Config:
  """Fills in the optimizer's defaults and refuses values out of range."""
  data = config.data
  config_checks.training(config.training)
  bound, most = config_checks.bound, config_checks.MOST
  bound("training.seq_len", config.training.seq_len, 1, most)
  for axis in dataclasses.fields(Mesh):
    bound(f"mesh.{axis.name}", getattr(config.mesh, axis.name), 1, most)
  bound("data.held_out", data.held_out, 0, 1, strict=True)
  if data.source != "python" and not data.path:
    raise errors.UserError(f"data.source={data.source} needs data.path")
  stored = config.quantization.format
  if stored is None:
    stored = optimizers.stored_format(config.optimizer.name)
  quantization.Format.parse(stored)
  config_checks.model(config.model.fields)
  config.model.build(vocab_size=256)
  optimizer = optimizers.with_defaults(config.optimizer)
  config_checks.optimizer(optimizer)
  training = config.training
  optimizers.build(optimizer, training.steps, training.warmup_steps, 0)
  return dataclasses.replace(
    config, optimizer=optimizer, quantization=Quantization(stored)
  )
