"""What every cache policy is given and gives, and the cache of everything.

Dimensions: B batch, T new tokens, S slots, D width, H query heads, G key/value
heads, K head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from models import attention, block
from models import config as config_lib

Config = config_lib.Config


class New(NamedTuple):
  """What one layer makes of the new tokens.

  Attributes:
    states: `[B, T, D]`, normed.
    heads: of them, not rotated.
    rotation: cosines and sines of their positions.
    start: int32 scalar, how many tokens came before.
  """

  states: jax.Array
  heads: block.Heads
  rotation: block.Rotation
  start: jax.Array

  @property
  def positions(self) -> jax.Array:
    """int32 `[T]`."""
    return self.start + jnp.arange(self.states.shape[1])


class Policy(Protocol):
  """How a layer remembers; hashable, for it is static under `jax.jit`."""

  def init(self, cfg: Config, batch: int, max_length: int) -> Any:
    """The state of one layer before the first token: a pytree of arrays."""

  def capacity(self, state: Any) -> int | None:
    """How many tokens a state of several layers has room for; None is any."""

  def attend(
    self, state: Any, new: New, p: Any, cfg: Config
  ) -> tuple[jax.Array, Any]:
    """The heads' outputs `[B, T, H, K]` and the state with T tokens more.

    Args:
      state: of the tokens before.
      new: the tokens.
      p: the layer's parameters.
      cfg: the model.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entry:
  """The state of a layer, or of several stacked, and whose it is."""

  state: Any
  policy: Policy = dataclasses.field(metadata={"static": True})


class KeysValues(NamedTuple):
  """Keys and values in slots.

  Attributes:
    keys: `[B, S, G, K]` in the compute dtype, rotated.
    values: `[B, S, G, K]`.
  """

  keys: jax.Array
  values: jax.Array

  @classmethod
  def empty(cls, cfg: Config, batch: int, slots: int) -> KeysValues:
    """All zeros."""
    shape = (batch, slots, cfg.kv_heads, cfg.key_size)
    dtype = jnp.dtype(cfg.compute_dtype)
    # Two buffers: one could not be donated as both.
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def write(self, heads: block.Heads, slot: jax.Array) -> KeysValues:
    """Those of `heads` in consecutive slots from `slot`."""
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 1)
    return KeysValues(put(self.keys, heads.k), put(self.values, heads.v))

  def followed_by(self, heads: block.Heads) -> KeysValues:
    """Those of `heads` behind them."""
    join = lambda x, new: jnp.concatenate([x, new], axis=1)
    return KeysValues(join(self.keys, heads.k), join(self.values, heads.v))


def positive(name: str, value: int) -> None:
  """ValueError unless `value` is an int of at least 1."""
  if type(value) is not int or value < 1:
    raise ValueError(f"{name}: got {value!r}; allowed: an int of at least 1")


@dataclasses.dataclass(frozen=True)
class Full:
  """Every key and value."""

  def init(self, cfg: Config, batch: int, max_length: int) -> KeysValues:
    return KeysValues.empty(cfg, batch, max_length)

  def capacity(self, state: KeysValues) -> int:
    return state.keys.shape[-3]

  def attend(
    self, state: KeysValues, new: New, p: Any, cfg: Config
  ) -> tuple[jax.Array, KeysValues]:
    del p, cfg
    heads = block.rotate(new.heads, new.rotation)
    state = state.write(heads, new.start)
    slots = jnp.arange(state.keys.shape[1])
    mask = (slots <= new.positions[:, None])[None]
    y = attention.attention(heads.q, state.keys, state.values, mask=mask)
    return y, state
