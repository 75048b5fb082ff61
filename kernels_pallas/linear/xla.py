"""The chunked form on any platform: no Pallas, only XLA.

All chunks' systems are made at once, as large batched products; a scan then
takes the states through the chunks. The backward pass keeps the inputs, the
inverses and the states that enter each chunk, and makes the systems again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.linear import chunk, inverse, layout, problem, vector


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, chunk.Columns]:
  """Computes one call of the family.

  Args:
    inputs: the arrays.
    options: the static part; `interpret` is ignored.

  Returns:
    o `[B, T, H, V]` in v's dtype and the final state, M arrays
    `[B, H, K, V]`.
  """
  length, dtype = inputs.q.shape[1], inputs.v.dtype
  segments = inputs.segments
  kind = jnp.promote_types(inputs.state[0].dtype, jnp.float32)
  inputs = jax.tree.map(
    lambda x: x.astype(kind), inputs._replace(segments=None)
  )
  o, state = _run(inputs, segments, options)
  return o[:, :length].astype(dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _run(inputs, segments, options):
  return _forward(inputs, segments, options)[0]


def _arranged(inputs, segments, options):
  """The padded inputs as the chunk algebra takes them, v as `pieces`."""
  size = options.chunk_size
  inputs = layout.pad(inputs._replace(segments=segments), size)
  groups = inputs.q.shape[2]
  arrange = lambda x: None if x is None else layout.chunks(x, size, groups)
  return (
    arrange(inputs.q),
    arrange(inputs.k),
    arrange(inputs.p),
    layout.gates(inputs, size, groups),
    layout.pieces(inputs.v, size, groups),
    tuple(layout.state(x, groups) for x in inputs.state),
    layout.segments(inputs.segments, size),
  )


def _system(q, k, p, gates, segments, options):
  if gates.log_decay is not None and gates.log_decay.shape[-1] > 1:
    build = vector.vector_system
  else:
    build = chunk.scalar_system
  return build(
    q, k, p, gates, segments, scale=options.scale, delta=options.delta
  )


def _forward(inputs, segments, options):
  q, k, p, gates, v, state, seg = _arranged(inputs, segments, options)
  system = _system(q, k, p, gates, seg, options)
  inverses = None
  if options.delta:
    inverses = inverse.unit_lower_inverse(system.lower)

  def walk(state, piece):
    system, inverse, v = piece
    o, e, new = chunk.step(system, inverse, layout.heads_first(v), state)
    return new, (layout.tokens_first(o), e, state)

  pieces = system._replace(lower=None), inverses, v
  state, (o, e, entered) = jax.lax.scan(walk, state, pieces)
  length = inputs.q.shape[1]
  b, h = inputs.v.shape[0], inputs.v.shape[2]
  final = tuple(x.reshape(b, h, *x.shape[-2:]) for x in state)
  residuals = inputs, segments, inverses, e, entered
  return (layout.tokens(o, length), final), residuals


def _backward(options, residuals, cotangents):
  inputs, segments, inverses, e, entered = residuals
  do, dstate = cotangents
  size, groups = options.chunk_size, inputs.q.shape[2]

  def make(inputs):
    q, k, p, gates, v, state, seg = _arranged(inputs, segments, options)
    return _system(q, k, p, gates, seg, options), v, state

  (system, _, _), pullback = jax.vjp(make, inputs)
  do = layout.pieces(
    jnp.pad(do, ((0, 0), (0, -do.shape[1] % size), (0, 0), (0, 0))),
    size,
    groups,
  )
  dstate = tuple(layout.state(x, groups) for x in dstate)

  def walk(dstate, piece):
    system, inverse, e, entered, do = piece
    dsystem, dv, dstate = chunk.step_vjp(
      system,
      inverse,
      e,
      entered,
      layout.heads_first(do),
      dstate,
      row_sum=chunk.row_sum_by_product,
    )
    return dstate, (dsystem, layout.tokens_first(dv))

  pieces = system._replace(lower=None), inverses, e, entered, do
  dstate, (dsystem, dv) = jax.lax.scan(walk, dstate, pieces, reverse=True)
  (dinputs,) = pullback((dsystem, dv, dstate))
  return dinputs, None


_run.defvjp(_forward, _backward)
