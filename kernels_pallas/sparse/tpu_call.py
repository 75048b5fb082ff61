"""How the TPU kernels are called: grids, what their steps see, batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import padding, tpu_core
from kernels_pallas.sparse import tpu_kernels, tpu_plan, tpu_walk

Plan = tpu_plan.Plan


class Step(NamedTuple):
  """A grid step: batch, key head, query head, block of the grid's own side."""

  batch: Any
  group: Any
  head: Any
  block: Any


class Operand(NamedTuple):
  """An array (or a `ShapeDtypeStruct`) and what a grid step sees of it."""

  array: Any
  spec: pl.BlockSpec


class Grid:
  """A kernel's grid: its steps, and operands by where a step finds them."""

  def __init__(self, plan: Plan, shape, step, following):
    """Args:
    plan: of the call.
    shape: of the grid; its last axes are sequential from the third on.
    step: maps the grid's indices to a `Step`.
    following: to the `Step` that comes next.
    """
    self.plan = plan
    self.shape = shape
    self.step = step
    self.following = following

  def operand(self, array, at: Callable[[Step], tuple[Any, ...]]) -> Any:
    """In VMEM: the leading axes at `at`, of the others all; None for None."""
    return None if array is None else _operand(array, self.step, at)

  def scalars(self, array, at, *, following=False) -> Any:
    """Likewise in scalar memory."""
    step = self.following if following else self.step
    return None if array is None else _operand(array, step, at, pltpu.SMEM)

  def lists(self, indices, counts, per_step: int) -> tpu_walk.Lists:
    """Rows of a count and a list, padded to whole steps."""
    rows = jnp.concatenate(
      [counts[..., None], padding.to_multiple(indices, 3, per_step)], axis=-1
    )[..., None, :]
    at = lambda x: (x.batch, x.head, x.block)
    return tpu_walk.Lists(
      self.scalars(rows, at), self.scalars(rows, at, following=True)
    )

  def where(self, exact, own_ids, listed_ids) -> tpu_kernels.Where:
    """What masks need to know."""
    bands = None
    if exact.bands is not None:
      flat = exact.bands.reshape(exact.bands.shape[0], -1)
      bands = jnp.concatenate([exact.sink_tokens[:, None], flat], axis=1)
      bands = jnp.broadcast_to(
        bands[:, None], (self.plan.batch, *bands[:, None].shape)
      )
    if own_ids is not None:
      own_ids = own_ids[:, :, None]
    return tpu_kernels.Where(
      lengths=self.scalars(
        exact.lengths[:, :, None], lambda x: (x.batch, x.group)
      ),
      bands=self.scalars(bands, lambda x: (x.batch, x.head)),
      own_ids=self.operand(own_ids, lambda x: (x.batch, x.block)),
      listed_ids=self.operand(listed_ids, lambda x: (x.batch,)),
    )


def _operand(array, step, at, memory_space=None):
  """An `Operand` whose blocks are the trailing axes of `array`."""
  axes = len(at(Step(0, 0, 0, 0)))
  rest = array.shape[axes:]

  def index(*grid):
    return (*at(step(*grid)), *(0 for _ in rest))

  return Operand(
    array,
    pl.BlockSpec((None,) * axes + rest, index, memory_space=memory_space),
  )


def query_grid(plan: Plan) -> Grid:
  """One step for each block of queries of a head, in order."""

  def step(b, h, i):
    # lax.div: the floor of `//` asks a Mosaic compilation for its chip.
    return Step(b, jax.lax.div(h, h.dtype.type(plan.repeat)), h, i)

  def following(b, h, i):
    return step(b, h, jnp.minimum(i + 1, plan.num_q - 1))

  shape = plan.batch, plan.heads, plan.num_q
  return Grid(plan, shape, step, following)


def key_grid(plan: Plan) -> Grid:
  """One step for each query head of a block of keys, those last."""

  repeat = plan.repeat

  def step(b, g, j, r):
    return Step(b, g, g * repeat + r, j)

  def following(b, g, j, r):
    wraps = r + 1 == repeat
    block = jnp.minimum(jnp.where(wraps, j + 1, j), plan.num_kv - 1)
    return step(b, g, block, jnp.where(wraps, 0, r + 1))

  shape = plan.batch, plan.groups, plan.num_kv, repeat
  return Grid(plan, shape, step, following)


def run(
  kernel, name, grid: Grid, inputs, outputs, sources, totals
) -> tuple[jax.Array, ...]:
  """Runs a kernel.

  Under `jax.vmap` it is one call of a larger batch: Pallas has no rule for
  kernels that copy from HBM themselves.

  Args:
    kernel: of `tpu_kernels`.
    name: its name in `tpu_plan.cost`.
    grid: its grid.
    inputs: pytrees of `Operand`s, whose arrays have the batch in front.
    outputs: a tuple of `Operand`s, likewise.
    sources: arrays `[B, heads, blocks, rows, lanes]` that it gathers from,
      and how many blocks at a time.
    totals: shapes of its running results.

  Returns:
    The outputs.
  """
  arrays, at_a_time = sources
  scratch = tpu_walk.Scratch(
    buffers=tuple(
      pltpu.VMEM((2, at_a_time, *x.shape[3:]), x.dtype) for x in arrays
    ),
    arrived=pltpu.SemaphoreType.DMA((2,)),
    half=pltpu.SMEM((1,), jnp.int32),
    totals=tuple(pltpu.VMEM(shape, grid.plan.wide) for shape in totals),
  )

  def call(batch, inputs_and_sources):
    plan = dataclasses.replace(grid.plan, batch=batch)
    return pl.pallas_call(
      functools.partial(kernel, plan=plan),
      grid=(batch, *grid.shape[1:]),
      in_specs=(
        *_part("spec", inputs),
        (pl.BlockSpec(memory_space=pltpu.HBM),) * len(arrays),
      ),
      out_specs=_part("spec", outputs),
      out_shape=jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype),
        _part("array", outputs),
      ),
      scratch_shapes=(scratch,),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * 2
        + ("arbitrary",) * (len(grid.shape) - 2),
        vmem_limit_bytes=tpu_core.VMEM_LIMIT,
      ),
      cost_estimate=tpu_plan.cost(plan, name),
      interpret=plan.interpret,
      name=f"sparse_attention_{name}",
    )(*inputs_and_sources)

  given = (*_part("array", inputs), tuple(arrays))
  return _batched(call, grid.plan.batch)(given)


def _part(name: str, operands: Any) -> Any:
  """A field of all `Operand`s of a pytree."""
  return jax.tree.map(
    lambda x: getattr(x, name),
    operands,
    is_leaf=lambda x: isinstance(x, Operand),
  )


def _batched(call, batch: int):
  """`call(batch, tree)` of the tree; `jax.vmap` makes the batch larger."""

  @jax.custom_batching.custom_vmap
  def one(tree):
    return call(batch, tree)

  @one.def_vmap
  def _(size, is_batched, tree):
    def merge(x, mapped):
      if not mapped:
        x = jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    out = _batched(call, size * batch)(jax.tree.map(merge, tree, *is_batched))
    out = jax.tree.map(lambda x: x.reshape(size, batch, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return one
