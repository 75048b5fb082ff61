"""Scores of key blocks for query blocks, from tokens that are finite."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import products
from kernels_pallas.sparse import problem, statistics

# Added to a norm before its logarithm, as PISA does.
_NORM_EPS = 1e-5


class Scored(NamedTuple):
  """The blocks of a padded problem, scored by their finite tokens.

  Attributes:
    scores: `[B, H, NQ, NK]`; may overflow.
    odd: bool `[B, H, 1, NK]`, whether a block has a key or value that is not
      finite.
    mean_q: `[B, H, NQ, K]`.
    mean_k: `[B, G, NK, K]`.
    k: `[B, G, NK, block_kv, K]`, 0 where a token is not finite.
    v: `[B, G, NK, block_kv, V]`, likewise.
    real: bool `[B, G, NK, block_kv]`, which tokens exist and are finite.
  """

  scores: jax.Array
  odd: jax.Array
  mean_q: jax.Array
  mean_k: jax.Array
  k: jax.Array
  v: jax.Array
  real: jax.Array


def score_blocks(
  exact: problem.Exact,
  options: problem.Options,
  length: int,
  *,
  error_aware: bool = False,
) -> Scored:
  """Scores key blocks by `pooled_scores` or `mean_errors`.

  Tokens that are not finite do not take part, so that they change no choice
  of queries that do not see them.

  Args:
    exact: the problem.
    options: the static choices.
    length: T.
    error_aware: which scores.
  """
  k, v = (
    statistics.split(x, options.block_kv).astype(
      jnp.promote_types(x.dtype, jnp.float32)
    )
    for x in (exact.k, exact.v)
  )
  finite = statistics.finite_rows(k) & statistics.finite_rows(v)
  real = jnp.arange(options.block_kv) < exact.lengths[..., None]
  odd = jnp.any(real & ~finite, axis=-1)
  real = real & finite
  k, v = (jnp.where(finite[..., None], x, 0) for x in (k, v))
  q = statistics.split(exact.q, options.block_q)
  asked = jnp.arange(q.shape[2] * options.block_q) < length
  asked = asked.reshape(q.shape[2:4]) & statistics.finite_rows(q)
  mean_q, mean_k = statistics.mean_of(q, asked), statistics.mean_of(k, real)
  if error_aware:
    scores = mean_errors(mean_q, mean_k, k, real, options.scale)
  else:
    scores = pooled_scores(mean_q, mean_k, options.scale)
  return Scored(scores, repeat(odd, scores), mean_q, mean_k, k, v, real)


def repeat(x: jax.Array, scores: jax.Array) -> jax.Array:
  """`[B, G, NK]` for each head: `[B, H, 1, NK]`."""
  return jnp.repeat(x, scores.shape[1] // x.shape[1], axis=1)[:, :, None]


def pooled_scores(
  mean_q: jax.Array, mean_k: jax.Array, scale: float
) -> jax.Array:
  """`[B, H, NQ, K]` by `[B, G, NK, K]` to `[B, H, NQ, NK]`."""
  b, h, num_q, size = mean_q.shape
  g = mean_k.shape[1]
  q = mean_q.reshape(b, g, h // g, num_q, size)
  scores = products.einsum("bgrqk,bgjk->bgrqj", q, mean_k) * scale
  return scores.reshape(b, h, num_q, -1)


def mean_errors(
  mean_q: jax.Array,
  mean_k: jax.Array,
  k: jax.Array,
  real: jax.Array,
  scale: float,
) -> jax.Array:
  """Log errors of blocks' mean keys for mean queries: `[B, H, NQ, NK]`.

  In units of each row's greatest weight, one query block at a time.

  Args:
    mean_q: `[B, H, NQ, K]`.
    mean_k: `[B, G, NK, K]`.
    k: `[B, G, NK, block_kv, K]`, finite.
    real: bool `[B, G, NK, block_kv]`, which of them count.
    scale: of the scores.
  """
  b, h, num_q, size = mean_q.shape
  g, num_kv = mean_k.shape[1:3]

  def row(q):
    scores = scale * products.einsum("bgrk,bgjsk->bgrjs", q, k)
    scores = jnp.where(real[:, :, None], scores, -jnp.inf)
    means = scale * products.einsum("bgrk,bgjk->bgrj", q, mean_k)
    top = jnp.max(scores, axis=(-2, -1), keepdims=True)
    away = jnp.exp(scores - top) - jnp.exp(means[..., None] - top)
    away = jnp.where(real[:, :, None], jnp.abs(away), 0)
    tiny = jnp.finfo(away.dtype).tiny
    return jnp.log(jnp.sum(away, axis=-1) + tiny)

  rows = jnp.moveaxis(mean_q.reshape(b, g, h // g, num_q, size), 3, 0)
  return jnp.moveaxis(jax.lax.map(row, rows), 0, 3).reshape(b, h, num_q, num_kv)


def gaussian_bound(
  scored: Scored, allowed: jax.Array, options: problem.Options, tau: float
) -> jax.Array:
  """Row means plus tau deviations of scores: [B, H, NQ, 1].

  From the mean and the variance per channel of the mean keys that a row
  sees, as if the channels were independent.
  """
  mean_q, mean_k = scored.mean_q, scored.mean_k
  b, h, num_q, _ = mean_q.shape
  g = mean_k.shape[1]
  weight = allowed.astype(mean_k.dtype)
  weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
  # Around the mean of all, so that the variance does not cancel.
  centre = jnp.mean(mean_k, axis=2, keepdims=True)
  # Finite, where squares overflow, for those that do not see them.
  moments = lambda x: products.einsum(
    "bgij,bgjk->bgik", weight, jnp.nan_to_num(x)
  )
  first = moments(mean_k - centre)
  variance = jnp.maximum(
    moments(jnp.square(mean_k - centre)) - jnp.square(first), 0
  )
  q = mean_q.reshape(b, g, h // g, num_q, -1)
  mean = jnp.sum(q * (first + centre)[:, :, None], axis=-1)
  spread = jnp.sum(jnp.square(q) * variance[:, :, None], axis=-1)
  scale = options.scale
  bound = scale * mean + tau * abs(scale) * jnp.sqrt(spread)
  return bound.reshape(b, h, num_q, 1)


def spread(scored: Scored) -> jax.Array:
  """log(||H_j||_F + eps) of each key block: [B, G, NK]."""
  deviation = scored.k - scored.mean_k[..., None, :]
  deviation = jnp.where(scored.real[..., None], deviation, 0)
  matrices = products.einsum("bgnsk,bgnsv->bgnkv", deviation, scored.v)
  norm = jnp.sqrt(jnp.sum(jnp.square(matrices), axis=(-2, -1)))
  return jnp.log(norm + _NORM_EPS)
