"""The bodies of the TPU kernels: a chunk of the heads of one grid step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import pieces
from kernels_pallas.linear import chunk, inverse, tpu_plan, vector

Plan = tpu_plan.Plan


class Operands(NamedTuple):
  """What the kernels read and have cotangents for, and the segments.

  Attributes:
    q: `[B, T, G * K]`, and k and p likewise (p may be None).
    k: see q.
    p: see q.
    v: `[B, T, H * V]`.
    decay: `[B, T, H * K]`, log decay per channel, or None.
    rows: `[B, H / S, N, S * gates, C]`, the gates that are scalars of the S
      heads of each step, or None; tokens lie in lanes, since a column of
      them would fill a 128th of the tiles that are moved.
    state: M arrays `[B, H, K, V]`.
    segments: int32 `[B, N, 2, C]`, ordinals and the one that enters, or None.
  """

  q: jax.Array
  k: jax.Array
  p: jax.Array | None
  v: jax.Array
  decay: jax.Array | None
  rows: jax.Array | None
  state: tuple[jax.Array, ...]
  segments: jax.Array | None


class Head(NamedTuple):
  """One head of a grid step, as arrays."""

  q: jax.Array
  k: jax.Array
  p: jax.Array | None
  gates: chunk.Gates


def _heads(blocks: Operands, plan: Plan) -> list[Head]:
  columns = None if blocks.rows is None else blocks.rows[...].T
  out = []
  for i in range(plan.heads):
    j = i * plan.keys // plan.heads
    key = lambda x, j=j: None if x is None else x[:, _lanes(j, plan.key_size)]
    decay = None
    if plan.channels:
      decay = blocks.decay[:, _lanes(i, plan.key_size)]
    if columns is None:
      scalars = []
    else:
      count = columns.shape[1] // plan.heads
      scalars = [
        columns[:, i * count + c : i * count + c + 1] for c in range(count)
      ]
    out.append(
      Head(
        key(blocks.q),
        key(blocks.k),
        key(blocks.p),
        _gates(decay, scalars, plan),
      )
    )
  return out


def _lanes(i: int, size: int) -> slice:
  return slice(i * size, (i + 1) * size)


def _gates(decay, scalars, plan: Plan) -> chunk.Gates:
  """Gates of the scalars in the order in which `_operands` stacked them."""
  scalars = list(scalars)
  return chunk.Gates(
    log_decay=decay if plan.channels else scalars.pop(0),
    log_momentum=scalars.pop(0) if plan.states == 2 else None,
    beta=scalars.pop(0) if plan.delta else None,
    eta=scalars.pop(0) if plan.states == 2 else None,
  )


def _scalars(gates: chunk.Gates, plan: Plan) -> list[jax.Array]:
  """The inverse of `_gates`, without the decay per channel."""
  if plan.channels:
    gates = gates._replace(log_decay=None)
  return [x for x in gates if x is not None]


def make_system(
  head: Head, segments: chunk.Segments | None, plan: Plan
) -> chunk.System:
  """The system of a head's chunk."""
  if plan.channels:
    wide = lambda x: None if x is None else x.astype(plan.wide)
    return vector.vector_system(
      wide(head.q),
      wide(head.k),
      wide(head.p),
      head.gates,
      segments,
      scale=plan.scale,
      delta=plan.delta,
      whole=True,
      precision=plan.precision,
      mask_dot=pieces.mask_dot,
    )
  return chunk.scalar_system(
    *head,
    segments,
    scale=plan.scale,
    delta=plan.delta,
    precision=plan.precision,
    mask_dot=pieces.mask_dot,
  )


def _read_segments(ref) -> chunk.Segments | None:
  if ref is None:
    return None
  columns = ref[...].T
  return chunk.Segments(columns[:, :1], columns[:1, 1:])


def inverses(
  systems: Sequence[chunk.System], plan: Plan
) -> list[jax.Array | None]:
  """Of each system's I + L; None without the delta rule."""
  if not plan.delta:
    return [None] * len(systems)
  # What comes of bfloat16 has no more than the 16 bits that this keeps.
  how = {"matmul": pieces.matmul} if plan.narrow == jnp.bfloat16 else {}
  return [inverse.unit_lower_inverse(x.lower, **how) for x in systems]


def _copy(source, target):
  for a, b in zip(source, target, strict=True):
    b[...] = a[...]


