"""The chunked form on GPUs: what is serial in a Pallas kernel, the rest XLA.

The chunks' systems and inverses do not depend on each other: XLA makes them
all at once, as for `xla`. What remains is the walk of a state through its
chunks, three dependent products each, and only that is in the kernels
(`gpu_walk`).

Backward, a second kernel walks the states' cotangents from the last chunk to
the first and writes the one that leaves each chunk. With those and the states
that entered, every other gradient is a product of one chunk alone:
`chunk.step_vjp` of all chunks at once, over whole heads, so that no partial
sums over columns of V exist and results do not depend on an order of programs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import meshes, pieces, rules
from kernels_pallas.linear import (
  chunk,
  gpu_plan,
  gpu_walk,
  inverse,
  layout,
  problem,
  vector,
)

Plan = gpu_plan.Plan


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, chunk.Columns]:
  """Computes one call of the family.

  Args:
    inputs: the arrays. float64 is for the interpreter only.
    options: the static part; chunks of more than 64 tokens are cut.

  Returns:
    o `[B, T, H, V]` in v's dtype and the final state, M arrays
    `[B, H, K, V]`.

  Raises:
    NotImplementedError: for K above 256, and for float64 without `interpret`.
  """
  plan = gpu_plan.make(inputs, options)
  _, length, _, key_size = inputs.q.shape
  value_size = inputs.v.shape[-1]
  padded = gpu_plan.pad(inputs, plan)
  o, state = _RULE(plan, padded._replace(segments=None), padded.segments)
  return o[:, :length, :, :value_size], tuple(
    x[:, :, :key_size, :value_size] for x in state
  )


def _primal(plan, inputs, segments):
  return _forward(inputs, segments, plan)[:2]


def _kept_forward(plan, inputs, segments):
  o, state, inverses, entered = _forward(inputs, segments, plan, keep=True)
  return (o, state), (inputs, segments, inverses, entered)


def _transposed(plan, kept, cotangents):
  inputs, segments, inverses, entered = kept
  do, dstate = cotangents
  system, pullback = jax.vjp(lambda x: _system(x, segments, plan), inputs)
  walk = _walk(inputs, system, inverses, plan)
  dstate, leaving = gpu_walk.backward(walk, do, dstate, plan)
  leaving = _grouped(leaving, inputs)
  groups = inputs.q.shape[2]
  arrange = lambda x: layout.chunks(x, plan.chunk, groups)
  precision = plan.precision
  _, e, _ = chunk.step(
    system, inverses, arrange(inputs.v), entered, precision=precision
  )
  dsystem, dv, _ = chunk.step_vjp(
    system, inverses, e, entered, arrange(do), leaving, precision=precision
  )
  dsystem = jax.tree.map(lambda d, x: d.astype(x.dtype), dsystem, system)
  (dinputs,) = pullback(dsystem)
  dv = layout.tokens(layout.tokens_first(dv), do.shape[1])
  return dinputs._replace(v=dv.astype(inputs.v.dtype), state=dstate), None


_RULE = rules.Rule(
  _primal, _kept_forward, _transposed, plain=None, name="pallas_gpu"
)


def _system(inputs, segments, plan: Plan) -> chunk.System:
  """The systems of all chunks, `[N, B, G, R, ...]`."""
  groups = inputs.q.shape[2]
  arrange = lambda x: (
    None if x is None else layout.chunks(x, plan.chunk, groups)
  )
  operands = (
    arrange(inputs.q),
    arrange(inputs.k),
    arrange(inputs.p),
    layout.gates(inputs, plan.chunk, groups),
    layout.segments(segments, plan.chunk),
  )
  how = dict(scale=plan.scale, delta=plan.delta)
  if inputs.log_decay.ndim == 3:
    system = chunk.scalar_system(*operands, **how, precision=plan.precision)
    return meshes.vary_alike(system)
  system = meshes.vary_alike(vector.vector_system(*operands, **how))
  # As the walk reads them.
  narrow = lambda x: None if x is None else x.astype(inputs.q.dtype)
  return system._replace(
    q=narrow(system.q), k=narrow(system.k), p=narrow(system.p)
  )


def _walk(inputs, system: chunk.System, inverses, plan: Plan) -> gpu_walk.Walk:
  """What the kernels read of a system and its inputs."""
  q, k, p = inputs.q, inputs.k, inputs.p
  scales = (*system.q_scale, *system.k_scale, *system.p_scale)
  entries = [x for row in system.decay for x in row if x is not None]
  # [.., 1 or K, 1]
  decay = jnp.stack(entries, axis=-3)[..., 0]
  if inputs.log_decay.ndim == 4:
    q, k, p = (
      None if x is None else layout.tokens(layout.tokens_first(x), q.shape[1])
      for x in (system.q, system.k, system.p)
    )
  else:
    decay = decay[..., 0]

  def split(x):
    if x is None:
      return None
    return jnp.stack(pieces.operands(x, plan.parts, plan.operand))

  return gpu_walk.Walk(
    q=split(q),
    k=split(k),
    p=split(p),
    at=split(system.at),
    inverse=split(inverses),
    rows=jnp.stack([x[..., 0] for x in scales], axis=-2),
    decay=decay,
  )


def _forward(inputs, segments, plan: Plan, keep: bool = False):
  """o, the final states, the inverses, and the states that enter chunks."""
  system = _system(inputs, segments, plan)
  inverses = None
  if plan.delta:
    inverses = inverse.unit_lower_inverse(system.lower)
  walk = _walk(inputs, system, inverses, plan)
  o, state, entered = gpu_walk.forward(
    walk, inputs.v, inputs.state, plan, keep=keep
  )
  return o, state, inverses, _grouped(entered, inputs)


def _grouped(states, inputs):
  """`[N, B, H, K, V]` to `[N, B, G, R, K, V]`."""
  groups = inputs.q.shape[2]
  shape = lambda x: (*x.shape[:2], groups, -1, *x.shape[3:])
  return tuple(x.reshape(shape(x)) for x in states)
