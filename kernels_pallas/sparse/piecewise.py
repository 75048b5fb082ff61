"""PISA and ISA: block-sparse attention that chooses its blocks itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, padding, products
from kernels_pallas.sparse import (
  api,
  choose,
  problem,
  select,
  statistics,
)

# The share of coarse weights whose sum says how sharp a query block is.
_SHARPNESS = 0.0625


def piecewise_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  density: float | None = None,
  block_size: int = 64,
  block_q: int | None = None,
  tail: str = "mean_global",
  method: str = "topk",
  tau: float | None = None,
  top_p: float | None = None,
  max_density: float = 1.0,
  always: tuple[int | str, ...] = (),
  covariance_aware: bool = False,
  scale: float | None = None,
  causal: bool = False,
  segment_ids: jax.Array | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
  implementation: api.Implementation = None,
  interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Piecewise sparse attention (PISA, arXiv:2602.01077).

  Each query block attends exactly to the key blocks with the highest pooled
  scores and to the others through their statistics: `select_blocks`, then
  `block_sparse_attention`. Tokens that lie close together in an image should
  lie in one block (`tile`).

  Args:
    q: `[B, T, H, K]`.
    k: `[B, S, G, K]`.
    v: `[B, S, G, V]`.
    density: share of the blocks that are exact, of the method "topk"; None is
      0.15 there.
    block_size: queries and keys of a block.
    block_q: queries of a block, where they are to differ; None is
      `block_size`. With more queries to a list, each list's keys are read
      less often.
    tail: as for `block_sparse_attention`; "mean_global" is the paper's hybrid
      first order, "mean" its zeroth, "mean_local" its block-wise first.
    method: as for `select_blocks`, and so the next five; "threshold" with the
      tail "mean" is Sol-Attn (arXiv:2607.24027).
    tau: of "threshold".
    top_p: of "top_p".
    max_density: of "threshold" and "top_p".
    always: blocks of every list.
    covariance_aware: the paper's selection for images.
    scale: as for `block_sparse_attention`, and so what follows.
    causal: whether a query sees no later key.
    segment_ids: int `[B, T]`.
    sinks: float `[H]`.
    return_lse: also return the log-partition.
    implementation: which code.
    interpret: whether Pallas interprets.

  Returns:
    `[B, T, H, V]`, and on request the log-partition `[B, T, H]`.
  """
  if density is None and method == "topk":
    density = 0.15
  if block_q is None:
    block_q = block_size
  blocks = select.select_blocks(
    q,
    k,
    block_q=block_q,
    block_kv=block_size,
    method=method,
    density=density,
    tau=tau,
    top_p=top_p,
    max_density=max_density,
    always=always,
    causal=causal,
    segment_ids=segment_ids,
    covariance_aware=covariance_aware,
    scale=scale,
    v=v if covariance_aware else None,
  )
  return api.block_sparse_attention(
    q,
    k,
    v,
    blocks,
    block_q=block_q,
    block_kv=block_size,
    tail=tail,
    scale=scale,
    causal=causal,
    segment_ids=segment_ids,
    sinks=sinks,
    return_lse=return_lse,
    implementation=implementation,
    interpret=interpret,
  )


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

  Args:
    q: `[B, T, H, K]`, target first.
    k: `[B, T, G, K]`.
    v: `[B, T, G, V]`.
    context_length: how many of the T tokens, the last ones, are context.
    keep: share of the context blocks that stay, in (0, 1]; at least one.
    sharp: share of the query blocks with full attention, in [0, 1].
    density: share of the blocks that stay which the others attend to exactly.
    block_size: tokens of a block.
    residual: float, broadcastable to `[B, T, H]`: adds this share of the
      coarse attention's output to every token of a block, a learned gate in
      the paper, 0 at its start. None adds nothing.
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
  b, t, heads = _check_sequence(q, k, v, context_length)
  keep = choose.check_share("keep", keep)
  sharp = choose.check_share("sharp", sharp, zero=True)
  density = choose.check_share("density", density)
  block_size = api.check_block("block_size", block_size)
  options = problem.Options(
    scale=arguments.check_scale(scale, jnp.shape(q)[-1]),
    block_q=block_size,
    block_kv=block_size,
    tail="mean",
    interpret=interpret,
  )
  if residual is not None:
    residual = _gate(residual, (b, t, heads))
  q, k, v = api.common(q, k, v)
  target = t - context_length
  blocks = _cut(q, k, v, target, block_size)
  num_target = problem.num_blocks(target, block_size)

  mean_q, mean_k = (
    statistics.mean(x, blocks.lengths) for x in (blocks.q, blocks.k)
  )
  coarse = jax.nn.softmax(
    select.pooled_scores(mean_q, mean_k, options.scale), axis=-1
  )
  weights = jax.lax.stop_gradient(coarse)
  kept = _kept(weights, num_target, keep)
  order, number = _order(weights, num_target, sharp)
  k, v, lengths = (
    _take(x, kept)
    for x in (
      blocks.k,
      blocks.v,
      jnp.broadcast_to(blocks.lengths, weights.shape[:3]),
    )
  )
  pooled_k = jax.lax.stop_gradient(_take(mean_k, kept))
  everywhere = jnp.ones((1, 1, 1, kept.shape[-1]), bool)
  parts = []
  for chosen, share in (
    (order[..., :number], 1.0),
    (order[..., number:], density),
  ):
    if chosen.shape[-1]:
      pooled_q = jax.lax.stop_gradient(_take(mean_q, chosen))
      scores = select.pooled_scores(pooled_q, pooled_k, options.scale)
      parts.append(
        _attend(
          _take(blocks.q, chosen),
          (k, v, lengths),
          choose.best(scores, everywhere, share),
          options,
          implementation,
        )
      )
  out = _take(jnp.concatenate(parts, axis=2), jnp.argsort(order, axis=-1))
  out = _join(out, target, t)
  if residual is not None:
    mean_v = statistics.mean(blocks.v, blocks.lengths)
    pooled = products.einsum("bhij,bhjv->bhiv", coarse, mean_v)
    added = jnp.broadcast_to(pooled[..., None, :], blocks.v.shape)
    out = out + residual[..., None] * _join(added, target, t)
  return out.astype(v.dtype)


