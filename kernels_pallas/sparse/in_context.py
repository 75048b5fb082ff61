"""ISA: attention to a context of which only a part is kept."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments, meshes, padding, products
from kernels_pallas.sparse import api, choose, problem, statistics
from kernels_pallas.sparse import blocks as block_lists
from kernels_pallas.sparse import scores as scoring

# The share of coarse weights whose sum says how sharp a query block is.
_SHARPNESS = 0.0625


class _Blocks(NamedTuple):
  """A sequence of two parts in blocks, heads first.

  Attributes:
    q: `[B, H, N, block, K]`.
    k: `[B, H, N, block, K]`.
    v: `[B, H, N, block, V]`.
    lengths: int32 `[N]`, tokens of each block.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  lengths: jax.Array


def in_context_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  context_length: int,
  keep: float = 0.125,
  sharp: float = 0.5,
  density: float = 0.0625,
  block_size: int = 64,
  residual: jax.Array | None = None,
  causal: bool = False,
  scale: float | None = None,
  implementation: api.Implementation = None,
  interpret: bool = False,
) -> jax.Array:
  """In-context sparse attention (ISA, arXiv:2605.04569).

  The sequence is a target followed by a context, such as the image that is
  edited. Coarse attention among the blocks' mean queries and keys decides, in
  each head: the `keep` share of context blocks to which the target's blocks
  give most weight stays, the rest is dropped; the `sharp` share of query
  blocks, those with the most weight on their best target blocks, attends
  fully to what stays; the other query blocks attend to the `density` share of
  it exactly and to the rest through its means (tail "mean").

  Both parts are cut into blocks of their own, whose last ones have their true
  lengths. Decisions have no gradient; all else, the residual included, has.

  With `causal`, a form of ours for language models, tokens are in the order of
  time: the context comes first, and none attends to a later token. The
  context attends to all of its past, the target to what is kept of the context
  and to its own past, each in two groups of query blocks as above, told apart
  by the weight on the best of the blocks that they see; the block that a query
  lies in is always exact. Decisions look at whole blocks, and what is kept at
  the whole target, so that they see more than the past. Where some are sharp,
  `xla` makes every pair of what stays and masks the rest.

  Args:
    q: `[B, T, H, K]`, target first, or last where causal.
    k: `[B, T, G, K]`.
    v: `[B, T, G, V]`.
    context_length: how many of the T tokens are context.
    keep: share of the context blocks that stay, in (0, 1]; at least one.
    sharp: share of the query blocks with full attention, in [0, 1].
    density: share of the blocks that stay which the others attend to exactly.
    block_size: tokens of a block.
    residual: float, broadcastable to `[B, T, H]`: adds this share of the
      coarse attention's output to every token of a block, a learned gate in
      the paper, 0 at its start. None adds nothing. Not with `causal`, for a
      block's means hold later tokens.
    causal: as above.
    scale: of the scores; None is K**-0.5.
    implementation: as for `block_sparse_attention`.
    interpret: whether Pallas interprets.

  Returns:
    `[B, T, H, V]` in v's dtype.

  Raises:
    TypeError: naming the argument, for dtypes that are not allowed.
    ValueError: naming the argument, for shapes and values that are not.
    NotImplementedError: where a named implementation cannot run.
  """
  b, t, heads = _check_sequence(q, k, v)
  context_length = arguments.integer(
    "context_length", context_length, 1, t - 1, "T - 1"
  )
  keep = choose.check_share("keep", keep)
  sharp = choose.check_share("sharp", sharp, zero=True)
  density = choose.check_share("density", density)
  block_size = api.check_block("block_size", block_size)
  options = problem.Options(
    scale=arguments.check_scale(scale, jnp.shape(q)[-1]),
    block_q=block_size,
    block_kv=block_size,
    tail="mean",
    causal=bool(causal),
    interpret=interpret,
  )
  if residual is not None and causal:
    raise ValueError("residual must be None where causal is True")
  if residual is not None:
    residual = _gate(residual, (b, t, heads))
  q, k, v = api.common(q, k, v)
  first = context_length if causal else t - context_length
  run = functools.partial(
    _attend, options=options, implementation=implementation
  )

  def attend(arrays):
    q, k, v, residual = (arrays[name] for name in _LAYOUT.arrays)
    blocks = _cut(q, k, v, first, block_size)
    decisions = _decide(
      blocks,
      options,
      problem.num_blocks(first, block_size),
      keep=keep,
      sharp=sharp,
      density=density,
    )
    out = (_causal if causal else _both_ways)(blocks, decisions, run)
    out = _join(out, first, t)
    if residual is not None:
      added = _join(_coarse(blocks, options), first, t)
      out = out + residual[..., None] * added
    return out.astype(v.dtype)

  arrays = dict(q=q, k=k, v=v, residual=residual)
  return meshes.run(attend, arrays, _LAYOUT)


_LAYOUT = meshes.Layout(
  arrays=dict(q="BTHK", k="BTGK", v="BTGV", residual="BTH"), out="BTHV"
)


