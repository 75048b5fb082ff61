"""Dense attention in chunks, in plain JAX, with a log-partition.

What sparse attention is compared with, and the parts of other methods that
are dense: the online softmax of arXiv:2205.14135 (algorithm 1) over chunks of
keys, for one chunk of queries after the other, and a backward pass that
computes the probabilities again. Memory is linear in T and S. Causal, a chunk
of queries meets the chunks of keys up to its own only, in both directions.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, derivatives, meshes, padding
from kernels_pallas.sparse import api, core, problem, reference

# The largest chunks, and the scores held at once for all heads: where they
# are many, chunks shrink until the scores stay in a cache.
_CHUNK_Q = 512
_CHUNK_KV = 1024
_SCORES = 1 << 22
_LEAST = 128


def full_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool = False,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  lengths: jax.Array | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Softmax attention, exact, without a T x S array.

  Arguments, dtypes and errors are `api`'s, and so is what becomes of NaN and
  of divided arrays.

  Args:
    q: `[B, T, H, K]`, K up to 256.
    k: `[B, S, G, K]`.
    v: `[B, S, G, V]`.
    causal: whether a query sees no later key; needs T = S.
    scale: multiplies the scores; None is K**-0.5.
    segment_ids: int `[B, T]`; a query sees keys of its own id.
    lengths: int `[B]`, how many keys exist, the first ones; None is S.
    return_lse: also return the log-partition.
    implementation: None or "xla", or "reference", which has a T x S array and
      derivatives in forward mode.

  Returns:
    `[B, T, H, V]` in v's dtype, and on request the log-partition
    `[B, T, H]`, float32 or float64, 0 and -1e30 where no key is seen. Both
    can be differentiated, in reverse mode, and these derivatives in any.
  """
  b, t, s, heads, groups = api.sizes(q, k, v)
  causal = api.check_causal(causal, t, s)
  segments = api.check_segments(segment_ids, b, t, s)
  scale = arguments.check_scale(scale, q.shape[-1])
  if lengths is not None:
    lengths = check_lengths("lengths", lengths, b, s, "S")
  if implementation not in (None, "xla", "reference"):
    raise ValueError(
      "implementation must be None, 'xla' or 'reference', got "
      f"{implementation!r}"
    )
  compute = _by_definition if implementation == "reference" else _in_chunks
  q, k, v = api.common(q, k, v)

  def run(arrays):
    q, k, v, segments, lengths = (arrays[name] for name in _LAYOUT.arrays)
    if causal or segments is not None or lengths is not None:
      k, v = core.contained(k, v)
    return compute(q, k, v, segments, lengths, scale=scale, causal=causal)

  arrays = dict(q=q, k=k, v=v, segment_ids=segments, lengths=lengths)
  out, lse = meshes.run(run, arrays, _LAYOUT)
  return (out, lse) if return_lse else out


_LAYOUT = meshes.Layout(
  arrays=dict(q="BTHK", k="BSGK", v="BSGV", segment_ids="BT", lengths="B"),
  out=("BTHV", "BTH"),
)


def _by_definition(q, k, v, segments, lengths, *, scale, causal):
  """Of one block, which every query lists."""
  one = jnp.ones((q.shape[0], q.shape[2], 1), jnp.int32)
  if lengths is not None:
    lengths = jnp.broadcast_to(
      lengths[:, None, None], (k.shape[0], k.shape[2], 1)
    )
  inputs = problem.Inputs(
    q, k, v, one[..., None] - 1, one, lengths=lengths, segments=segments
  )
  options = problem.Options(scale, q.shape[1], k.shape[1], causal=causal)
  return reference.run(inputs, options)


