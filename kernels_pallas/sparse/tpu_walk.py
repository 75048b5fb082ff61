"""How a TPU kernel walks a list: blocks come from HBM one step ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# The position of what does not exist.
NOWHERE = 2**30


class Lists(NamedTuple):
  """A row of the lists and the one after it, in scalar memory.

  Attributes:
    own: int32 `[1, 1 + M]`, the count and the blocks, padded to whole steps.
    following: the same of the grid's next step.
  """

  own: Any
  following: Any


class Scratch(NamedTuple):
  """What outlives a grid step.

  Attributes:
    buffers: for each gathered array two buffers `[2, P, rows, lanes]`.
    arrived: two DMA semaphores, one for each half of the buffers.
    half: int32 `[1]` in scalar memory, where a row's first blocks are.
    totals: float arrays of running results.
  """

  buffers: tuple[Any, ...]
  arrived: Any
  half: Any
  totals: tuple[Any, ...]


class Walk:
  """Brings the listed blocks of a row to VMEM, P at a time, one step ahead.

  While a step computes, the blocks of the next are on their way; those of the
  grid's next step where it is the row's last.
  """

  def __init__(self, lists, sources, scratch, head, following):
    """Args:
    lists: a `Lists`.
    sources: arrays `[B, heads, blocks, rows, lanes]` in HBM.
    scratch: a `Scratch`.
    head: (b, h), whose blocks the row lists.
    following: the same of the grid's next step; its row lists blocks of it.
    """
    self.lists = lists
    self.sources = sources
    self.scratch = scratch
    self.head = head
    self.following = following
    self.parts = scratch.buffers[0].shape[1]
    self.count = lists.own[0, 0]

  def _each(self, row, step, half, head, act):
    """`act` on every copy of a step."""

    def part(p, _):
      index = row[0, 1 + step * self.parts + p]
      for source, buffer in zip(
        self.sources, self.scratch.buffers, strict=True
      ):
        act(
          pltpu.make_async_copy(
            source.at[*head, index],
            buffer.at[half, p],
            self.scratch.arrived.at[half],
          )
        )
      return 0

    left = row[0, 0] - step * self.parts
    jax.lax.fori_loop(0, jnp.clip(left, 0, self.parts), part, 0)

  def _start(self, row, step, half, head):
    self._each(row, step, half, head, lambda copy: copy.start())

  def begin(self, first: jax.Array) -> None:
    """To be called before `each`; `first` of a sequence of grid steps."""

    @pl.when(first)
    def _():
      # What a short list leaves unwritten is multiplied by zeros.
      for buffer in self.scratch.buffers:
        buffer[...] = jnp.zeros_like(buffer)
      self.scratch.half[0] = 0
      self._start(self.lists.own, 0, 0, self.head)

  def each(
    self, last: jax.Array, body: Callable[[jax.Array, jax.Array], None]
  ) -> None:
    """Calls `body` with each step's number and its half of the buffers.

    Args:
      last: whether no grid step of the sequence follows.
      body: of a step. A row of no blocks has one step too.
    """
    parts = self.count.dtype.type(self.parts)
    steps = jnp.maximum(pl.cdiv(self.count, parts), 1)

    def one(step, half):
      more = step + 1 < steps
      pl.when(more)(
        lambda: self._start(self.lists.own, step + 1, 1 - half, self.head)
      )
      pl.when(~more & ~last)(
        lambda: self._start(self.lists.following, 0, 1 - half, self.following)
      )
      wait = lambda copy: copy.wait()
      self._each(self.lists.own, step, half, self.head, wait)
      body(step, half)
      return 1 - half

    half = jax.lax.fori_loop(0, steps, one, self.scratch.half[0])
    self.scratch.half[0] = half

  def read(self, array: int, half: jax.Array) -> jax.Array:
    """The gathered rows `[P * rows, lanes]` of an array."""
    x = self.scratch.buffers[array][half]
    return x.reshape(-1, x.shape[-1])

  def positions(self, step, size, lengths=None) -> jax.Array:
    """Of the gathered tokens: int32 `[1, P * size]`, or `NOWHERE`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.parts * size), 1)
    out = jnp.full_like(lane, NOWHERE)
    for p in range(self.parts):
      slot = step * self.parts + p
      index = self.lists.own[0, 1 + slot]
      length = size if lengths is None else lengths[0, index]
      end = p * size + jnp.where(slot < self.count, length, 0)
      here = (lane >= p * size) & (lane < end)
      out = jnp.where(here, lane + (index - p) * size, out)
    return out

  def ids(self, step, ref) -> jax.Array | None:
    """Segments of the gathered tokens `[1, P * size]`."""
    if ref is None:
      return None
    rows = [
      ref[pl.ds(self.lists.own[0, 1 + step * self.parts + p], 1), :]
      for p in range(self.parts)
    ]
    return jnp.concatenate(rows, axis=1)
