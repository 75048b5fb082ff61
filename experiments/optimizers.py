"""Optimizers by name: how a config becomes an optax transformation."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optim
from experiments import errors
from jaxlib_ext import config as config_lib
from jaxlib_ext import labels
from optim import arguments


def _sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformation:
  """`optax.sgd` with decoupled weight decay."""
  return optax.chain(
    optax.trace(momentum, nesterov) if momentum else optax.identity(),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _scaled_adamw(
  learning_rate: optax.ScalarOrSchedule,
  scale: float = 0.25,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformation:
  """AdamW with `scale` of the rate for the matrices, as GaLore has it.

  The control of a comparison: what GaLore and its relatives gain beyond this
  one comes from their subspaces.
  """
  return optax.chain(
    optax.scale_by_adam(b1, b2, eps),
    optax.masked(optax.scale(scale), _matrices),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


# Every factory of `optim` that a training loop can drive.
_OWN = (
  "muon", "normuon", "adamuon", "dion", "dion2",
  "column_normalized_sgd", "swan", "sinkgd",
  "spam", "stable_spam",
  "galore", "q_galore", "fira", "apollo", "apollo_mini", "frugal",
  "eco", "mezo", "qzo",
)  # fmt: skip

FACTORIES: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": optax.adamw,
  "scaled_adamw": _scaled_adamw,
  "lion": optax.lion,
  "sgd": _sgd,
  **{name: getattr(optim, name) for name in _OWN},
}
ALIASES = {"scale": "column_normalized_sgd"}

# What a name stands for where the config is silent. The learning rates of
# adamw, column_normalized_sgd and eco are the best of the search in
# experiments/records/compare_optimizers.jsonl, muon's lies between its two
# best; the rest are customary values or follow from the papers'. One rate
# serves the matrices and what AdamW takes besides, so alpha brings SWAN and
# SinkGD to the length of Muon's updates. The papers reset moments and renew
# subspaces every few hundred of 10,000 steps and more, with b2=0.999; runs
# here have a tenth of that.
DEFAULTS: dict[str, dict[str, Any]] = {
  "adamw": dict(learning_rate=3e-3, weight_decay=0.1, b2=0.95),
  "scaled_adamw": dict(learning_rate=5e-3, weight_decay=0.05, b2=0.95),
  "lion": dict(learning_rate=5e-4, weight_decay=0.3),
  "sgd": dict(learning_rate=0.1, weight_decay=1e-3),
  "muon": dict(learning_rate=8e-3, weight_decay=0.1),
  "normuon": dict(learning_rate=8e-3, weight_decay=0.1),
  "adamuon": dict(learning_rate=8e-3, weight_decay=0.1),
  "dion": dict(learning_rate=8e-3, weight_decay=0.1),
  "dion2": dict(learning_rate=8e-3, weight_decay=0.1),
  "column_normalized_sgd": dict(
    learning_rate=1.5e-3, weight_decay=0.1, vector_learning_rate=3e-3
  ),
  "swan": dict(learning_rate=6e-3, weight_decay=0.1, alpha=0.2),
  "sinkgd": dict(learning_rate=6e-3, weight_decay=0.1, alpha=0.2),
  "spam": dict(
    learning_rate=3e-3, weight_decay=0.1, b2=0.95, reset_every=200, warmup=50
  ),
  "stable_spam": dict(
    learning_rate=3e-3, weight_decay=0.1, b2=0.95, reset_every=200
  ),
  **{
    name: dict(
      learning_rate=5e-3, weight_decay=0.05, b2=0.95, update_interval=50
    )
    for name in ("galore", "q_galore", "fira", "apollo", "apollo_mini")
  },
  "frugal": dict(
    learning_rate=2e-3, weight_decay=0.1, b2=0.95, update_interval=50
  ),
  "eco": dict(learning_rate=3e-3, weight_decay=0.1, inner="rms"),
  "mezo": dict(learning_rate=1e-6, weight_decay=0.0),
  "qzo": dict(learning_rate=1e-5, weight_decay=0.0),
}

# The optimizers whose matrices are held in few bits, each with the format
# that it takes where `quantization.format` is silent.
FORMATS = {"eco": "int4:32", "q_galore": "int8:256", "qzo": "int4:32"}

# Those that evaluate the loss themselves: `update(..., value_fn=)`.
ZEROTH_ORDER = ("mezo", "qzo")

# The directions that `optimizer.inner` of eco names.
INNER = {
  "none": lambda: None,
  "rms": lambda: optax.scale_by_rms(decay=0.95, eps=1e-8, bias_correction=True),
  "sign": optax.scale_by_sign,
  "muon": lambda: optim.scale_by_muon(momentum=0.0, nesterov=False),
  "column_norm": optim.scale_by_column_norm,
}

# Where a factory takes a `fallback`, the rate of its AdamW can be given.
FALLBACK_RATE = "fallback_learning_rate"

# Arguments that no flag can spell, or that the config gives in another way.
_RESERVED = {
  "learning_rate", "weight_decay", "labels", "fallback", "mask", "seed",
  "weight_decay_mask", "matrix_axes",
}  # fmt: skip


def names() -> list[str]:
  """Every name that `optimizer.name` takes."""
  return sorted([*FACTORIES, *ALIASES])


def canonical(name: str) -> str:
  """The factory's own name.

  Raises:
    UserError: unknown, with the nearest names.
  """
  name = ALIASES.get(name, name)
  if name not in FACTORIES:
    raise errors.UserError(
      f"optimizer.name: no optimizer {name!r}; "
      f"{config_lib.nearest(name, names())}"
    )
  return name


def quantized(name: str) -> bool:
  """Whether the optimizer's matrices are held in few bits."""
  return canonical(name) in FORMATS


