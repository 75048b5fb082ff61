"""How a problem is cut into the grid steps of the TPU kernels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas import tpu_core
from kernels_pallas.sparse import problem

# Rows of a tile of bfloat16. Mosaic also compiles blocks that are not whole
# tiles, but would shift every row of what is gathered.
_ROWS = 16
# Columns of a step's scores: so many keys (or queries, in the kernel for keys)
# are gathered at a time where blocks are smaller.
COLUMNS = 512
# Arrays of a step's scores that a kernel keeps at once.
_IN_FLIGHT = 4
# Float32 is multiplied in pieces, which are kept too: as many arrays of the
# operands' shapes.
_PIECES = 5


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static part of a call.

  Attributes:
    batch: B.
    heads: H.
    groups: G.
    num_q: NQ.
    num_kv: NK.
    block_q: queries of a block.
    block_kv: keys of a block.
    longest: M.
    key_size: lanes of a query or a key.
    value_size: lanes of a value.
    value_lane: the first lane of a value.
    joint: whether a key and its value (a query and its cotangent) are lanes
      of one row where they are gathered: K + V lanes fill a tile that each
      alone would fill with padding.
    kv_blocks: key blocks gathered at a time.
    q_blocks: query blocks gathered at a time, in the kernel for keys.
    pooled_size: pooled keys met at a time.
    pooled_steps: how often, 0 without a tail in the kernel.
    tail: the tail that the forward kernel computes, "drop" for none.
    slopes: NQ, or 1 if queries share one, or 0.
    scale: of the scores.
    causal: whether a query sees no later key.
    segments: whether there are segments.
    bands: how many bands a head has, None for no bands.
    narrow: dtype of the products' operands.
    wide: dtype of the statistics.
    interpret: whether and how the kernels are interpreted.
  """

  batch: int
  heads: int
  groups: int
  num_q: int
  num_kv: int
  block_q: int
  block_kv: int
  longest: int
  key_size: int
  value_size: int
  value_lane: int
  joint: bool
  kv_blocks: int
  q_blocks: int
  pooled_size: int
  pooled_steps: int
  tail: str
  slopes: int
  scale: float
  causal: bool
  segments: bool
  bands: int | None
  narrow: np.dtype
  wide: np.dtype
  interpret: bool | Any

  @property
  def repeat(self) -> int:
    """Query heads of a key head."""
    return self.heads // self.groups

  @property
  def precision(self) -> str:
    """Of the products: bfloat16 operands are exact as they are."""
    return "default" if self.narrow == jnp.bfloat16 else "highest"