def _in_chunks(q, k, v, segments, lengths, *, scale, causal):
  """As the module says: out `[B, T, H, V]` and lse `[B, T, H]`."""
  b, t, heads, size = q.shape
  s, groups = k.shape[1:3]
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  q = q.reshape(b, groups, heads // groups, t, size)
  options = _Options(scale, causal, *_chunks(b * heads, heads // groups, t, s))
  arrays = meshes.vary_alike((q, k, v, segments, lengths))
  out, lse = _attend(options, *derivatives.reverse_only(arrays, _REMEDY))
  join = lambda x: jnp.swapaxes(x.reshape(b, heads, t, *x.shape[4:]), 1, 2)
  return join(out).astype(v.dtype), join(lse)


_REMEDY = "use implementation='reference'"


def check_lengths(
  name: str, x: Any, b: int, most: int, letter: str
) -> jax.Array:
  """Lengths as int32 `[B]`.

  Raises:
    TypeError: unless they are integers.
    ValueError: for another shape, and where they are known beyond 0 to `most`,
      which is `letter`.
  """
  x = arguments.integers(name, x)
  arguments.check_shape(name, x, (b,), "B")
  arguments.check_range(name, x, most, letter)
  return jnp.asarray(arguments.saturated(x, most))


class _Options(NamedTuple):
  """The static choices.

  Attributes:
    scale: of the scores.
    causal: whether a query sees no later key.
    chunk_q: queries of a chunk.
    chunk_kv: keys of a chunk.
    skip: whether chunks of later keys only are left out, in loops of computed
      length, rather than masked.
  """

  scale: float
  causal: bool
  chunk_q: int
  chunk_kv: int
  skip: bool = True


def _chunks(rows, repeat, t, s):
  """Sizes of the chunks: as large as they may be, and of even sizes."""
  if not isinstance(rows, int):  # Symbolic, and so of any size.
    rows = _SCORES
  # The heads that share a key head are rows of the same product.
  most_q, most_kv = max(_LEAST, _CHUNK_Q // repeat), _CHUNK_KV
  while rows * most_q * most_kv > _SCORES and max(most_q, most_kv) > _LEAST:
    if most_q > _LEAST and most_kv <= 2 * most_q:
      most_q = max(_LEAST, most_q // 2)
    else:
      most_kv = max(_LEAST, most_kv // 2)

  def even(length, most):
    size = -(-length // problem.num_blocks(length, most))
    # Whole vectors of any processor.
    return size if length <= most else -(-size // 16) * 16

  return even(t, most_q), even(s, most_kv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, segments, lengths):
  """q `[B, G, R, T, K]`, k, v `[B, G, S, .]` to out `[B, G, R, T, V]`, lse."""
  return _pass(_forward, options)(q, k, v, segments, lengths)


def _attend_fwd(options, *inputs):
  out, lse = _pass(_forward, options)(*inputs)
  return (out, lse), (*inputs, out.astype(inputs[2].dtype), lse)


def _attend_bwd(options, residuals, cotangents):
  return *_pass(_backward, options)(*residuals, *cotangents), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _pass(f, options):
  """`f` of arrays, which may be differentiated again."""
  fast = functools.partial(f, options)
  if not options.causal:
    return fast
  slow = functools.partial(f, options._replace(skip=False))
  return derivatives.differentiable_as(fast, slow)


def _forward(options, q, k, v, segments, lengths):
  length, dtype = q.shape[3], jnp.promote_types(q.dtype, jnp.float32)
  keys = _Keys.of(k, v, segments, lengths, options)

  def chunk(_, xs):
    number, q, own = xs
    shape = q.shape[:-1]
    init = (
      jnp.zeros((*shape, v.shape[-1]), dtype),
      jnp.full((*shape, 1), problem.MASKED, dtype),
      jnp.zeros((*shape, 1), dtype),
    )
    *init, _ = meshes.vary_alike((*init, q))

    def meet(j, carry):
      out, top, total = carry
      _, v, _ = keys.chunk(j, options)
      scores = _scores(number, j, q, own, keys, options)
      # The result does not depend on it.
      best = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
      new = jnp.maximum(top, best)
      weights = jnp.exp(scores - new)
      shrink = jnp.exp(top - new)
      total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
      return out * shrink + _rows_dot(weights.astype(v.dtype), v, 2), new, total

    out, top, total = jax.lax.fori_loop(
      0, _reach(number, keys, options), meet, tuple(init)
    )
    return None, (out / total, top + jnp.log(total))

  _, (out, lse) = jax.lax.scan(chunk, None, _queries(q, segments, options))
  return core.merge([(_join(out, length), _join(lse, length)[..., 0])])


def _backward(options, q, k, v, segments, lengths, out, lse, g, dlse):
  lse, delta = core.row_statistics(out, lse, g, dlse)
  keys = _Keys.of(k, v, segments, lengths, options)
  rows = lambda x: _split(x, options.chunk_q, 3)

  def chunk(grads, xs):
    (number, q, own), g, lse, delta = xs
    narrow = g.astype(v.dtype)

    def meet(j, carry):
      dq, dk, dv = carry
      k, v, at = keys.chunk(j, options)
      probs = jnp.exp(_scores(number, j, q, own, keys, options) - lse)
      inner = _rows_dot(narrow, v, 3)
      ds = (probs * (inner - delta) * options.scale).astype(k.dtype)
      dq = dq + _rows_dot(ds, k, 2)
      dk = _add(dk, at, _columns_dot(ds, q))
      dv = _add(dv, at, _columns_dot(probs.astype(k.dtype), narrow))
      return dq, dk, dv

    init = (meshes.vary_alike((jnp.zeros(q.shape, lse.dtype), q))[0], *grads)
    reach = _reach(number, keys, options)
    dq, *grads = jax.lax.fori_loop(0, reach, meet, init)
    return tuple(grads), dq

  zero = tuple(jnp.zeros(x.shape, lse.dtype) for x in (keys.k, keys.v))
  *zero, _ = meshes.vary_alike((*zero, q))
  xs = (
    _queries(q, segments, options),
    rows(g),
    rows(lse[..., None]),
    rows(delta[..., None]),
  )
  (dk, dv), dq = jax.lax.scan(chunk, tuple(zero), xs)
  cut = lambda x, like: x[:, :, : like.shape[2]].astype(like.dtype)
  dq = _join(dq, q.shape[3]).astype(q.dtype)
  return dq, cut(dk, k), cut(dv, v)


class _Keys(NamedTuple):
  """Keys and values in whole chunks.

  Attributes:
    k: `[B, G, NK * chunk_kv, K]`.
    v: `[B, G, NK * chunk_kv, V]`.
    segments: int32 `[B, NK * chunk_kv]` or None.
    lengths: int32 `[B]` or None.
    length: S.
  """

  k: jax.Array
  v: jax.Array
  segments: jax.Array | None
  lengths: jax.Array | None
  length: int

  @classmethod
  def of(cls, k, v, segments, lengths, options):
    pad = lambda x, axis: padding.to_multiple(x, axis, options.chunk_kv)
    if segments is not None:
      segments = pad(segments, 1)
    return cls(pad(k, 2), pad(v, 2), segments, lengths, k.shape[2])

  def chunk(self, j, options):
    """Keys and values of chunk j, and where they start."""
    at, size = j * options.chunk_kv, options.chunk_kv
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, size, 2)
    return cut(self.k), cut(self.v), at


def _scores(i, j, q, own, keys, options):
  """Masked scores `[B, G, R, chunk_q, chunk_kv]` of two chunks."""
  k, _, at = keys.chunk(j, options)
  scores = _rows_dot(q, k, 3) * options.scale
  visible = _visible(i, at, own, keys, options)
  if visible is None:
    return scores
  return jnp.where(visible, scores, problem.MASKED)


def _visible(i, at, own, keys, options):
  """Which keys from `at` queries see, as the scores; None is all."""
  column = at + jnp.arange(options.chunk_kv)
  masks = []
  if options.causal:
    # Hides what pads the keys too, from every query that exists.
    row = i * options.chunk_q + jnp.arange(options.chunk_q)
    masks.append(column <= row[:, None])
  elif keys.length % options.chunk_kv:
    masks.append(column < keys.length)
  if keys.lengths is not None:
    masks.append((column < keys.lengths[:, None])[:, None, None, None])
  if own is not None:
    ids = jax.lax.dynamic_slice_in_dim(keys.segments, at, options.chunk_kv, 1)
    masks.append((own[..., None] == ids[:, None])[:, None, None])
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _reach(i, keys, options):
  """How many chunks of keys a chunk of queries meets."""
  total = keys.k.shape[2] // options.chunk_kv
  if not (options.causal and options.skip):
    return total
  last = (i + 1) * options.chunk_q - 1
  return jnp.minimum(last // options.chunk_kv + 1, total)


def _queries(q, segments, options):
  """The chunks of queries: their numbers, values and segments."""
  chunks = _split(q, options.chunk_q, 3)
  own = None if segments is None else _split(segments, options.chunk_q, 1)
  return jnp.arange(chunks.shape[0]), chunks, own


def _split(x, size, axis):
  """Padded to whole chunks along an axis, the chunks in front."""
  x = padding.to_multiple(x, axis, size)
  shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis, 0)


def _join(x, length):
  """`[NQ, B, G, R, chunk_q, w]` to `[B, G, R, length, w]`."""
  x = jnp.moveaxis(x, 0, 3)
  return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :length]


def _dot(a, b, a_axis, b_axis):
  """`[B, G, ., .]` by the same, contracting one axis of each."""
  return jax.lax.dot_general(
    a,
    b,
    (((a_axis,), (b_axis,)), ((0, 1), (0, 1))),
    precision="highest",
    preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
  )


def _flat(x):
  """`[B, G, R, n, w]` to `[B, G, R * n, w]`."""
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _rows_dot(a, b, b_axis):
  """`[B, G, R, n, .]` by `[B, G, ., .]` over the last axis of a."""
  return _dot(_flat(a), b, 3, b_axis).reshape(*a.shape[:4], -1)


def _columns_dot(a, b):
  """`a^T b` over heads that share keys and rows: `[B, G, ., .]`."""
  return _dot(_flat(a), _flat(b), 2, 2)


def _add(total, at, x):
  old = jax.lax.dynamic_slice_in_dim(total, at, x.shape[2], 2)
  return jax.lax.dynamic_update_slice_in_dim(total, old + x, at, 2)
