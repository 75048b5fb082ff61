"""How the GPU kernels of sparse attention cut a problem into programs.

A program multiplies tiles of queries and keys, whose sizes divide the blocks'.
What limits them is registers, 255 per thread for sums, weights and addresses,
and 227 KiB of shared memory for what is multiplied and what comes next. The
sizes here were chosen so that, compiled for Hopper, no register spills to
memory and, in bfloat16 with blocks of 64 and more, every product is a wgmma
and, with heads up to 128, two programs of 64 queries or keys fit on a
multiprocessor: one computes while the other waits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.sparse import problem

# Triton multiplies no matrices with a side below this.
_MIN_SIDE = 16
# Heads, at most; of float32 three parts have to be held.
_MAX_SIZE = 256
_MAX_SINGLE = 128


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a program multiplies at a time.

  Attributes:
    rows: queries.
    keys: keys.
    warps: of 32 threads, that share the tile.
  """

  rows: int
  keys: int
  warps: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static part of a call.

  Attributes:
    options: of the problem.
    key_size: K, padded.
    value_size: V, padded.
    num_q: NQ.
    repeat: R = H / G.
    ragged: whether a block may be shorter than the others.
    wide: dtype of statistics and sums.
    operand: dtype of the operands of products.
    parts: how many of them one number is.
    forward: tile of the forward kernel.
    pooled: its pooled keys at a time.
    dq: tile of the kernel of the queries' gradients.
    dkv: tile of the kernel of the keys' and values' gradients.
  """

  options: problem.Options
  key_size: int
  value_size: int
  num_q: int
  repeat: int
  ragged: bool
  wide: jax.typing.DTypeLike
  operand: jax.typing.DTypeLike
  parts: int
  forward: Tile
  pooled: int
  dq: Tile
  dkv: Tile


def make(inputs: problem.Inputs, options: problem.Options) -> Plan:
  """The plan of a problem.

  Args:
    inputs: the arrays; only shapes and dtypes are used.
    options: the static choices.

  Returns:
    The `Plan`.

  Raises:
    NotImplementedError: for blocks that are not of a multiple of 16 tokens,
      heads above 256 (in float32, above 128), and dtypes other than bfloat16
      and float32, or float64 where interpreted.
  """
  dtype = inputs.q.dtype
  for name in ("block_q", "block_kv"):
    size = getattr(options, name)
    if size % _MIN_SIDE:
      raise NotImplementedError(
        f"{name} must be a multiple of {_MIN_SIDE} for the GPU kernels (of "
        f"64 for wgmma), got {size}"
      )
  allowed = [jnp.bfloat16, jnp.float32]
  if options.interpret:
    allowed.append(jnp.float64)
  if dtype not in allowed:
    raise NotImplementedError(
      "q, k and v must be bfloat16 or float32 for the GPU kernels (float64 "
      f"only with interpret), got {dtype}"
    )
  single = dtype == jnp.float32
  largest = max(inputs.q.shape[-1], inputs.v.shape[-1])
  limit = _MAX_SINGLE if single else _MAX_SIZE
  if largest > limit:
    raise NotImplementedError(
      f"q, k and v must have heads of at most {limit} in {dtype} for the GPU "
      f"kernels, got {largest}"
    )
  sizes = [
    max(_MIN_SIDE, pl.next_power_of_2(x.shape[-1]))
    for x in (inputs.q, inputs.v)
  ]
  choose = _single if single else _half
  forward, dq, dkv = choose(options, max(sizes))
  length = inputs.k.shape[1]
  return Plan(
    options=options,
    key_size=sizes[0],
    value_size=sizes[1],
    num_q=problem.num_blocks(inputs.q.shape[1], options.block_q),
    repeat=inputs.q.shape[2] // inputs.k.shape[2],
    ragged=inputs.lengths is not None or length % options.block_kv != 0,
    wide=jnp.promote_types(dtype, jnp.float32),
    operand=jnp.bfloat16 if single else dtype,
    parts=3 if single else 1,
    forward=forward,
    pooled=_pooled(options.tail, max(sizes), single),
    dq=dq,
    dkv=dkv,
  )


def _pooled(tail: str, size: int, single: bool) -> int:
  """Pooled keys at a time."""
  keys = 64 if size <= 128 else 32
  if single:
    keys = 32 if size <= 64 else 16
  # Variances are a third operand.
  return max(keys // 2 if tail == "mean_var" else keys, _MIN_SIDE)


def _fit(block: int, most: int) -> int:
  """The largest power of two up to `most` that divides a block."""
  return min(block & -block, most)


def _half(options: problem.Options, size: int) -> tuple[Tile, Tile, Tile]:
  """Tiles of 16-bit operands, for heads up to `size`."""
  rows, keys = _fit(options.block_q, 128), _fit(options.block_kv, 128)
  if size > 128:
    # A sum of 64 rows fills the registers of four warps.
    queries = Tile(rows, min(keys, 32 if rows > 64 else 64), 8)
    return queries, queries, Tile(min(rows, 32), min(keys, 64), 8)
  queries = Tile(rows, min(keys, 64), 8 if rows > 64 else 4)
  return queries, queries, Tile(min(rows, 64), keys, 8 if keys > 64 else 4)


def _single(options: problem.Options, size: int) -> tuple[Tile, Tile, Tile]:
  """Tiles of float32 in parts, for heads up to `size`."""
  rows, keys = _fit(options.block_q, 64), _fit(options.block_kv, 64)
  if size <= 64:
    queries = Tile(rows, min(keys, 32), 8)
    return queries, queries, Tile(min(rows, 32), keys, 8)
  queries = forward = Tile(rows, min(keys, 16), 8)
  if options.tail == "mean_var":
    # Whose variances and squares are six more operands.
    forward = dataclasses.replace(queries, rows=_MIN_SIDE)
  return forward, queries, Tile(min(rows, 32), min(keys, 32), 8)
