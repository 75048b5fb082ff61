"""What the GPU kernels read, and how it is laid out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import padding, pieces
from kernels_pallas.sparse import gpu_plan, problem

Plan = gpu_plan.Plan
# Arrays whose sum is meant, see `split`.
Parts = tuple[jax.Array, ...]


class Data(NamedTuple):
  """What every kernel reads, see `problem.Exact`; R = H / G, K and V padded.

  Masks that a problem does not need are None.

  Attributes:
    q: `[B, G, R * NQ * block_q, K]`.
    k: `[B, G, NK * block_kv, K]`.
    v: `[B, G, NK * block_kv, V]`.
    lengths: int32 `[B, G, NK]` or None.
    q_segments: int32 `[B, NQ * block_q]` or None.
    kv_segments: int32 `[B, NK * block_kv]` or None.
    bands: int32 `[H, N, 2]` or None.
    sink_tokens: int32 `[H]` or None.
  """

  q: Parts
  k: Parts
  v: Parts
  lengths: jax.Array | None
  q_segments: jax.Array | None
  kv_segments: jax.Array | None
  bands: jax.Array | None
  sink_tokens: jax.Array | None


class Lists(NamedTuple):
  """Of key blocks by block of queries, or of these by key block.

  Attributes:
    indices: int32 `[B, G, N, M]`.
    counts: int32 `[B, G, N]`.
  """

  indices: jax.Array
  counts: jax.Array


class Rows(NamedTuple):
  """What the backward kernels read of each query.

  Attributes:
    g: `[B, G, R * NQ * block_q, V]`, the output's cotangent.
    lse: `[B, G, R * NQ * block_q]`.
    delta: `[B, G, R * NQ * block_q]`.
  """

  g: Parts
  lse: jax.Array
  delta: jax.Array


class Pooled(NamedTuple):
  """A `problem.Tail` for the forward kernel, NK padded to whole tiles.

  Attributes:
    k: `[B, G, NK, K]`.
    v: `[B, G, NK, V]`.
    bias: `[B, G, R * NQ, NK]`.
    segments: int32 `[B, NK]` or None.
    variance: `[B, G, NK, K]` or None.
    squares: those of the queries, `[B, G, R * NQ * block_q, K]`; None
      without variance.
    slope: `[B, G, 1 or NQ, K, V]` or None.
  """

  k: Parts
  v: Parts
  bias: jax.Array
  segments: jax.Array | None
  variance: Parts | None
  squares: Parts | None
  slope: Parts | None


def split(x: jax.Array, plan: Plan) -> Parts:
  """`x` in parts, as `pieces.operands` has them."""
  return pieces.operands(x, plan.parts, plan.operand)


def data(exact: problem.Exact, plan: Plan) -> Data:
  """The problem as the kernels read it."""
  operand = lambda x, size: _operand(x, plan, size)
  return Data(
    q=operand(group(exact.q, exact), plan.key_size),
    k=operand(exact.k, plan.key_size),
    v=operand(exact.v, plan.value_size),
    lengths=exact.lengths if plan.ragged else None,
    q_segments=exact.q_segments,
    kv_segments=exact.kv_segments,
    bands=exact.bands,
    sink_tokens=exact.sink_tokens,
  )


def lists(exact: problem.Exact) -> Lists:
  """The lists of all query heads of a group."""
  return Lists(group(exact.indices, exact), group(exact.counts, exact))


def rows(
  exact: problem.Exact,
  plan: Plan,
  lse: jax.Array,
  g: jax.Array,
  delta: jax.Array,
) -> Rows:
  """What comes with each query, of arrays `[B, H, NQ * block_q, ..]`."""
  return Rows(
    g=_operand(group(g, exact), plan, plan.value_size),
    lse=group(lse, exact),
    delta=group(delta, exact),
  )


def pooled(exact: problem.Exact, tail: problem.Tail, plan: Plan) -> Pooled:
  """A tail that is not "mean_local" as the forward kernel reads it."""
  num_kv = -(-tail.k.shape[2] // plan.pooled) * plan.pooled
  operand = lambda x, *sizes: None if x is None else _operand(x, plan, *sizes)
  squares = None
  if tail.variance is not None:
    squares = jnp.square(group(exact.q, exact).astype(plan.wide))
  segments = tail.segments
  if segments is not None:
    segments = padding.last_axes(segments, num_kv)
  return Pooled(
    k=operand(tail.k, num_kv, plan.key_size),
    v=operand(tail.v, num_kv, plan.value_size),
    bias=padding.last_axes(
      group(tail.bias, exact), num_kv, constant_values=problem.MASKED
    ),
    segments=segments,
    variance=operand(tail.variance, num_kv, plan.key_size),
    squares=operand(squares, plan.key_size),
    slope=operand(tail.slope, plan.key_size, plan.value_size),
  )


def _operand(x, plan, *sizes):
  return split(padding.last_axes(x, *sizes), plan)


def group(x: jax.Array, exact: problem.Exact) -> jax.Array:
  """`[B, H, N, ..]` to `[B, G, R * N, ..]`."""
  b, groups = exact.k.shape[:2]
  return x.reshape(b, groups, -1, *x.shape[3:])


def heads(x: jax.Array, exact: problem.Exact) -> jax.Array:
  """`[B, G, R * N, ..]` to `[B, H, N, ..]`."""
  return x.reshape(*exact.q.shape[:3], *x.shape[3:])
