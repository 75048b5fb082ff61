"""Rings: a window of the last tokens, and the first ones for good."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import attention, block, layers
from models.cache_policies import base


def positions(slots: int, sinks: int, length: jax.Array) -> jax.Array:
  """Which token each slot holds once `length` tokens have come: int32 `[S]`.

  The first `sinks` slots hold the first tokens, the others the last ones, the
  token at position p in slot `sinks + (p - sinks) % ring`. -1 is an empty one.
  """
  slot = jnp.arange(slots)
  last = length - 1
  recent = last - (last - slot) % (slots - sinks)
  return jnp.where(
    slot < sinks,
    jnp.where(slot < length, slot, -1),
    jnp.where(recent >= sinks, recent, -1),
  )


def store(
  state: base.KeysValues, heads: block.Heads, start: jax.Array, sinks: int
) -> base.KeysValues:
  """Slots after the tokens of `heads`, which came after `start` others."""
  slots, length = state.keys.shape[1], heads.k.shape[1]
  if length == 1:
    around = sinks + (start - sinks) % (slots - sinks)
    return state.write(heads, jnp.where(start < sinks, start, around))
  # Several tokens may belong in one slot: each slot takes its last.
  source = positions(slots, sinks, start + length) - start
  fresh = (source >= 0)[:, None, None]
  take = lambda old, new: jnp.where(
    fresh, jnp.take(new, jnp.clip(source, 0), axis=1), old
  )
  return base.KeysValues(take(state.keys, heads.k), take(state.values, heads.v))


@dataclasses.dataclass(frozen=True)
class Window:
  """The last tokens and the first: what the mixer "window" attends to.

  The bytes do not depend on the length of the text once it is longer.

  Attributes:
    window: of each query head, tokens that a query sees, itself included.
    sink: first tokens that it sees besides.
  """

  window: tuple[int, ...]
  sink: int = 0

  def __post_init__(self):
    for value in self.window:
      base.positive("window", value)
    if self.sink < 0:
      raise ValueError(f"sink: got {self.sink}; allowed: at least 0")

  def init(
    self, cfg: base.Config, batch: int, max_length: int
  ) -> base.KeysValues:
    sinks = min(self.sink, max_length)
    ring = max(1, min(max(self.window), max_length - sinks))
    return base.KeysValues.empty(cfg, batch, sinks + ring)

  def capacity(self, state: base.KeysValues) -> int | None:
    """Any, unless the whole text was to be shorter than the window."""
    slots = state.keys.shape[-3]
    return None if slots == self.sink + max(self.window) else slots

  def attend(
    self, state: base.KeysValues, new: base.New, p: Any, cfg: base.Config
  ) -> tuple[jax.Array, base.KeysValues]:
    del p
    heads = block.rotate(new.heads, new.rotation)
    slots, length = state.keys.shape[1], heads.k.shape[1]
    sinks = min(self.sink, slots - 1)
    old, state = state, store(state, heads, new.start, sinks)
    if length == 1:
      seen, column = state, positions(slots, sinks, new.start + 1)
    else:
      # A slot's last token hides the one that earlier queries see there.
      seen = old.followed_by(heads)
      before = positions(slots, sinks, new.start)
      column = jnp.concatenate([before, new.positions])
    far = new.positions[:, None] - column
    window = jnp.array(self.window)[:, None, None]
    inside = (far < window) | (column < self.sink)
    mask = ((column >= 0) & (far >= 0) & inside)[None]
    scores = self._scores(heads.q, seen.keys, column, new, cfg)
    y = attention.weigh(scores, seen.values, mask)
    return y.astype(heads.q.dtype), state

  def _scores(self, q, keys, column, new, cfg):
    del column, new, cfg
    return attention.scores(q, keys)


@dataclasses.dataclass(frozen=True)
class Streaming(Window):
  """Evicts what is neither among the first tokens nor the last.

  Positions are those within the cache, so that no distance is longer than it:
  a sink comes right before the window, however much lay between them.

  Attributes:
    window: as of `Window`, one for all heads.
    sink: as of `Window`.
  """

  window: tuple[int] = (1020,)
  sink: int = 4

  def __post_init__(self):
    if len(self.window) != 1:
      raise ValueError(f"window: got {self.window}; allowed: one number")
    super().__post_init__()

  def _scores(self, q, keys, column, new, cfg):
    """Products with the query where it stands in the cache.

    Rotary products depend on distances alone. Within the window those in the
    cache are those in the text; a sink stands where it stood, so that only the
    query that meets it moves.
    """
    most = self.sink + self.window[0] - 1
    there = jnp.minimum(new.positions, most)
    table = layers.rope_table(there, cfg.key_size, cfg.rope_theta)
    moved = attention.scores(layers.rope(new.heads.q, *table), keys)
    return jnp.where(column < self.sink, moved, attention.scores(q, keys))