def _check_sequence(q, k, v, context_length) -> tuple[int, int, int]:
  """(B, T, H), with a target and a context of at least one token."""
  b, t, s, heads, _ = api.sizes(q, k, v)
  if t != s:
    raise ValueError(f"k must have as many tokens as q, T = {t}, got S = {s}")
  if (
    isinstance(context_length, bool)
    or not isinstance(context_length, int)
    or not 0 < context_length < t
  ):
    raise ValueError(
      f"context_length must be an int from 1 to T - 1 = {t - 1}, got "
      f"{context_length!r}"
    )
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


def _cut(q, k, v, target, size):
  """The two parts in blocks, zero where a block has no token."""
  heads = q.shape[2]
  lengths = []
  for length in (target, q.shape[1] - target):
    whole, rest = divmod(length, size)
    lengths += [size] * whole + [rest] * bool(rest)

  def cut(x):
    x = jnp.repeat(jnp.swapaxes(x, 1, 2), heads // x.shape[2], axis=1)
    parts = jnp.split(x, [target], axis=2)
    padded = [padding.to_multiple(part, 2, size) for part in parts]
    return statistics.split(jnp.concatenate(padded, axis=2), size)

  return _Blocks(cut(q), cut(k), cut(v), jnp.asarray(lengths, jnp.int32))


def _join(x, target, length):
  """[B, H, N, block, V] to [B, T, H, V]."""
  b, h, _, size, width = x.shape
  x = x.reshape(b, h, -1, width)
  start = problem.num_blocks(target, size) * size
  parts = x[:, :, :target], x[:, :, start : start + length - target]
  return jnp.swapaxes(jnp.concatenate(parts, axis=2), 1, 2)


def _take(x, numbers):
  """[B, H, N, ..] at [B, H, n] of block numbers."""
  numbers = numbers.reshape(*numbers.shape, *(1,) * (x.ndim - 3))
  return jnp.take_along_axis(x, numbers, axis=2)


def _kept(weights, num_target, keep):
  """The target's blocks and the best of the context's: [B, H, n]."""
  b, h, num, _ = weights.shape
  importance = jnp.sum(weights[:, :, :num_target, num_target:], axis=2)
  number = max(1, int(choose.rounded(keep, num - num_target)))
  _, best = jax.lax.top_k(importance, number)
  best = jnp.sort(best, axis=-1) + num_target
  own = jnp.broadcast_to(jnp.arange(num_target), (b, h, num_target))
  return jnp.concatenate([own, best], axis=-1)


def _order(weights, num_target, sharp):
  """Query blocks, the sharpest first, [B, H, N], and how many are sharp."""
  top = max(1, int(_SHARPNESS * num_target))
  best, _ = jax.lax.top_k(weights[..., :num_target], top)
  sharpness = jnp.sum(best, axis=-1)
  order = jnp.argsort(-sharpness, axis=-1)
  return order, int(sharp * order.shape[-1] + 0.5)


def _attend(q, keys, blocks, options, implementation):
  """[B, H, n, block, K] queries to [B, H, n, block, V]."""
  flat = lambda x: jnp.swapaxes(x.reshape(*x.shape[:2], -1, x.shape[-1]), 1, 2)
  k, v, lengths = keys
  inputs = problem.Inputs(
    flat(q), flat(k), flat(v), blocks.indices, blocks.counts, lengths
  )
  out = api.attend(inputs, options, None, False, implementation)
  out = jnp.swapaxes(out, 1, 2)
  return out.reshape(*q.shape[:-1], out.shape[-1])
