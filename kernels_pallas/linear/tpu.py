"""The chunked form as two TPU kernels: forward, and backward in reverse.

A grid step takes one chunk of a few heads. The chunks of a head follow each
other in the grid's last, sequential dimension with the states in VMEM scratch,
so that a state never travels to HBM between chunks; the heads of a step are
independent chains, unrolled so that one fills the gaps of another. Arrays keep
the public layout `[B, T, heads * size]`: a block is a chunk of rows and a few
heads of lanes, nothing is transposed or repeated in HBM. What a chunk does is
`chunk`'s algebra, on one chunk of one head.

The backward kernel walks the chunks from the last to the first with the
states' cotangents in scratch. It reads the states that entered each chunk,
which the forward kernel writes only when a gradient is wanted, and makes the
rest again. Cotangents of q and k are summed over the heads of a step that
share a key head, and over steps in a fixed order outside: no atomics.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rules, tpu_core
from kernels_pallas.linear import (
  chunk,
  layout,
  problem,
  tpu_cost,
  tpu_kernels,
  tpu_plan,
)

Operands = tpu_kernels.Operands
Plan = tpu_plan.Plan


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, chunk.Columns]:
  """Computes one call of the family.

  Args:
    inputs: the arrays. float64 is for the interpreter only.
    options: the static part.

  Returns:
    o `[B, T, H, V]` in v's dtype and the final state, M arrays
    `[B, H, K, V]`.

  Raises:
    NotImplementedError: for float64 without `interpret`, and for K and V
      whose states do not fit VMEM.
  """
  dtype = inputs.v.dtype
  if dtype == jnp.float16:  # Which Mosaic does not know.
    vectors = {name: getattr(inputs, name) for name in ("q", "k", "p", "v")}
    inputs = inputs._replace(
      **jax.tree.map(lambda x: x.astype(jnp.float32), vectors)
    )
  plan = tpu_plan.make(inputs, options)
  b, length, heads, value_size = inputs.v.shape
  operands = _operands(inputs, plan)
  o, state = _RULE(plan, operands)
  o = o.reshape(b, -1, heads, plan.value_size)[:, :length, :, :value_size]
  key_size = inputs.q.shape[-1]
  return o.astype(dtype), tuple(x[:, :, :key_size, :value_size] for x in state)


def _operands(inputs: problem.Inputs, plan: Plan) -> Operands:
  """Pads T, K and V with exact zeros and brings gates to rows."""
  inputs = layout.pad(inputs, plan.chunk)
  b, t = inputs.q.shape[:2]

  def lanes(x, size):
    if x is None:
      return None
    widths = [(0, 0)] * 3 + [(0, size - x.shape[-1])]
    return jnp.pad(x, widths).reshape(b, t, -1)

  channels = inputs.log_decay.ndim == 4
  scalars = [
    x
    for x in (
      None if channels else inputs.log_decay,
      inputs.log_momentum,
      inputs.beta,
      inputs.eta,
    )
    if x is not None
  ]
  rows = None
  if scalars:
    rows = jnp.stack(scalars, axis=-1)
    rows = rows.reshape(b, plan.chunks, plan.chunk, plan.blocks, -1)
    rows = rows.transpose(0, 3, 1, 4, 2)
  widths = [
    (0, 0),
    (0, 0),
    (0, plan.key_size - inputs.q.shape[-1]),
    (0, plan.value_size - inputs.v.shape[-1]),
  ]
  return Operands(
    q=lanes(inputs.q, plan.key_size),
    k=lanes(inputs.k, plan.key_size),
    p=lanes(inputs.p, plan.key_size),
    v=lanes(inputs.v, plan.value_size),
    decay=lanes(inputs.log_decay, plan.key_size) if channels else None,
    rows=rows,
    state=tuple(jnp.pad(x, widths) for x in inputs.state),
    segments=_segments(inputs.segments, plan),
  )


def _segments(ids: jax.Array | None, plan: Plan) -> jax.Array | None:
  if ids is None:
    return None
  ids = ids.reshape(-1, plan.chunks, plan.chunk)
  entering = jnp.pad(ids[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
  return jnp.stack([ids, jnp.broadcast_to(entering, ids.shape)], axis=2)


def _primal(plan: Plan, operands: Operands):
  o, final, _ = _forward(operands, plan, entered=False)
  return o, final


def _kept_forward(plan: Plan, operands: Operands):
  o, final, entered = _forward(operands, plan, entered=True)
  return (o, final), (operands._replace(state=()), entered)


def _transposed(plan: Plan, kept, cotangents):
  operands, entered = kept
  return (_backward(operands, entered, *cotangents, plan),)


_RULE = rules.Rule(
  _primal, _kept_forward, _transposed, plain=None, name="pallas_tpu"
)


def _specs(operands: Operands, plan: Plan, when) -> Operands:
  """The blocks of a grid step; `when` maps its last index to a chunk."""
  size, width = plan.chunk, plan.value_width

  def keys(b, h, s, n):
    return b, when(n), plan.key_block(h)

  def head(b, h, s, n):
    return b, when(n), h

  def some(x, spec):
    return None if x is None else spec

  key = pl.BlockSpec((None, size, plan.keys * plan.key_size), keys)
  gates = 0 if operands.rows is None else operands.rows.shape[-2]
  return Operands(
    q=key,
    k=key,
    p=some(operands.p, key),
    v=pl.BlockSpec(
      (None, size, plan.heads * width),
      lambda b, h, s, n: (b, when(n), h * plan.splits + s),
    ),
    decay=some(
      operands.decay,
      pl.BlockSpec((None, size, plan.heads * plan.key_size), head),
    ),
    rows=some(
      operands.rows,
      pl.BlockSpec(
        (None, None, None, gates, size),
        lambda b, h, s, n: (b, h, when(n), 0, 0),
      ),
    ),
    state=tuple(
      pl.BlockSpec(
        (None, plan.heads, plan.key_size, width),
        lambda b, h, s, n: (b, h, 0, s),
      )
      for _ in operands.state
    ),
    segments=some(
      operands.segments,
      pl.BlockSpec(
        (None, None, 2, size), lambda b, h, s, n: (b, when(n), 0, 0)
      ),
    ),
  )


def _entered(plan: Plan, when):
  """Shapes and blocks of the states that enter the chunks."""
  shape = rules.out_shape(
    (
      plan.batch,
      plan.chunks,
      plan.blocks * plan.heads,
      plan.key_size,
      plan.value_size,
    ),
    plan.wide,
  )
  spec = pl.BlockSpec(
    (None, None, plan.heads, plan.key_size, plan.value_width),
    lambda b, h, s, n: (b, when(n), h, 0, s),
  )
  return (shape,) * plan.states, (spec,) * plan.states


def _call(kernel, plan: Plan, name: str, in_specs, out_specs, out_shape, cost):
  scratch = (plan.heads, plan.key_size, plan.value_width)
  call = pl.pallas_call(
    functools.partial(kernel, plan=plan),
    grid=(plan.batch, plan.blocks, plan.splits, plan.chunks),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[pltpu.VMEM(scratch, plan.wide)] * plan.states,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=tpu_core.VMEM_LIMIT,
    ),
    cost_estimate=cost,
    interpret=plan.interpret,
    name=name,
  )
  return functools.partial(rules.kernel, call, name="pallas_tpu")


def _forward(operands: Operands, plan: Plan, entered: bool):
  """o `[B, T, H * V]`, the final states, and those that entered chunks."""
  when = lambda n: n
  specs = _specs(operands, plan, when)
  shape = lambda x: rules.out_shape(x.shape, x.dtype)
  shapes, blocks = _entered(plan, when) if entered else ((), ())
  out = shape(operands.v), tuple(shape(x) for x in operands.state), shapes
  return _call(
    tpu_kernels.forward,
    plan,
    "linear_attention_forward",
    in_specs=(specs,),
    out_specs=(specs.v, specs.state, blocks),
    out_shape=out,
    cost=tpu_cost.estimate(plan, operands, out, backward=False),
  )(operands)


def _gradients(operands: Operands, dfinal, plan: Plan, when):
  """Shapes and blocks of the operands' cotangents.

  Those of what several grid steps read are partial sums, one for each step,
  and have the splits of V in front.
  """
  specs = _specs(operands._replace(state=dfinal), plan, when)
  shape = lambda x: rules.out_shape(x.shape, x.dtype)
  key_lanes = plan.blocks * plan.keys * plan.key_size
  alone = plan.splits * plan.parts == 1
  key_shape = rules.out_shape(
    (plan.splits, *operands.q.shape[:2], key_lanes),
    plan.narrow if alone else plan.wide,
  )
  tokens = lambda b, h, s, n: (s, b, when(n), h)
  key = pl.BlockSpec((None, *specs.q.block_shape), tokens)
  split = lambda x: rules.out_shape((plan.splits, *x.shape), x.dtype)
  shapes = Operands(
    q=key_shape,
    k=key_shape,
    p=None if operands.p is None else key_shape,
    v=shape(operands.v),
    decay=None if operands.decay is None else split(operands.decay),
    rows=None if operands.rows is None else split(operands.rows),
    state=tuple(shape(x) for x in dfinal),
    segments=None,
  )
  decay = rows = None
  if operands.decay is not None:
    decay = pl.BlockSpec((None, *specs.decay.block_shape), tokens)
  if operands.rows is not None:
    rows = pl.BlockSpec(
      (None, *specs.rows.block_shape),
      lambda b, h, s, n: (s, b, h, when(n), 0, 0),
    )
  specs = specs._replace(
    q=key,
    k=key,
    p=None if operands.p is None else key,
    decay=decay,
    rows=rows,
    segments=None,
  )
  return shapes, specs


def _backward(operands, entered, do, dfinal, plan: Plan) -> Operands:
  """The cotangents of the operands, from the last chunk to the first."""
  when = lambda n: plan.chunks - 1 - n
  specs = _specs(operands, plan, when)
  _, blocks = _entered(plan, when)
  shapes, gradients = _gradients(operands, dfinal, plan, when)
  (out,) = _call(
    tpu_kernels.backward,
    plan,
    "linear_attention_backward",
    in_specs=(specs, blocks, specs.v, gradients.state),
    out_specs=(gradients,),
    out_shape=(shapes,),
    cost=tpu_cost.estimate(
      plan, operands, (entered, do, dfinal, shapes), backward=True
    ),
  )(operands, entered, do, dfinal)

  def whole(x, operand):
    if x is None:
      return None
    b, t = operand.shape[:2]
    x = x.reshape(plan.splits, b, t, plan.groups, plan.parts, plan.key_size)
    x = jnp.sum(x, axis=(0, 4), dtype=x.dtype)
    return x.reshape(operand.shape).astype(operand.dtype)

  total = lambda x: None if x is None else jnp.sum(x, axis=0)
  return out._replace(
    q=whole(out.q, operands.q),
    k=whole(out.k, operands.k),
    p=whole(out.p, operands.p),
    decay=total(out.decay),
    rows=total(out.rows),
  )