def up(n: int, multiple: int) -> int:
  """`n`, rounded up to a multiple."""
  return -(-n // multiple) * multiple


def make(
  exact: problem.Exact, tail: problem.Tail | None, options: problem.Options
) -> Plan:
  """The plan of a problem.

  Args:
    exact: the problem.
    tail: the pooled keys that the forward kernel meets, or None.
    options: the static choices.

  Returns:
    The plan.

  Raises:
    NotImplementedError: for float64 and for blocks that are not whole tiles,
      unless the kernels are interpreted, and for what does not fit VMEM.
  """
  dtype = exact.q.dtype
  # Mosaic does not know float16.
  narrow = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
  if not options.interpret:
    _check(options, dtype)
  b, h, num_q, longest = exact.indices.shape
  groups, num_kv = exact.lengths.shape[1:]
  key_size, value_size = exact.k.shape[3], exact.v.shape[3]
  joint = key_size + value_size <= tpu_core.LANES
  pooled_size = min(COLUMNS, up(num_kv, tpu_core.LANES))
  plan = Plan(
    batch=b,
    heads=h,
    groups=groups,
    num_q=num_q,
    num_kv=num_kv,
    block_q=options.block_q,
    block_kv=options.block_kv,
    longest=longest,
    key_size=up(key_size, tpu_core.LANES),
    value_size=up(value_size, tpu_core.LANES),
    value_lane=key_size if joint else 0,
    joint=joint,
    kv_blocks=_blocks(options.block_kv, longest),
    q_blocks=_blocks(options.block_q, num_q),
    pooled_size=pooled_size,
    pooled_steps=0 if tail is None else -(-num_kv // pooled_size),
    tail="drop" if tail is None else options.tail,
    slopes=0 if tail is None or tail.slope is None else tail.slope.shape[2],
    scale=options.scale,
    causal=options.causal,
    segments=exact.q_segments is not None,
    bands=None if exact.bands is None else exact.bands.shape[1],
    narrow=narrow,
    wide=jnp.promote_types(dtype, jnp.float32),
    interpret=options.interpret,
  )
  if vmem_bytes(plan) > tpu_core.VMEM_BUDGET:
    raise NotImplementedError(_too_large(plan))
  return plan


def _check(options: problem.Options, dtype: np.dtype) -> None:
  if dtype == jnp.float64:
    raise NotImplementedError(
      "arrays must be float32 or bfloat16 for the TPU kernels (float64 only "
      "with interpret), got float64"
    )
  for name in ("block_q", "block_kv"):
    size = getattr(options, name)
    if size % _ROWS:
      raise NotImplementedError(
        f"{name} must be a multiple of {_ROWS} for the TPU kernels, got {size}"
      )


def _too_large(plan: Plan) -> str:
  """What to say of a plan that does not fit, with blocks that would."""

  def fit(name, count, at_a_time):
    tokens = getattr(plan, name) * getattr(plan, count)
    for size in (1024, 512, 256, 128, 64, 32, 16):
      num = problem.num_blocks(tokens, size)
      other = {name: size, count: num, at_a_time: _blocks(size, num)}
      if vmem_bytes(dataclasses.replace(plan, **other)) <= tpu_core.VMEM_BUDGET:
        return f"{name} up to {size} fits"
    return f"no {name} fits"

  return (
    f"block_q = {plan.block_q} and block_kv = {plan.block_kv} need about "
    f"{vmem_bytes(plan) >> 20} MiB of VMEM, of which the TPU kernels take "
    f"{tpu_core.VMEM_BUDGET >> 20}; with the other as it is, "
    f"{fit('block_q', 'num_q', 'q_blocks')} and "
    f"{fit('block_kv', 'num_kv', 'kv_blocks')}"
  )


def _blocks(size: int, most: int) -> int:
  """Blocks gathered at a time: what they cover are whole tiles of lanes."""
  whole = tpu_core.LANES // math.gcd(size, tpu_core.LANES)
  return max(1, min(COLUMNS // size, up(most, whole)))


def vmem_bytes(plan: Plan) -> int:
  """Roughly what the largest of the three kernels keeps in VMEM.

  Blocks and buffers are exact. What a step has in flight is fitted, from
  above, to what the compiler used.
  """
  narrow, wide = plan.narrow.itemsize, plan.wide.itemsize
  sizes = plan.key_size + plan.value_size
  gathered = tpu_core.LANES if plan.joint else sizes
  lanes = lambda n: up(n, tpu_core.LANES)
  keys = plan.kv_blocks * plan.block_kv
  queries = plan.q_blocks * plan.block_q
  ids_kv = 2 * 4 * up(plan.num_kv, 8) * lanes(plan.block_kv) * plan.segments
  ids_q = 2 * 4 * up(plan.num_q, 8) * lanes(plan.block_q) * plan.segments
  # Columns of a number fill a tile each.
  columns = 6 * wide * plan.block_q * tpu_core.LANES

  pooled = plan.pooled_size * plan.pooled_steps
  tail = (
    2 * narrow * pooled * sizes + 2 * wide * up(pooled, 8 * tpu_core.LANES) * 2
  )
  if plan.tail == "mean_var":
    tail += 2 * narrow * pooled * plan.key_size
  if plan.slopes:
    tail += 2 * narrow * plan.key_size * plan.value_size
  rows = lambda *counts: (
    sum(counts) * sizes * (0 if narrow == 2 else _PIECES * narrow)
  )
  flight = _IN_FLIGHT * wide
  width = max(lanes(keys), plan.pooled_size * bool(pooled))
  forward = (
    2 * narrow * plan.block_q * plan.key_size
    + 2 * narrow * keys * gathered
    + 3 * wide * plan.block_q * plan.value_size
    + flight * plan.block_q * width
    + rows(plan.block_q, width)
    + ids_kv
    + columns
    + tail
  )
  dq = (
    2 * narrow * plan.block_q * sizes
    + 2 * narrow * keys * gathered
    + 3 * wide * plan.block_q * plan.key_size
    + flight * plan.block_q * lanes(keys)
    + rows(plan.block_q, keys)
    + ids_kv
    + columns
  )
  dkv = (
    2 * narrow * plan.block_kv * sizes
    + 2 * queries * (narrow * gathered + 8 * wide)
    + 3 * wide * plan.block_kv * sizes
    + flight * plan.block_kv * lanes(queries)
    + rows(plan.block_kv, queries)
    + ids_q
  )
  return max(forward, dq, dkv)


def cost(plan: Plan, kernel: str) -> pl.CostEstimate:
  """What a kernel computes and moves where every list is as long as M.

  XLA sees a kernel as one opaque call; its scheduler goes by these numbers.

  Args:
    plan: of the call.
    kernel: "forward", "dq" or "dkv".

  Returns:
    FLOPs of the products, as a TPU makes them: one in full float32 precision
    is six of bfloat16. Exponentials, and bytes between HBM and VMEM.
  """
  narrow, wide = plan.narrow.itemsize, plan.wide.itemsize
  passes = 1 if plan.precision == "default" else tpu_core.PASSES
  sizes = plan.key_size + plan.value_size
  gathered = tpu_core.LANES if plan.joint else sizes
  rows = plan.batch * plan.heads * plan.num_q * plan.block_q
  keys = plan.batch * plan.groups * plan.num_kv * plan.block_kv
  listed = plan.longest * plan.block_kv
  pairs, products = rows * listed, {"forward": 1, "dq": 2, "dkv": 2}[kernel]
  flops = 2 * pairs * sizes * products
  if kernel == "dq":
    flops -= 2 * pairs * plan.value_size
  exponentials = pairs
  if kernel == "dkv":
    # Each pair of blocks brings the queries' rows to the keys' instead.
    moved = pairs // plan.block_kv * (narrow * gathered + 2 * wide)
    moved += keys * (narrow + wide) * sizes
  else:
    moved = pairs // plan.block_q * narrow * gathered
    moved += rows * narrow * plan.key_size
    if kernel == "dq":
      moved += rows * (narrow * plan.value_size + wide * plan.key_size)
    else:
      moved += rows * wide * plan.value_size
  if kernel == "forward" and plan.pooled_steps:
    pooled = plan.pooled_steps * plan.pooled_size
    cumulant = plan.key_size if plan.tail == "mean_var" else 0
    flops += 2 * rows * pooled * (sizes + cumulant)
    exponentials += rows * pooled
    moved += plan.batch * plan.heads * pooled * narrow * (sizes + cumulant)
    moved += rows // plan.block_q * pooled * wide
    if plan.slopes:
      flops += 2 * rows * plan.key_size * plan.value_size
      slopes = plan.batch * plan.heads * plan.slopes
      moved += slopes * plan.key_size * plan.value_size * narrow
  return pl.CostEstimate(
    flops=passes * flops, transcendentals=exponentials, bytes_accessed=moved
  )