def flushes(name: str) -> bool:
  """Whether the parameters to export are those of `optim.eco_flush`."""
  return canonical(name) == "eco"


def stored_format(name: str) -> str:
  """What `quantization.format` is by default; eco's where it is not used."""
  return FORMATS.get(canonical(name), FORMATS["eco"])


def needs_loss(name: str) -> bool:
  """Whether `update` has to be given the loss as a function, `value_fn`."""
  return canonical(name) in ZEROTH_ORDER


def has_fallback(name: str) -> bool:
  """Whether it leaves some parameters to AdamW, at `FALLBACK_RATE`."""
  return "fallback" in inspect.signature(FACTORIES[canonical(name)]).parameters


def parse_argument(
  name: str, argument: str, value: str, others: Sequence[str]
) -> Any:
  """Reads the text of `optimizer.<argument>` for the factory of `name`.

  Args:
    name: the optimizer's.
    argument: a keyword argument of its factory.
    value: as given on the command line.
    others: further names that `optimizer.` knows, for the message.

  Raises:
    UserError: no such argument, or a value of another type than the default.
  """
  where = f"optimizer.{argument}"
  parameters = inspect.signature(FACTORIES[canonical(name)]).parameters
  known = [p for p in parameters if p not in _RESERVED]
  if has_fallback(name):
    known.append(FALLBACK_RATE)
  if argument not in known:
    raise errors.UserError(
      f"unknown field {where!r} with optimizer.name={name}; "
      f"{config_lib.nearest(argument, [*known, *others])}"
    )
  if argument == FALLBACK_RATE:
    return config_lib.check(value, float, where)
  if argument == "inner":
    if value not in INNER:
      raise errors.UserError(
        f"{where}: got {value!r}; {config_lib.nearest(value, INNER)}"
      )
    return value
  default = parameters[argument].default
  kind = type(default) if type(default) in (int, float, bool, str) else Any
  if parameters[argument].annotation in ("int | float", "float | None"):
    kind = Any
  if kind is str:  # most take None as well
    return None if config_lib.literal(value) is None else value
  return config_lib.check(value, kind, where)


def with_defaults(optimizer: Any) -> Any:
  """Fills what an `experiments.configs.Optimizer` leaves open."""
  name = canonical(optimizer.name)
  defaults = dict(DEFAULTS[name])
  own = {}
  for field in ("learning_rate", "weight_decay"):
    value = defaults.pop(field)
    if getattr(optimizer, field) is None:
      own[field] = value
  return dataclasses.replace(
    optimizer, **own, arguments={**defaults, **optimizer.arguments}
  )


def schedule(
  optimizer: Any, peak: float, steps: int, warmup_steps: int
) -> optax.Schedule:
  """Linear warm-up from peak/warmup, then the config's decay.

  The first step has a learning rate above 0 and the last step has
  `peak * final_fraction`.
  """
  final = optimizer.final_fraction
  decay_steps = max(steps - 1 - warmup_steps, 1)

  def value(count):
    done = jnp.clip((count - warmup_steps) / decay_steps, 0.0, 1.0)
    if optimizer.schedule == "cosine":
      share = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    elif optimizer.schedule == "linear":
      share = 1 - (1 - final) * done
    else:
      share = jnp.ones_like(done)
    warm = jnp.minimum((count + 1) / max(warmup_steps, 1), 1.0)
    return peak * warm * share

  return value


def build(
  optimizer: Any, steps: int, warmup_steps: int, seed: int
) -> optax.GradientTransformation:
  """Makes the transformation of a config whose defaults are filled in.

  Args:
    optimizer: an `experiments.configs.Optimizer`.
    steps: of the whole run, where the schedule ends.
    warmup_steps: of the schedule.
    seed: of whatever the optimizer draws.

  Raises:
    UserError: what the factory refuses.
  """
  name = canonical(optimizer.name)
  rate = schedule(optimizer, optimizer.learning_rate, steps, warmup_steps)
  kwargs = dict(optimizer.arguments)
  for key in [k for k in kwargs if k.endswith("_learning_rate")]:
    if kwargs[key] is not None:
      kwargs[key] = schedule(optimizer, kwargs[key], steps, warmup_steps)
  if FALLBACK_RATE in kwargs:
    kwargs["fallback"] = kwargs.pop(FALLBACK_RATE)
  if "inner" in kwargs:
    kwargs["inner"] = INNER[kwargs["inner"]]()
  parameters = inspect.signature(FACTORIES[name]).parameters
  if "seed" in parameters:
    kwargs["seed"] = seed
  if "mask" in parameters:
    kwargs["mask"] = _decayed
  with refusals(name):
    if name not in _OWN:
      _check_arguments(kwargs)
    tx = FACTORIES[name](rate, weight_decay=optimizer.weight_decay, **kwargs)
  if optimizer.clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), tx)
  return tx


@contextlib.contextmanager
def refusals(name: str) -> Iterator[None]:
  """Turns what an optimizer refuses, such as a rank, into a `UserError`."""
  try:
    yield
  except (TypeError, ValueError) as e:
    line = str(e).splitlines()[0]
    raise errors.UserError(f"optimizer.name={name}: {line}") from e


def _check_arguments(kwargs: dict[str, Any]) -> None:
  """Refuses what optax's factories take and compute nonsense with."""
  for key, value in kwargs.items():
    if key in arguments.RULES and value is not None:
      arguments.RULES[key].check(key, value)


def _labelled(test: Callable[[str], bool]) -> Callable[[Any], Any]:
  """A mask of the leaves whose label passes."""
  return lambda params: jax.tree.map(test, labels.resolve(None, params))


_decayed = _labelled(lambda label: label != "vector")
_matrices = _labelled(lambda label: label == "matrix")
