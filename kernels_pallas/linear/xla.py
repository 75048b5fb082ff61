"""The chunked form on any platform: no Pallas, only XLA.

A scan takes the states through the chunks. Their systems are made before it,
all at once, as large batched products, and without the delta rule so is all
else but the states' decay; on CPU the systems of arrays that no cache holds
are made inside it, chunk by chunk. The backward pass keeps the inputs, the
inverses and the states that enter each chunk, and makes the systems again.
Where there is none, tokens may be walked one by one instead (`recurrent`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from kernels_pallas import meshes, padding, products, rules
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
  o, state = _RULE(options, inputs, segments)
  return o[:, :length].astype(dtype), state


class _Way(NamedTuple):
  """How a platform goes through the chunks.

  Attributes:
    chunk_size: C.
    at_once: whether the systems of all chunks are made before the walk.
    by_token: whether tokens are walked one by one, where nothing is
      differentiated.
  """

  chunk_size: int
  at_once: bool
  by_token: bool = False


def _ways(options, inputs) -> tuple[_Way, _Way]:
  """A CPU's and all others'."""
  size = math.prod(inputs.k.shape[1:])
  try:
    small = size * inputs.k.shape[0] <= _AT_ONCE
  except core.InconclusiveDimensionOperation:  # A symbolic batch.
    small = False
  cpu_size = options.cpu_chunk_size or options.chunk_size
  cpu = _Way(cpu_size, small, options.by_token)
  return cpu, _Way(options.chunk_size, True)


def _on_platform(f, ways, *args):
  """`f(way, *args)` as the platform that it is lowered for does it."""
  cpu, other = (functools.partial(f, way) for way in ways)
  if ways[0] == ways[1]:
    return cpu(*args)
  return jax.lax.platform_dependent(*args, cpu=cpu, default=other)


def _primal(options, inputs, segments):
  def run(way, inputs, segments):
    if way.by_token:
      return recurrent.run(inputs._replace(segments=segments), options)
    return _forward(way, options, inputs, segments)[0]

  return _on_platform(run, _ways(options, inputs), inputs, segments)


def _plain(options, inputs, segments):
  return _primal(dataclasses.replace(options, by_token=False), inputs, segments)


def _kept_forward(options, inputs, segments):
  """The outputs, and what the backward pass keeps, in the host's shapes.

  Shapes are fixed when a function is traced. What another platform keeps of
  its own chunks, in a function that is exported for it, goes by those shapes
  and an array of what is left over.
  """
  ways = tuple(way._replace(by_token=False) for way in _ways(options, inputs))
  shapes, spare = _host_shapes(ways, inputs, options)

  def run(way, inputs, segments):
    out, kept = _forward(way, options, inputs, segments)
    own = way.chunk_size == _host(ways).chunk_size
    return out, _repack(kept, shapes, spare, own)

  out, kept = _on_platform(run, ways, inputs, segments)
  return out, (inputs, segments, kept)


def _transposed(options, kept, cotangents):
  inputs, segments, kept = kept
  ways = tuple(way._replace(by_token=False) for way in _ways(options, inputs))

  def run(way, inputs, segments, kept, cotangents):
    if way.chunk_size != _host(ways).chunk_size:
      kept = _repack(kept, _shapes(way, inputs, options), 0, False)
    return _backward(way, options, inputs, segments, kept[:-1], cotangents)

  args = inputs, segments, kept, cotangents
  return _on_platform(run, ways, *args), None


def _host(ways):
  return ways[jax.default_backend() != "cpu"]


def _shapes(way, inputs, options):
  """Of the inverses, e and the states that enter each chunk."""
  b, t, groups, key_size = inputs.q.shape
  h, value_size = inputs.v.shape[2:]
  size = way.chunk_size
  chunks = (-(-t // size), b, groups, h // groups)
  squares = ((*chunks, size, size),) if options.delta else ()
  states = ((*chunks, key_size, value_size),) * len(inputs.state)
  return (*squares, (*chunks, size, value_size), *states)


def _host_shapes(ways, inputs, options):
  """The host's `_shapes`, and how much more of a row others keep."""
  host = _shapes(_host(ways), inputs, options)
  most = max(_per_row(_shapes(way, inputs, options)) for way in ways)
  return host, most - _per_row(host)


def _per_row(shapes):
  """Elements of one member of the batch, the second axis."""
  return sum(x[0] * math.prod(x[2:]) for x in shapes)


def _repack(arrays, shapes, spare, own):
  """Arrays in other shapes, and `[B, spare]` of what is left, or zeros.

  Args:
    arrays: `[N, B, ...]` each, or `[B, n]` the last of several.
    shapes: `[N, B, ...]` of the result.
    spare: elements of a member of the batch that have no place in `shapes`.
    own: whether the arrays have these shapes.
  """
  b = arrays[0].shape[1]
  if own:
    nothing = jnp.zeros((b, spare), arrays[0].dtype)
    return meshes.vary_alike((*arrays, nothing))
  rows = [
    (x if x.ndim == 2 else jnp.moveaxis(x, 1, 0)).reshape(b, -1) for x in arrays
  ]
  flat = jnp.concatenate(rows, axis=1)
  wanted = _per_row(shapes) + spare
  flat = jnp.pad(flat, ((0, 0), (0, max(0, wanted - flat.shape[1]))))
  out, start = [], 0
  for n, _, *rest in shapes:
    end = start + n * math.prod(rest)
    out.append(jnp.moveaxis(flat[:, start:end].reshape(b, n, *rest), 0, 1))
    start = end
  return (*out, flat[:, start : start + spare])


def _arranged(way, inputs, segments):
  """The padded inputs as the chunk algebra takes them.

  Returns:
    What systems are made of and v as `pieces`, chunks in front; the state;
    and the segments, which nothing flows into.
  """
  size = way.chunk_size
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


def _forward(way, options, inputs, segments):
  (tokens, v, state), seg = _arranged(way, inputs, segments)
  at_once = way.at_once

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
  kept = (inverses,) if options.delta else ()
  return (layout.tokens(o, length), final), (*kept, e, *entered)


def _backward(way, options, inputs, segments, kept, cotangents):
  inverses, (e, *entered) = None, kept
  if options.delta:
    inverses, e, *entered = kept
  entered = tuple(entered)
  do, dstate = cotangents
  size, groups = way.chunk_size, inputs.q.shape[2]
  (tokens, _, _), unarrange, seg = jax.vjp(
    lambda inputs: _arranged(way, inputs, segments), inputs, has_aux=True
  )
  do = layout.pieces(padding.to_multiple(do, 1, size), size, groups)
  dstate = tuple(layout.state(x, groups) for x in dstate)
  at_once = way.at_once
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
  return dinputs


_RULE = rules.Rule(
  _primal, _kept_forward, _transposed, plain=_plain, name="xla"
)
