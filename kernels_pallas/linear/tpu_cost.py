"""What the TPU kernels compute and move, counted exactly.

XLA sees a kernel as one opaque call; its scheduler goes by these numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl

from kernels_pallas import tpu_core
from kernels_pallas.linear import chunk, tpu_kernels, tpu_plan

Plan = tpu_plan.Plan


@dataclasses.dataclass(frozen=True)
class Work:
  """Of one head's chunk, or of a kernel.

  Attributes:
    flops: of the products, without elementwise operations, as a TPU makes
      them: one in full float32 precision is six of bfloat16.
    exponentials: how many.
  """

  flops: int = 0
  exponentials: int = 0

  def __add__(self, other: Work) -> Work:
    return Work(
      *(
        getattr(self, f.name) + getattr(other, f.name)
        for f in dataclasses.fields(self)
      )
    )

  def __mul__(self, times: int) -> Work:
    return Work(*(x * times for x in dataclasses.astuple(self)))


def estimate(
  plan: Plan,
  operands: tpu_kernels.Operands,
  once: Any,
  *,
  backward: bool,
) -> pl.CostEstimate:
  """The cost of a kernel.

  Args:
    plan: of the call.
    operands: what it reads, some of it in several grid steps.
    once: a pytree of what else it reads or writes, all of it once.
    backward: whether it is the backward kernel.

  Returns:
    FLOPs, exponentials, and bytes between HBM and VMEM.
  """
  total = work(plan, backward)
  q, k, p, v, decay, rows, state, segments = operands
  moved = plan.parts * plan.splits * _bytes((q, k, p))
  moved += plan.splits * (
    _bytes((decay, rows)) + plan.blocks * _bytes(segments)
  )
  return pl.CostEstimate(
    flops=total.flops,
    transcendentals=total.exponentials,
    bytes_accessed=moved + _bytes((v, state, once)),
  )


def work(plan: Plan, backward: bool) -> Work:
  """What a kernel computes in all its grid steps."""
  heads = plan.batch * plan.blocks * plan.heads
  # What does not change the work of one is left out of the cache's key.
  head = dataclasses.replace(
    plan, batch=1, chunks=1, groups=1, heads=1, keys=1, blocks=1, interpret=True
  )
  one = _head_work(head, backward)
  return one * (heads * plan.splits * plan.chunks)


@functools.lru_cache(maxsize=128)
def _head_work(plan: Plan, backward: bool) -> Work:
  """What one head's chunk and its columns of V take."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  key = array(plan.narrow, plan.chunk, plan.key_size)
  v = array(plan.narrow, plan.chunk, plan.value_width)
  state = (array(plan.wide, plan.key_size, plan.value_width),) * plan.states
  column = array(plan.wide, plan.chunk, 1)
  gates = chunk.Gates(
    array(plan.wide, *key.shape) if plan.channels else column,
    column if plan.states == 2 else None,
    column if plan.delta else None,
    column if plan.states == 2 else None,
  )
  head = tpu_kernels.Head(key, key, key if plan.erase else None, gates)

  def forward(head, v, state):
    system = tpu_kernels.make_system(head, None, plan)
    (inverted,) = tpu_kernels.inverses([system], plan)
    o, _, new = chunk.step(system, inverted, v, state, precision=plan.precision)
    return o, new

  def reverse(head, v, state, do, dstate):
    make = lambda head: tpu_kernels.make_system(head, None, plan)
    system, pull = jax.vjp(make, head)
    (inverted,) = tpu_kernels.inverses([system], plan)
    return tpu_kernels.backward_head(
      system, pull, inverted, v, state, do, dstate, plan
    )

  if backward:
    jaxpr = jax.make_jaxpr(reverse)(head, v, state, v, state)
  else:
    jaxpr = jax.make_jaxpr(forward)(head, v, state)
  return count(jaxpr.jaxpr)


def count(jaxpr: Any) -> Work:
  """The work of a jaxpr without loops, dead operations left out."""
  total = Work()
  is_variable = lambda x: not hasattr(x, "val")
  live = {x for x in jaxpr.outvars if is_variable(x)}
  for eqn in reversed(jaxpr.eqns):
    if live.isdisjoint(eqn.outvars):
      continue
    live.update(x for x in eqn.invars if is_variable(x))
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if inner is not None:
      total += count(getattr(inner, "jaxpr", inner))
    elif eqn.primitive.name == "dot_general":
      total += _product(eqn)
    elif eqn.primitive.name == "exp":
      total += Work(exponentials=math.prod(eqn.outvars[0].aval.shape))
  return total


def _product(eqn: Any) -> Work:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  shape = eqn.invars[0].aval.shape
  terms = math.prod(shape[axis] for axis in contracted)
  flops = 2 * terms * math.prod(eqn.outvars[0].aval.shape)
  full = eqn.params["precision"] in (
    jax.lax.Precision.HIGHEST,
    (jax.lax.Precision.HIGHEST,) * 2,
  )
  return Work(flops=flops * (tpu_core.PASSES if full else 1))


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