def _coarse(blocks, options):
  """Attention among means, of every token: [B, H, N, block, V]."""
  q, k, v = (statistics.mean(x, blocks.lengths) for x in blocks[:3])
  weights = jax.nn.softmax(scoring.pooled_scores(q, k, options.scale), axis=-1)
  pooled = products.einsum("bhij,bhjv->bhiv", weights, v)
  return jnp.broadcast_to(pooled[..., None, :], blocks.v.shape)


def _decide(blocks, options, num_first, **shares):
  """`_Decisions` from what is finite."""
  size = blocks.q.shape[3]
  real = jnp.arange(size) < blocks.lengths[:, None]
  q, k = (
    statistics.mean_of(x, real & statistics.finite_rows(x))
    for x in (blocks.q, blocks.k)
  )
  scores = scoring.pooled_scores(q, k, options.scale)
  # Finite, where products overflow: no weight is NaN.
  scores = jnp.nan_to_num(jax.lax.stop_gradient(scores))
  return _Decisions(scores, num_first, **shares)


class _Decisions(NamedTuple):
  """What decides which blocks are kept, and which listed.

  Attributes:
    scores: `[B, H, N, N]`, of mean queries and keys.
    num_first: blocks of the sequence's first part.
    keep: share of the context's blocks.
    sharp: share of the query blocks.
    density: share of the keys' blocks for the other queries.
  """

  scores: jax.Array
  num_first: int
  keep: float
  sharp: float
  density: float


def _both_ways(blocks, decisions, run):
  """Target first, every token sees every other: [B, H, N, block, V]."""
  scores, num_target, keep, sharp, density = decisions
  weights = jax.nn.softmax(scores, axis=-1)
  best = _best_context(weights[:, :, :num_target, num_target:], keep)
  own = jnp.broadcast_to(jnp.arange(num_target), (*best.shape[:2], num_target))
  kept = jnp.concatenate([own, best + num_target], axis=-1)
  order, number = _order(weights, num_target, sharp)
  keys = _keys(blocks, kept)
  scores = jnp.take_along_axis(scores, kept[:, :, None], axis=3)
  everywhere = jnp.ones((1, 1, 1, kept.shape[-1]), bool)
  parts = []
  for chosen, share in (
    (order[..., :number], 1.0),
    (order[..., number:], density),
  ):
    if chosen.shape[-1]:
      lists = choose.best(_take(scores, chosen), everywhere, share)
      parts.append(run(_take(blocks.q, chosen), keys, lists))
  return _take(jnp.concatenate(parts, axis=2), jnp.argsort(order, axis=-1))


class Part(NamedTuple):
  """What some consecutive query blocks attend to, causally.

  Attributes:
    start: the first of them.
    stop: the one after the last.
    kept: int32 `[B, H, m + n]`, the m key blocks before them that are kept,
      then the n own ones.
    lists: for each of the n, of places in `kept`.
  """

  start: int
  stop: int
  kept: jax.Array
  lists: block_lists.BlockIndices


def causal_parts(
  scores: jax.Array, num_context: int, keep: float, sharp: float, density: float
) -> tuple[Part, Part]:
  """Decides what the context's and the target's query blocks attend to.

  Args:
    scores: `[B, H, N, N]`, of mean queries and keys, the context first.
    num_context: how many blocks are the context's.
    keep: as for `in_context_attention`, and so the others.
    sharp: share of the query blocks of each part.
    density: share of the key blocks for the other query blocks.
  """
  b, h, num, _ = scores.shape
  past = jnp.tril(jnp.ones((num, num), bool))
  weights = jax.nn.softmax(jnp.where(past, scores, problem.MASKED), axis=-1)
  best = _best_context(weights[:, :, num_context:, :num_context], keep)

  def part(start, stop, before):
    own = jnp.broadcast_to(jnp.arange(start, stop), (b, h, stop - start))
    kept = jnp.concatenate([before, own], axis=-1)
    rows = scores[:, :, start:stop]
    rows = jnp.take_along_axis(rows, kept[:, :, None], axis=3)
    return Part(start, stop, kept, _causal_lists(rows, sharp, density))

  return part(0, num_context, best[..., :0]), part(num_context, num, best)


def _causal(blocks, decisions, run):
  """Context first, no token sees a later one: [B, H, N, block, V]."""
  out = []
  for start, stop, kept, lists in causal_parts(*decisions):
    # Query blocks that nobody asks for, each with a list of its own block,
    # give the others their places after what is kept.
    idle = kept.shape[-1] - (stop - start)
    unasked = jnp.broadcast_to(
      jnp.arange(idle)[:, None],
      (*kept.shape[:2], idle, lists.indices.shape[-1]),
    )
    indices = jnp.concatenate([unasked, lists.indices], axis=2)
    added = ((0, 0), (0, 0), (idle, 0))
    counts = jnp.pad(lists.counts, added, constant_values=1)
    q = jnp.pad(blocks.q[:, :, start:stop], (*added, (0, 0), (0, 0)))
    lists = block_lists.BlockIndices(indices, counts)
    out.append(run(q, _keys(blocks, kept), lists)[:, :, idle:])
  return jnp.concatenate(out, axis=2)


