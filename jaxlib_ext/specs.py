"""One tree of `ParamSpec` gives initial values, abstract values and counts.

A model describes its parameters once; initialisation, sharding
(`jaxlib_ext.sharding.shardings`), byte counts and the checkpoint target are
all read off that description.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """The description of one parameter.

  Attributes:
    shape: the array's shape.
    axes: one logical axis name (or None: never sharded) per dimension, such
      as `("layers", "embed", "mlp")`; `jaxlib_ext.sharding.Rules` maps them
      to mesh axes.
    init: `(key, shape, dtype) -> array`, as `jax.nn.initializers` makes them.
    dtype: of the stored parameter.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Initializer
  dtype: Any = jnp.float32

  def __post_init__(self):
    if len(self.axes) != len(self.shape):
      raise ValueError(
        f"axes must name each dimension of shape {self.shape}, got {self.axes}"
      )

  @property
  def size(self) -> int:
    return math.prod(self.shape)


def is_spec(x: Any) -> bool:
  """Whether `x` is a `ParamSpec`: the `is_leaf` of a spec tree."""
  return isinstance(x, ParamSpec)


def init(key: jax.Array, specs: Any) -> Any:
  """Draws every parameter; a leaf's values depend on `key` and its position.

  Jit-able; under jit with `out_shardings` no device holds a whole parameter.
  """
  leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
  keys = jax.random.split(key, max(len(leaves), 1))
  return treedef.unflatten(
    [s.init(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=False)]
  )


def abstract(specs: Any, shardings: Any = None) -> Any:
  """Pytree of `jax.ShapeDtypeStruct`, with shardings where given."""
  if shardings is None:
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec
    )
  return jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=sharding
    ),
    specs,
    shardings,
    is_leaf=is_spec,
  )


def count(specs: Any) -> int:
  """The number of parameters."""
  return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec))
