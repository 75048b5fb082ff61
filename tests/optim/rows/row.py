"""What the table of optimizers says of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax


def _same(params):
  return params


@dataclasses.dataclass(frozen=True)
class Row:
  """One optimizer in the table.

  Attributes:
    factory: `(learning_rate) -> transformation`.
    rate: a peak learning rate that suits the convergence targets.
    rounding: the relative rounding error of the narrowest number format an
      update goes through; two orders of summation may differ by a few.
    prepare: turns float parameters into what the optimizer holds; if it does
      anything and the factory takes `matrix_axes`, it does too.
    view: the float parameters to differentiate at, from what it holds.
    apply: `optax.apply_updates` or its replacement.
    dtypes: the parameter dtypes it takes.
    remaining: the share of the loss that 300 steps may leave.
    needs_value: whether its update takes `value_fn` and no gradients.
    everywhere: whether it can bring parameters to any values. If not, its own
      tests show that it converges.
    sparse: whether it leaves out the gradients of many entries of a matrix,
      whatever they are.
    static_args: arguments that `optax.inject_hyperparams` must leave alone.
  """

  factory: Callable[..., optax.GradientTransformation]
  rate: float = 0.1
  rounding: float = 2.0**-23
  prepare: Callable[[Any], Any] = _same
  view: Callable[[Any], Any] = _same
  apply: Callable[[Any, Any], Any] = optax.apply_updates
  dtypes: tuple[Any, ...] = (jnp.float32, jnp.bfloat16)
  remaining: float = 1e-2
  needs_value: bool = False
  everywhere: bool = True
  sparse: bool = False
  static_args: tuple[str, ...] = ()

  @property
  def quantized(self) -> bool:
    """Whether parameters are held in another form than they are used in."""
    return self.prepare is not _same