def forward(blocks: Operands, o, final, entered, *carry, plan: Plan) -> None:
  """The forward kernel.

  Args:
    blocks: what is read.
    o: `[C, heads * V]`, written.
    final: M states, written after the last chunk.
    entered: M states, written with what enters the chunk, or none.
    *carry: M states in scratch.
    plan: of the call.
  """
  n = pl.program_id(3)
  pl.when(n == 0)(lambda: _copy(blocks.state, carry))
  _copy(carry if entered else (), entered)
  segments = _read_segments(blocks.segments)
  # A phase of all heads after the other, so that their chains interleave.
  systems = [make_system(x, segments, plan) for x in _heads(blocks, plan)]
  for i, inverted in enumerate(inverses(systems, plan)):
    lanes = _lanes(i, plan.value_width)
    out, _, new = chunk.step(
      systems[i],
      inverted,
      blocks.v[:, lanes],
      tuple(x[i] for x in carry),
      precision=plan.precision,
    )
    o[:, lanes] = out.astype(o.dtype)
    for ref, x in zip(carry, new, strict=True):
      ref[i] = x
  pl.when(n == plan.chunks - 1)(lambda: _copy(carry, final))


def backward(
  blocks: Operands, entered, do, dfinal, out: Operands, *carry, plan: Plan
) -> None:
  """The backward kernel, from the last chunk to the first.

  Args:
    blocks: what the forward kernel read.
    entered: M states, what entered the chunk.
    do: `[C, heads * V]`, the cotangent of o.
    dfinal: M states, the cotangents of the final ones.
    out: the cotangents of `blocks`, written.
    *carry: M states' cotangents in scratch.
    plan: of the call.
  """
  n = pl.program_id(3)
  pl.when(n == 0)(lambda: _copy(dfinal, carry))
  segments = _read_segments(blocks.segments)
  make = lambda head: make_system(head, segments, plan)
  systems, pulls = zip(
    *(jax.vjp(make, x) for x in _heads(blocks, plan)), strict=True
  )
  heads = []
  for i, inverted in enumerate(inverses(systems, plan)):
    lanes = _lanes(i, plan.value_width)
    head, dv, dstate = backward_head(
      systems[i],
      pulls[i],
      inverted,
      blocks.v[:, lanes],
      tuple(x[i] for x in entered),
      do[:, lanes],
      tuple(x[i] for x in carry),
      plan,
    )
    out.v[:, lanes] = dv.astype(out.v.dtype)
    for ref, x in zip(carry, dstate, strict=True):
      ref[i] = x
    heads.append(head)
  _write_heads(heads, out, plan)
  pl.when(n == plan.chunks - 1)(lambda: _copy(carry, out.state))


def backward_head(
  system: chunk.System,
  pull: Callable[[chunk.System], tuple[Head]],
  inverted: jax.Array | None,
  v: jax.Array,
  state: chunk.Columns,
  do: jax.Array,
  dstate: chunk.Columns,
  plan: Plan,
) -> tuple[Head, jax.Array, chunk.Columns]:
  """The cotangents of a head's `Head`, values and entering state.

  Args:
    system: the head's chunk.
    pull: transposes what made the system of the `Head`.
    inverted: `[C, C]`, or None without the delta rule.
    v: `[C, V]`.
    state: M arrays `[K, V]`, as they entered.
    do: `[C, V]`.
    dstate: M cotangents `[K, V]`, of what left.
    plan: the plan.
  """
  precision = plan.precision
  _, e, _ = chunk.step(system, inverted, v, state, precision=precision)
  do = do.astype(plan.wide)
  dsystem, dv, dstate = chunk.step_vjp(
    system, inverted, e, state, do, dstate, precision=precision
  )
  dsystem = jax.tree.map(lambda d, x: d.astype(x.dtype), dsystem, system)
  (head,) = pull(dsystem)
  return head, dv, dstate


def _write_heads(heads: list[Head], out: Operands, plan: Plan):
  """Writes the cotangents of keys, summed over their heads, and of gates."""
  repeat = plan.heads // plan.keys
  for name in ("q", "k", "p"):
    ref = getattr(out, name)
    for j in range(plan.keys if ref is not None else 0):
      shared = heads[j * repeat : (j + 1) * repeat]
      total = sum(getattr(x, name).astype(plan.wide) for x in shared)
      ref[:, _lanes(j, plan.key_size)] = total.astype(ref.dtype)
  columns = [x for head in heads for x in _scalars(head.gates, plan)]
  if columns:
    out.rows[...] = jnp.concatenate(columns, axis=1).T
  if plan.channels:
    for i, head in enumerate(heads):
      out.decay[:, _lanes(i, plan.key_size)] = head.gates.log_decay
