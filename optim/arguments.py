"""Checks of arguments and of parameter trees, the same for every method.

What an argument may be depends on its name alone: `checked` looks a factory's
arguments up in one table.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_ext import labels, paths

_Factory = TypeVar("_Factory", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
  """What a numeric argument may be.

  NumPy's scalars and arrays without dimensions count as Python's numbers. A
  value that is traced, as `optax.inject_hyperparams` hands them on, cannot be
  looked at: only its shape and dtype are checked.

  Attributes:
    allowed: in words.
    holds: whether a number is allowed.
    whole: whether only whole numbers are.
    static: whether it fixes shapes, so that it cannot be a JAX array.
    schedule: whether a function of the steps so far is taken too.
    infinite: whether infinity means something.
    precise: whether its distance from 1 matters, which narrow dtypes lose.
  """

  allowed: str
  holds: Callable[[Any], bool]
  whole: bool = False
  static: bool = False
  schedule: bool = False
  infinite: bool = False
  precise: bool = False

  def check(self, name: str, value: Any) -> Any:
    """The value, NumPy's made Python's.

    Raises:
      ValueError: naming the argument, what it got and what is allowed.
    """
    if callable(value):
      if self.schedule:
        return value
      raise ValueError(f"{self._must(name)}; it takes no schedule")
    if isinstance(value, jax.Array):
      return self._check_array(name, value)
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
      value = value.item()
    kind = numbers.Integral if self.whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
      raise ValueError(f"{self._must(name)}, got {value!r}")
    self._check_value(name, value)
    return value

  def _check_value(self, name: str, value: Any) -> None:
    finite = math.isfinite(value) or (self.infinite and value == math.inf)
    if not (finite and self.holds(value)):
      raise ValueError(f"{self._must(name)}, got {value!r}")

  def _check_array(self, name: str, value: jax.Array) -> jax.Array:
    kind = f"{value.dtype}{list(value.shape)}"
    if self.static:
      raise ValueError(
        f"{name} must be static, for it fixes shapes: {self.allowed} and no "
        f"JAX array, got {kind}; under optax.inject_hyperparams pass "
        f'static_args=("{name}",)'
      )
    numeric = jnp.integer if self.whole else (jnp.integer, jnp.floating)
    numeric = numeric if isinstance(numeric, tuple) else (numeric,)
    if value.ndim or not any(jnp.issubdtype(value.dtype, k) for k in numeric):
      raise ValueError(f"{self._must(name)}, got an array {kind}")
    narrow = jnp.issubdtype(value.dtype, jnp.floating) and (
      jnp.finfo(value.dtype).bits < 32
    )
    if self.precise and narrow:
      raise ValueError(
        f"{name} must be in at least float32, got {kind}, where 0.999 may be "
        "1; under optax.inject_hyperparams, which rounds to the parameters' "
        "dtype, pass hyperparam_dtype=jnp.float32"
      )
    if not isinstance(value, jax.core.Tracer) and value.is_fully_addressable:
      self._check_value(name, value.item())
    return value

  def _must(self, name: str) -> str:
    return f"{name} must be {self.allowed}"


@dataclasses.dataclass(frozen=True)
class Flag:
  """A switch."""

  def check(self, name: str, value: Any) -> bool:
    """The value.

    Raises:
      ValueError: naming the argument.
    """
    if not isinstance(value, bool | np.bool_):
      raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _transformation(value: Any) -> optax.GradientTransformation | None:
  """What optax takes for one, as `optax.MultiSteps` is; None for all else."""
  if isinstance(value, optax.GradientTransformation):
    return value
  if hasattr(value, "gradient_transformation"):
    return value.gradient_transformation()
  if hasattr(value, "init") and hasattr(value, "update"):
    return optax.GradientTransformation(value.init, value.update)
  return None


class Inner:
  """A transformation."""

  def check(self, name: str, value: Any) -> optax.GradientTransformation:
    """The transformation.

    Raises:
      ValueError: naming the argument.
    """
    tx = _transformation(value)
    if tx is None:
      raise ValueError(
        f"{name} must be an optax.GradientTransformation, got {value!r}"
      )
    return tx


class Fallback:
  """What serves the leaves that a method leaves over."""

  def check(self, name: str, value: Any) -> Any:
    """A rate, a transformation, or a dictionary of them by label.

    Raises:
      ValueError: naming the argument.
    """
    if not isinstance(value, Mapping):
      return self._one(name, value)
    allowed = tuple(x for x in labels.LABELS if x != "matrix")
    for label in value:
      if label not in allowed:
        raise ValueError(f"{name}: got the label {label!r}; allowed: {allowed}")
    return {
      label: None if x is None else self._one(f"{name}[{label!r}]", x)
      for label, x in value.items()
    }

  def _one(self, name: str, value: Any) -> Any:
    tx = _transformation(value)
    if tx is not None:
      return tx
    try:
      return AT_LEAST_0_OR_SCHEDULE.check(name, value)
    except ValueError as e:
      raise ValueError(
        f"{e}; or an optax.GradientTransformation, or a dictionary of such by "
        "label"
      ) from None


def rank_holds(rank: Any) -> bool:
  """Whether it is a number of directions or a share of a side.

  A whole float above 1 is a number of directions too; 1.0 is a share.
  """
  if isinstance(rank, numbers.Integral):
    return rank >= 1
  return 0 < rank <= 1 or (rank > 1 and float(rank).is_integer())


def _at_least(low: float, **kwargs: Any) -> Number:
  return Number(allowed=f"at least {low:g}", holds=lambda x: x >= low, **kwargs)


def _count(low: int, **kwargs: Any) -> Number:
  return Number(
    allowed=f"a whole number of at least {low}, in 32 bits",
    holds=lambda x: low <= x < 2**31,
    whole=True,
    **kwargs,
  )


_POSITIVE = functools.partial(Number, allowed="positive", holds=lambda x: x > 0)
_SHARE = Number(allowed="in (0, 1]", holds=lambda x: 0 < x <= 1, static=True)
DECAY_RATE = Number(
  allowed="in [0, 1)",
  holds=lambda x: 0 <= x < 1,
  schedule=True,
  precise=True,
)
AT_LEAST_0 = _at_least(0)
AT_LEAST_0_OR_SCHEDULE = _at_least(0, schedule=True)

RULES: dict[str, Number | Flag | Fallback | Inner] = {
  # Rates.
  **dict.fromkeys(
    (
      "learning_rate",
      "vector_learning_rate",
      "weight_decay",
      "momentum_scale",
    ),
    AT_LEAST_0_OR_SCHEDULE,
  ),
  **dict.fromkeys(
    (
      "momentum",
      "decay",
      "b1",
      "b2",
      "vector_b1",
      "vector_b2",
      "clip_decay",
      "norm_b1",
      "norm_b2",
    ),
    DECAY_RATE,
  ),
  # Sizes.
  **dict.fromkeys(
    ("eps", "vector_eps", "alpha", "scale", "rest_scale"), AT_LEAST_0
  ),
  "threshold": _at_least(0, infinite=True),
  "growth_limit": _at_least(1, infinite=True),
  "clip": _POSITIVE(infinite=True),
  "epsilon": _POSITIVE(),
  # What fixes shapes.
  "rank": Number(
    allowed=(
      "a whole number of at least 1, or a share in (0, 1] of each matrix's "
      "smaller side"
    ),
    holds=rank_holds,
    static=True,
  ),
  **dict.fromkeys(("density", "fraction"), _SHARE),
  "num_samples": _count(1, static=True),
  # Each is compiled.
  "ns_steps": Number(
    allowed="a whole number from 1 to 1000",
    holds=lambda x: 1 <= x <= 1000,
    whole=True,
    static=True,
  ),
  # Counts.
  **dict.fromkeys(("update_interval", "iterations"), _count(1)),
  **dict.fromkeys(("reset_every", "warmup", "grace"), _count(0)),
  "seed": Number(allowed="a whole number", holds=lambda x: True, whole=True),
  # Switches.
  **dict.fromkeys(
    (
      "nesterov",
      "cautious",
      "center",
      "relative",
      "released",
      "restart_bias_correction",
      "train_unquantized",
    ),
    Flag(),
  ),
  "fallback": Fallback(),
  "inner": Inner(),
}


def checked(method: str | None = None) -> Callable[[_Factory], _Factory]:
  """Decorates a factory: its arguments are checked by their names.

  None passes where it is the default or in the annotation. The factory gets
  Python's numbers in place of NumPy's.

  Args:
    method: the optimizer's name in the error that `init` of what the factory
      gives then raises for parameters that are not real floating arrays; None
      where the factory sees to that.
  """

  def decorate(factory):
    signature = inspect.signature(factory)
    parameters = signature.parameters
    rules = {name: RULES[name] for name in parameters if name in RULES}
    optional = {
      name
      for name, x in parameters.items()
      if x.default is None or "None" in str(x.annotation)
    }
    for name in rules:
      none = parameters[name].default is None
      if none and isinstance(rules[name], Number):
        allowed = f"None or {rules[name].allowed}"
        rules[name] = dataclasses.replace(rules[name], allowed=allowed)

    @functools.wraps(factory)
    def build(*args, **kwargs):
      bound = signature.bind(*args, **kwargs)
      for name, value in bound.arguments.items():
        if name in rules and not (value is None and name in optional):
          bound.arguments[name] = rules[name].check(name, value)
      tx = factory(*bound.args, **bound.kwargs)
      return tx if method is None else of_floats(tx, method)

    return build

  return decorate


def of_floats(tx: Any, method: str) -> Any:
  """`tx`, which refuses to begin with parameters that are not floating.

  Args:
    tx: any transformation.
    method: its name in the error.
  """

  def init(params):
    check_floating(params, method)
    return tx.init(params)

  return tx._replace(init=init)


def value_at(value: optax.ScalarOrSchedule, count: jax.Array) -> Any:
  """The value of a number, or of a schedule after `count` steps."""
  return value(count) if callable(value) else value


def check_arrays(params: Any, method: str) -> None:
  """Refuses parameters that are not arrays, such as Python's floats.

  Args:
    params: pytree of arrays, abstract values, `QTensor`s, masked nodes.
    method: the optimizer's name, for the message.

  Raises:
    ValueError: naming the leaf.
  """
  for name, leaf in _named_leaves(params):
    if not hasattr(leaf, "dtype"):
      raise ValueError(
        f"{method} needs arrays as parameters; the leaf {name!r} is "
        f"{leaf!r} of the type {type(leaf).__name__}: pass it through "
        "jnp.asarray"
      )


def check_floating(params: Any, method: str) -> None:
  """Refuses parameters that are not plain real floating arrays.

  Args:
    params: as for `check_arrays`.
    method: the same.

  Raises:
    ValueError: naming the leaf.
  """
  check_arrays(params, method)
  for name, leaf in _named_leaves(params):
    if labels.is_param(leaf):
      kind = f"a quantized tensor ({leaf.format})"
    elif not jnp.issubdtype(leaf.dtype, jnp.floating):
      kind = f"of the dtype {leaf.dtype}"
    else:
      continue
    raise ValueError(
      f"{method} needs real floating parameters; the leaf {name!r} is {kind}"
    )


def _named_leaves(params: Any) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=labels.is_param
  )
  return [(paths.leaf_name(path), leaf) for path, leaf in flat]
