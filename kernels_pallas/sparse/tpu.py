"""Block-sparse attention as three TPU kernels, which walk lists of blocks.

A grid step takes one block of queries of one head. Its list lies in scalar
memory, keys and values stay in HBM, and the kernel copies the listed blocks
to VMEM, some at a time and one step ahead, so that short lists cost no empty
steps, products are of `block_q` by some hundred keys, and nothing limits T but
HBM. The pooled tail goes first, through the same online softmax, while the
first keys arrive ("mean_local" is computed apart, and merged).

Two kernels go backward, both computing the probabilities again: one like the
forward kernel for the queries' cotangents, one for those of keys and values,
which walks for each block of keys the query blocks that list it. What the
query heads of a key head add is summed in VMEM, in a fixed order.

Products are of the inputs' dtype: pooled keys are rounded to it once, as keys
and values are. All else is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import padding, tpu_core
from kernels_pallas.sparse import (
  blocks,
  core,
  pooled,
  problem,
  statistics,
  tpu_call,
  tpu_kernels,
  tpu_plan,
)

_split = statistics.split


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, jax.Array]:
  """As `core.run`.

  Args:
    inputs: the problem. float64 is for the interpreter only.
    options: the static choices.

  Returns:
    The output `[B, T, H, V]` and the log-partition `[B, T, H]`.

  Raises:
    NotImplementedError: without `interpret` for float64 and for block sizes
      that are not whole tiles, and for what does not fit VMEM.
  """
  return core.run(_forward, _backward, inputs, options, kernels="pallas_tpu")


_own = lambda x: (x.batch, x.head, x.block)


def _forward(exact, tail, options):
  apart = tail is not None and tail.local is not None
  inside = None if apart else tail
  plan = tpu_plan.make(exact, inside, options)
  grid = tpu_call.query_grid(plan)

  def result(*shape):
    shape = plan.batch, plan.heads, plan.num_q, *shape
    return grid.operand(jax.ShapeDtypeStruct(shape, plan.wide), _own)

  out, lse = tpu_call.run(
    tpu_kernels.forward,
    "forward",
    grid,
    inputs=(
      grid.lists(exact.indices, exact.counts, plan.kv_blocks),
      grid.where(exact, *_segments(exact, plan)),
      grid.operand(_split(_keys(exact.q, plan), plan.block_q), _own),
      _pooled(inside, grid),
    ),
    outputs=(result(plan.block_q, plan.value_size), result(1, plan.block_q)),
    sources=(_gathered(exact.k, exact.v, plan.block_kv, plan), plan.kv_blocks),
    totals=[(plan.block_q, n) for n in (1, 1, plan.value_size)],
  )
  lse = lse.reshape(exact.q.shape[:3])
  part = _of_values(out, exact.v, plan), lse
  if apart:
    return core.merge([part, pooled.forward(exact, tail, options)])
  return part


def _backward(exact, options, lse, g, delta):
  plan = tpu_plan.make(exact, None, options)
  rows = jnp.stack([lse, delta], axis=2)
  rows = rows.reshape(*rows.shape[:3], plan.num_q, plan.block_q)
  # Whole tiles of lanes, so that they can be copied.
  rows = jnp.swapaxes(padding.to_multiple(rows, 4, tpu_core.LANES), 2, 3)
  dq = _queries_backward(exact, g, rows, plan)
  dk, dv = _keys_backward(exact, g, rows, plan)
  return (
    _of_keys(dq, exact.q),
    _of_keys(dk, exact.k),
    _of_values(dv, exact.v, plan),
  )


def _queries_backward(exact, g, rows, plan):
  grid = tpu_call.query_grid(plan)
  q = _split(_keys(exact.q, plan), plan.block_q)
  (dq,) = tpu_call.run(
    tpu_kernels.queries_backward,
    "dq",
    grid,
    inputs=(
      grid.lists(exact.indices, exact.counts, plan.kv_blocks),
      grid.where(exact, *_segments(exact, plan)),
      grid.operand(q, _own),
      grid.operand(_split(_values(g, plan), plan.block_q), _own),
      grid.operand(rows, _own),
    ),
    outputs=(grid.operand(jax.ShapeDtypeStruct(q.shape, plan.wide), _own),),
    sources=(_gathered(exact.k, exact.v, plan.block_kv, plan), plan.kv_blocks),
    totals=[(plan.block_q, plan.key_size)],
  )
  return dq


def _keys_backward(exact, g, rows, plan):
  grid = tpu_call.key_grid(plan)
  own = lambda x: (x.batch, x.group, x.block)
  k = _split(_keys(exact.k, plan), plan.block_kv)
  v = _split(_values(exact.v, plan), plan.block_kv)
  indices, counts = blocks.transposed(exact.indices, exact.counts, plan.num_kv)
  q_ids, kv_ids = _segments(exact, plan)
  return tpu_call.run(
    tpu_kernels.keys_backward,
    "dkv",
    grid,
    inputs=(
      grid.lists(indices, counts, plan.q_blocks),
      grid.where(exact, kv_ids, q_ids),
      grid.operand(k, own),
      grid.operand(v, own),
    ),
    outputs=tuple(
      grid.operand(jax.ShapeDtypeStruct(x.shape, plan.wide), own)
      for x in (k, v)
    ),
    sources=(
      (*_gathered(exact.q, g, plan.block_q, plan), rows),
      plan.q_blocks,
    ),
    totals=[x.shape[3:] for x in (k, v)],
  )


def _pooled(tail, grid: tpu_call.Grid) -> tpu_kernels.Pooled | None:
  """The operands of a tail."""
  if tail is None:
    return None
  plan = grid.plan
  size = plan.pooled_size

  def chunks(x, axis, at, value=0):
    if x is None:
      return None
    x = padding.to_multiple(x, axis, size, constant_values=value)
    shape = *x.shape[:axis], -1, size, *x.shape[axis + 1 :]
    return grid.operand(x.reshape(shape), at)

  group = lambda x: (x.batch, x.group)
  variance = slope = None
  if tail.variance is not None:
    variance = _keys(tail.variance, plan)
  if tail.slope is not None:
    slope = padding.to_multiple(_values(tail.slope, plan), 3, plan.key_size)
  many = plan.slopes > 1
  return tpu_kernels.Pooled(
    k=chunks(_keys(tail.k, plan), 2, group),
    v=chunks(_values(tail.v, plan), 2, group),
    bias=chunks(tail.bias, 3, _own, problem.MASKED),
    segments=chunks(tail.segments, 1, lambda x: (x.batch,)),
    variance=chunks(variance, 2, group),
    slope=grid.operand(slope, lambda x: (*group(x), x.block if many else 0)),
  )


def _segments(exact, plan):
  """Of queries and of keys, in rows of a block."""
  if not plan.segments:
    return None, None
  b = plan.batch
  return (
    exact.q_segments.reshape(b, plan.num_q, plan.block_q),
    exact.kv_segments.reshape(b, plan.num_kv, plan.block_kv),
  )


def _keys(x, plan):
  """Lanes of keys, in the dtype of the products."""
  return padding.to_multiple(x.astype(plan.narrow), x.ndim - 1, plan.key_size)


def _values(x, plan):
  """Lanes of values, which follow those of keys where the two are joint."""
  widths = [(0, 0)] * (x.ndim - 1) + [(plan.value_lane, 0)]
  x = jnp.pad(x.astype(plan.narrow), widths)
  return padding.to_multiple(x, x.ndim - 1, plan.value_size)


def _gathered(keys, values, block, plan):
  """What kernels gather, `[B, heads, blocks, block, lanes]`."""
  keys, values = _keys(keys, plan), _values(values, plan)
  # Where both fill one tile, neither has a lane that the other uses.
  parts = (keys + values,) if plan.joint else (keys, values)
  return tuple(_split(x, block) for x in parts)


def _of_keys(x, like):
  """The lanes of keys in an array of blocks, in the shape of `like`."""
  return x[..., : like.shape[3]].reshape(like.shape)


def _of_values(x, like, plan):
  """Likewise of values, with the rows of `x`."""
  x = x[..., plan.value_lane :][..., : like.shape[3]]
  return x.reshape(*x.shape[:2], -1, x.shape[4])