def _causal_lists(scores, sharp, density):
  """Lists from the scores [B, H, n, m + n] of n blocks after m others."""
  n, num_kv = scores.shape[2:]
  column = jnp.arange(num_kv) - (num_kv - n)
  own = column == jnp.arange(n)[:, None]
  seen = column <= jnp.arange(n)[:, None]
  weights = jax.nn.softmax(jnp.where(seen, scores, problem.MASKED), axis=-1)
  top = np.maximum(1, _SHARPNESS * (np.arange(n) + num_kv - n + 1)).astype(int)
  best = jnp.where(
    np.arange(num_kv) < top[:, None], -jnp.sort(-weights, axis=-1), 0.0
  )
  order = jnp.argsort(-jnp.sum(best, axis=-1), axis=-1)
  number = int(sharp * n + 0.5)
  full = jnp.argsort(order, axis=-1) < number
  candidates = choose.Candidates(scores, seen, own, jnp.zeros_like(own))
  longest = num_kv if number else max(1, int(choose.rounded(density, num_kv)))
  return choose.choose(
    candidates, longest, low=density, high=1.0, wanted=full[..., None] & seen
  )


def _check_sequence(q, k, v) -> tuple[int, int, int]:
  """(B, T, H)."""
  b, t, s, heads, _ = api.sizes(q, k, v)
  if t != s:
    raise ValueError(f"k must have as many tokens as q, T = {t}, got S = {s}")
  return b, t, heads


def _gate(residual: Any, wanted: tuple[int, int, int]) -> jax.Array:
  residual = arguments.floating("residual", residual)
  try:
    return jnp.broadcast_to(residual, wanted)
  except ValueError:
    raise ValueError(
      f"residual must be broadcastable to [B, T, H] = {list(wanted)}, got "
      f"{list(residual.shape)}"
    ) from None


def _cut(q, k, v, first, size):
  """The two parts in blocks, zero where a block has no token."""
  heads = q.shape[2]
  lengths = []
  for length in (first, q.shape[1] - first):
    whole, rest = divmod(length, size)
    lengths += [size] * whole + [rest] * bool(rest)

  def cut(x):
    x = jnp.repeat(jnp.swapaxes(x, 1, 2), heads // x.shape[2], axis=1)
    parts = jnp.split(x, [first], axis=2)
    padded = [padding.to_multiple(part, 2, size) for part in parts]
    return statistics.split(jnp.concatenate(padded, axis=2), size)

  return _Blocks(cut(q), cut(k), cut(v), jnp.asarray(lengths, jnp.int32))


def _join(x, first, length):
  """[B, H, N, block, V] to [B, T, H, V]."""
  b, h, _, size, width = x.shape
  x = x.reshape(b, h, -1, width)
  start = problem.num_blocks(first, size) * size
  parts = x[:, :, :first], x[:, :, start : start + length - first]
  return jnp.swapaxes(jnp.concatenate(parts, axis=2), 1, 2)


def _take(x, numbers):
  """[B, H, N, ..] at [B, H, n] of block numbers."""
  numbers = numbers.reshape(*numbers.shape, *(1,) * (x.ndim - 3))
  return jnp.take_along_axis(x, numbers, axis=2)


def _best_context(weights, keep):
  """The context blocks with most of the target's weights: int32 [B, H, n]."""
  importance = jnp.sum(weights, axis=2)
  number = max(1, int(choose.rounded(keep, importance.shape[-1])))
  _, best = jax.lax.top_k(importance, number)
  return jnp.sort(best, axis=-1)


def _keys(blocks, kept):
  """Keys, values and lengths of the blocks that are kept."""
  lengths = jnp.broadcast_to(blocks.lengths, blocks.k.shape[:3])
  return tuple(_take(x, kept) for x in (blocks.k, blocks.v, lengths))


def _order(weights, num_target, sharp):
  """Query blocks, the sharpest first, [B, H, N], and how many are sharp."""
  top = max(1, int(_SHARPNESS * num_target))
  best, _ = jax.lax.top_k(weights[..., :num_target], top)
  sharpness = jnp.sum(best, axis=-1)
  order = jnp.argsort(-sharpness, axis=-1)
  return order, int(sharp * order.shape[-1] + 0.5)


def _attend(q, keys, lists, *, options, implementation):
  """[B, H, n, block, K] queries to [B, H, n, block, V]."""
  flat = lambda x: jnp.swapaxes(x.reshape(*x.shape[:2], -1, x.shape[-1]), 1, 2)
  k, v, lengths = keys
  inputs = problem.Inputs(
    flat(q), flat(k), flat(v), lists.indices, lists.counts, lengths
  )
  out = api.attend(inputs, options, None, False, implementation)
  out = jnp.swapaxes(out, 1, 2)
  return out.reshape(*q.shape[:-1], out.shape[-1])
