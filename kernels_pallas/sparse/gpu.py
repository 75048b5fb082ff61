"""Block-sparse attention on GPUs: Pallas kernels, see `gpu_kernels`.

The forward kernel takes listed blocks and pooled keys in one softmax, but for
the tail "mean_local", whose K x V matrix per block is XLA's. Backward, one
kernel walks the lists for the queries, another the transposed lists for keys
and values. In bfloat16, pooled keys, values and statistics are rounded to it
once, as tokens' are.
"""

from __future__ import annotations

import functools

import jax

from kernels_pallas.sparse import (
  blocks,
  core,
  gpu_call,
  gpu_data,
  gpu_plan,
  pooled,
  problem,
)

Plan = gpu_plan.Plan


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, jax.Array]:
  """As `core.run`.

  Args:
    inputs: the problem, in bfloat16 or float32; float64 interpreted.
    options: the static choices.

  Returns:
    The output and the log-partition.

  Raises:
    NotImplementedError: as `gpu_plan.make`.
  """
  plan = gpu_plan.make(inputs, options)
  return core.run(
    functools.partial(_forward, plan),
    functools.partial(_backward, plan),
    inputs,
    options,
    kernels="pallas_gpu",
  )


def _forward(plan, exact, tail, options):
  local = tail is not None and tail.local is not None
  out, lse = gpu_call.forward(
    gpu_data.data(exact, plan),
    gpu_data.lists(exact),
    None if tail is None or local else gpu_data.pooled(exact, tail, plan),
    plan,
  )
  part = (
    gpu_data.heads(out, exact)[..., : exact.v.shape[-1]],
    gpu_data.heads(lse, exact),
  )
  if not local:
    return part
  return core.merge([part, pooled.forward(exact, tail, options)])


def _backward(plan, exact, options, lse, g, delta):
  del options
  data, lists = gpu_data.data(exact, plan), gpu_data.lists(exact)
  rows = gpu_data.rows(exact, plan, lse, g, delta)
  dq = gpu_call.backward_queries(data, lists, rows, plan)
  num_kv = exact.lengths.shape[2]
  lists = gpu_data.Lists(*blocks.transposed(*lists, num_kv))
  dk, dv = gpu_call.backward_keys(data, lists, rows, plan)
  key_size, value_size = exact.k.shape[-1], exact.v.shape[-1]
  dq = gpu_data.heads(dq, exact)[..., :key_size]
  return dq, dk[..., :key_size], dv[..., :value_size]
