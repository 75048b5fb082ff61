"""The chunked form on any platform: no Pallas, only XLA.

A scan takes the states through the chunks. Their systems are made before it,
all at once, as large batched products, and without the delta rule so is all
else but the states' decay; on CPU the systems of arrays that no cache holds
are made inside it, chunk by chunk. The backward pass keeps the inputs, the
inverses and the states that enter each chunk, and makes the systems again.
Where there is none, tokens may be walked one by one instead (`recurrent`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import meshes, padding, products
from kernels_pallas.linear import (
  chunk,
  inverse,
  layout,
  problem,
  recurrent,
  vector,
)

# Elements of the keys up to which a CPU makes all systems at once. Beyond it,
# chunk by chunk takes the same time (0.7 to 1.1 of it) and less memory: 0.7
# of MDN's gradient, 0.3 of KDA's.
_AT_ONCE = 1 << 20


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
  if options.by_token:
    return recurrent.run(inputs._replace(segments=segments), options)
  return _forward(inputs, segments, options)[0]


def _arranged(inputs, segments, options):
  """The padded inputs as the chunk algebra takes them.

  Returns:
    What systems are made of and v as `pieces`, chunks in front; the state;
    and the segments, which nothing flows into.
  """
  size = options.chunk_size
  inputs = layout.pad(inputs._replace(segments=segments), size)
  groups = inputs.q.shape[2]
  arrange = lambda x: None if x is None else layout.chunks(x, size, groups)
  tokens = (
    arrange(inputs.q),
    arrange(inputs.k),
    arrange(inputs.p),
    layout.gates(inputs, size, groups),
  )
  v = layout.pieces(inputs.v, size, groups)
  state = tuple(layout.state(x, groups) for x in inputs.state)
  return (tokens, v, state), layout.segments(inputs.segments, size)


def _at_once(inputs):
  """Whether the systems of all chunks are made before the walk."""
  return jax.default_backend() != "cpu" or inputs.k.size <= _AT_ONCE


def _system(tokens, segments, options):
  q, k, p, gates = tokens
  if gates.log_decay is not None and gates.log_decay.shape[-1] > 1:
    build = vector.vector_system
  else:
    build = chunk.scalar_system
  system = build(
    q, k, p, gates, segments, scale=options.scale, delta=options.delta
  )
  # Constants among it too: its cotangents vary.
  return meshes.vary_alike(system)


def _solved(tokens, segments, options):
  """The system of one chunk or of all, and the inverse of its I + L."""
  system = _system(tokens, segments, options)
  inverses = None
  if options.delta:
    inverses = inverse.unit_lower_inverse(system.lower)
  return system._replace(lower=None), inverses


def _carried(system, added, state, reverse=False):
  """Takes a state, or its cotangent, past chunks that do not ask for it.

  Args:
    system: of all chunks, without the delta rule.
    added: `[N, ..., K, V]`, by each chunk.
    state: one `[..., K, V]`.
    reverse: whether the last chunk comes first.

  Returns:
    The state after all chunks, and one `[N, ..., K, V]`, that before each.
  """

  def walk(state, piece):
    decay, added = piece
    return (decay * state[0] + added,), state

  pieces = system.decay[0][0], added
  return jax.lax.scan(walk, state, pieces, reverse=reverse)


def _forward(inputs, segments, options):
  (tokens, v, state), seg = _arranged(inputs, segments, options)
  at_once = _at_once(inputs)

  def walk(state, piece):
    made, v = piece
    system, inverses = made if at_once else _solved(*made, options)
    o, e, new = chunk.step(system, inverses, layout.heads_first(v), state)
    return new, (layout.tokens_first(o), inverses, e, state)

  made = _solved(tokens, seg, options) if at_once else (tokens, seg)
  if at_once and not options.delta:
    system, inverses = made
    e = layout.heads_first(v)
    (added,) = chunk.write(system, e, None)
    state, entered = _carried(system, added, state)
    o = layout.tokens_first(chunk.read(system, e, entered))
  else:
    state, (o, inverses, e, entered) = jax.lax.scan(walk, state, (made, v))
  length = inputs.q.shape[1]
  b, h = inputs.v.shape[0], inputs.v.shape[2]
  final = tuple(x.reshape(b, h, *x.shape[-2:]) for x in state)
  residuals = inputs, segments, inverses, e, entered
  return (layout.tokens(o, length), final), residuals


def _backward(options, residuals, cotangents):
  inputs, segments, inverses, e, entered = residuals
  do, dstate = cotangents
  size, groups = options.chunk_size, inputs.q.shape[2]
  (tokens, _, _), unarrange, seg = jax.vjp(
    lambda inputs: _arranged(inputs, segments, options), inputs, has_aux=True
  )
  do = layout.pieces(padding.to_multiple(do, 1, size), size, groups)
  dstate = tuple(layout.state(x, groups) for x in dstate)
  at_once = _at_once(inputs)
  transpose = functools.partial(
    chunk.step_vjp, row_sum=chunk.row_sum_by_product
  )

  def build(tokens, seg):
    system, pullback = jax.vjp(lambda x: _system(x, seg, options), tokens)
    return system._replace(lower=None), lambda dsystem: pullback(dsystem)[0]

  def walk(dstate, piece):
    made, inverses, e, entered, do = piece
    system, pullback = (made, lambda x: x) if at_once else build(*made)
    do = layout.heads_first(do)
    dsystem, dv, dstate = transpose(system, inverses, e, entered, do, dstate)
    return dstate, (pullback(dsystem), layout.tokens_first(dv))

  made = tokens, seg
  if at_once:
    made, pullback = build(tokens, seg)
  if at_once and not options.delta:
    do = layout.heads_first(do)
    asked = products.dot(made.q, made.q_scale[0] * do, ta=True)
    dstate, leaving = _carried(made, asked, dstate, reverse=True)
    dtokens, dv, _ = transpose(made, inverses, e, entered, do, leaving)
    dv = layout.tokens_first(dv)
  else:
    pieces = made, inverses, e, entered, do
    dstate, (dtokens, dv) = jax.lax.scan(walk, dstate, pieces, reverse=True)
  if at_once:
    dtokens = pullback(dtokens)
  (dinputs,) = unarrange((dtokens, dv, dstate))
  return dinputs, None


_run.defvjp(_forward, _backward)
