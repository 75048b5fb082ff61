"""How the GPU kernels are called: grids, and what their programs see.

They are lowered by Triton for the reasons that `linear.gpu_walk` gives; only
this module knows. On Hopper products of 64 rows and more become wgmma.
"""

from __future__ import annotations

import functools
import warnings

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.sparse import gpu_data, gpu_kernels, gpu_plan

Plan = gpu_plan.Plan
Data, Lists, Rows = gpu_data.Data, gpu_data.Lists, gpu_data.Rows


def forward(
  data: Data, lists: Lists, tail: gpu_data.Pooled | None, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """Attention to the listed blocks and the pooled keys.

  Args:
    data: the problem.
    lists: of key blocks, by block of queries.
    tail: the pooled keys or None.
    plan: the plan.

  Returns:
    out `[B, G, R * NQ * block_q, V]` and lse `[B, G, R * NQ * block_q]`.
  """
  shape = data.q[0].shape[:3]
  return _call(
    gpu_kernels.forward,
    (data, lists, tail),
    ((*shape, plan.value_size), shape),
    plan,
    plan.forward,
    plan.forward.rows,
  )


def backward_queries(
  data: Data, lists: Lists, rows: Rows, plan: Plan
) -> jax.Array:
  """dq `[B, G, R * NQ * block_q, K]` of the listed blocks."""
  (dq,) = _call(
    gpu_kernels.backward_queries,
    (data, lists, rows),
    (data.q[0].shape,),
    plan,
    plan.dq,
    plan.dq.rows,
  )
  return dq


def backward_keys(
  data: Data, lists: Lists, rows: Rows, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """dk and dv, as k and v; `lists` are of query blocks, by key block."""
  return _call(
    gpu_kernels.backward_keys,
    (data, lists, rows),
    (data.k[0].shape, data.v[0].shape),
    plan,
    plan.dkv,
    plan.dkv.keys,
  )


def _call(kernel, operands, shapes, plan: Plan, tile: gpu_plan.Tile, size: int):
  """Calls a kernel.

  Args:
    kernel: of `gpu_kernels`; takes the refs of operands, then of outputs.
    operands: of every head, or None.
    shapes: of the outputs, `[B, G, N, ...]`.
    plan: the plan.
    tile: the kernel's.
    size: the rows of outputs that a program writes.

  Returns:
    The outputs.
  """
  b, groups, length = shapes[0][:3]

  def output(shape):
    more = shape[3:]
    return pl.BlockSpec(
      (None, None, size, *more), lambda i, g, b: (b, g, i, *(0,) * len(more))
    )

  # JAX says so at each lowering; it is this module's business, see above.
  warnings.filterwarnings(
    "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
  )
  return pl.pallas_call(
    functools.partial(kernel, plan=plan, tile=tile),
    # Programs of one head run together, and share its keys in the cache.
    grid=(length // size, groups, b),
    in_specs=tuple(_specs(x) for x in operands),
    out_specs=[output(shape) for shape in shapes],
    out_shape=[jax.ShapeDtypeStruct(shape, plan.wide) for shape in shapes],
    compiler_params=pltriton.CompilerParams(num_warps=tile.warps, num_stages=2),
    interpret=plan.options.interpret,
    name=f"sparse_attention_{kernel.__name__}",
  )(*operands)


# The leading axes of which a program sees one index: of the batch, or none;
# of others the group too.
_LEADING = dict(bands=0, sink_tokens=0, q_segments=1, kv_segments=1, segments=1)


def _specs(operand):
  """All of a head: programs themselves load what their lists name."""
  if operand is None:
    return None

  def spec(name, x):
    leading = _LEADING.get(name, 2)
    kept = x.shape[leading:]
    return pl.BlockSpec(
      (*(None,) * leading, *kept),
      lambda i, g, b: (*(b, g)[:leading], *(0,) * len(kept)),
    )

  fields = operand._asdict().items()
  return type(operand)(
    *(jax.tree.map(functools.partial(spec, name), x) for name, x in fields)
  )
