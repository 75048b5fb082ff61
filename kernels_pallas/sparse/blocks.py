"""Lists of key blocks: the type, its checks, and other forms of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments


class BlockIndices(NamedTuple):
  """Which key blocks each query block attends to exactly.

  Attributes:
    indices: int32 `[B, H, NQ, M]`, distinct up to the count; what follows
      repeats the last one.
    counts: int32 `[B, H, NQ]`, from 1 to M.
    density: float32 scalar, the listed share of the blocks that queries can
      see, or None where nobody computed it.
  """

  indices: jax.Array
  counts: jax.Array
  density: jax.Array | None = None


def check(blocks: Any, wanted: tuple[int, int, int], num_kv: int) -> Any:
  """The lists as int32 arrays.

  Values are checked where they are known, that is outside `jax.jit`.

  Args:
    blocks: a `BlockIndices` or a pair (indices, counts).
    wanted: (B, H, NQ).
    num_kv: NK.

  Returns:
    indices `[B, H, NQ, M]` and counts `[B, H, NQ]`.

  Raises:
    TypeError: for other types and for arrays that are not integers.
    ValueError: for shapes that do not fit, counts outside [1, M], and lists
      with duplicates or blocks that do not exist.
  """
  if not isinstance(blocks, tuple) or len(blocks) not in (2, 3):
    raise TypeError(
      "blocks must be a BlockIndices or a pair (indices, counts), got "
      f"{type(blocks).__name__}"
    )
  indices, counts = (
    arguments.integers(f"blocks.{name}", x)
    for name, x in zip(("indices", "counts"), blocks, strict=False)
  )
  if jnp.ndim(indices) != 4 or jnp.shape(indices)[:3] != wanted:
    raise ValueError(
      f"blocks.indices must have the shape [B, H, NQ, M] with [B, H, NQ] = "
      f"{list(wanted)}, got {list(jnp.shape(indices))}"
    )
  arguments.check_shape("blocks.counts", counts, wanted, "B, H, NQ")
  if not 1 <= jnp.shape(indices)[3] <= num_kv:
    raise ValueError(
      f"blocks.indices must have lists of 1 to NK = {num_kv} blocks, got "
      f"M = {jnp.shape(indices)[3]}"
    )
  if arguments.known(indices) and arguments.known(counts):
    _check_values(np.asarray(indices), np.asarray(counts), num_kv)
  most = np.iinfo(np.int32).max
  return tuple(
    jnp.asarray(arguments.saturated(x, most)) for x in (indices, counts)
  )


def _check_values(indices: np.ndarray, counts: np.ndarray, num_kv: int) -> None:
  longest = indices.shape[3]
  if counts.min() < 1 or counts.max() > longest:
    bad = counts[(counts < 1) | (counts > longest)][0]
    raise ValueError(
      f"blocks.counts must be from 1 to M = {longest}, got {bad}"
    )
  meant = np.arange(longest) < counts[..., None]
  listed = np.where(meant, indices, 0)
  if listed.min() < 0 or listed.max() >= num_kv:
    bad = listed[(listed < 0) | (listed >= num_kv)][0]
    raise ValueError(
      f"blocks.indices must be from 0 to NK - 1 = {num_kv - 1}, got {bad}"
    )
  # What is not meant sorts behind every block, as numbers that all differ.
  padding = num_kv + np.arange(longest)
  ordered = np.sort(np.where(meant, indices, padding), axis=-1)
  same = ordered[..., 1:] == ordered[..., :-1]
  if same.any():
    raise ValueError(
      "blocks.indices must not repeat a block within a list's count, got "
      f"{ordered[..., 1:][same][0]} twice"
    )


def membership(indices: jax.Array, counts: jax.Array, num_kv: int) -> jax.Array:
  """Whether query block i lists key block j: bool `[B, H, NQ, NK]`."""
  meant = jnp.arange(indices.shape[3]) < counts[..., None]
  # Out of bounds, and so dropped.
  target = jnp.where(meant, indices, num_kv)
  empty = jnp.zeros((*counts.shape, num_kv), bool)
  return write(empty, target, True)


def write(
  x: jax.Array, slots: jax.Array, values: jax.Array | bool
) -> jax.Array:
  """x `[..., N]` with `values` at `slots`, those beyond N dropped.

  Each row by itself, which the partitioner needs to see to leave sharded
  batches where they are.
  """
  write = lambda x, slot, value: x.at[slot].set(value, mode="drop")
  values = jnp.broadcast_to(values, slots.shape)
  for _ in range(x.ndim - 1):
    write = jax.vmap(write)
  return write(x, slots, values)


def pack(member: jax.Array, longest: int) -> tuple[jax.Array, jax.Array]:
  """The lists of a membership.

  Args:
    member: bool `[..., N]`, in each row from 1 to `longest` true.
    longest: M.

  Returns:
    int32 `[..., M]`, ascending, rows padded by repeating their last index,
    and the counts, int32 `[...]`.
  """
  rank = jnp.cumsum(member, axis=-1, dtype=jnp.int32)
  counts = rank[..., -1]
  slot = jnp.where(member, rank - 1, longest)
  number = jnp.broadcast_to(
    jnp.arange(member.shape[-1], dtype=jnp.int32), member.shape
  )
  lists = jnp.zeros((*counts.shape, longest), jnp.int32)
  lists = write(lists, slot, number)
  last = jnp.max(jnp.where(member, number, 0), axis=-1, keepdims=True)
  meant = jnp.arange(longest) < counts[..., None]
  return jnp.where(meant, lists, last), counts


def transposed(
  indices: jax.Array, counts: jax.Array, num_kv: int
) -> tuple[jax.Array, jax.Array]:
  """For each key block the query blocks that list it.

  Args:
    indices: int32 `[B, H, NQ, M]`.
    counts: int32 `[B, H, NQ]`.
    num_kv: NK.

  Returns:
    int32 `[B, H, NK, NQ]`, ascending, rows padded by repeating their last
    (0 in a row of none), and the counts, int32 `[B, H, NK]`, 0 where nobody
    lists a block.
  """
  member = membership(indices, counts, num_kv)
  return pack(jnp.swapaxes(member, -1, -2), indices.shape[2])
