"""The pooled tail by itself, forward and backward, in plain JAX.

Its work is 1 / block_kv of dense attention's. Every implementation shares the
backward pass, and those whose kernel does not pool share the forward pass: the
two parts of a softmax are merged by their log-partitions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import meshes, products
from kernels_pallas.sparse import problem

# Scores held at once, in elements per (B, H): small enough for a cache.
_SCORES = 1 << 18


class _Rows(NamedTuple):
  """Some query blocks: grouped heads `[.., B, G, R, ..]`, R = H / G.

  Attributes:
    q: `[B, G, R, n, block_q, K]`.
    bias: `[B, G, R, n, NK]`.
    segments: int32 `[B, n, block_q]` or None.
    slope: `[B, G, 1 or n, K, V]` or None.
  """

  q: jax.Array
  bias: jax.Array
  segments: jax.Array | None
  slope: jax.Array | None


def forward(
  exact: problem.Exact, tail: problem.Tail, options: problem.Options
) -> tuple[jax.Array, jax.Array]:
  """Attention to the pooled keys alone.

  Returns:
    The output `[B, H, NQ * block_q, V]` and the log-partition `[B, H, NQ *
    block_q]`, about `MASKED` where nothing is pooled, in the tail's dtype.
  """

  def body(_, rows):
    scores, _ = _scores(rows, tail, options)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _values(weights / total, rows, tail, options)
    return None, (out, (top + jnp.log(total))[..., 0])

  _, (out, lse) = jax.lax.scan(body, None, _rows(exact, tail, options))
  return _join(out, exact), _join(lse[..., None], exact)[..., 0]


def backward(
  exact: problem.Exact,
  tail: problem.Tail,
  options: problem.Options,
  lse: jax.Array,
  g: jax.Array,
  delta: jax.Array,
) -> tuple[jax.Array, problem.Tail]:
  """What flows into the queries and into the pooled keys.

  Args:
    exact: the problem.
    tail: the pooled keys.
    options: the static choices.
    lse: `[B, H, NQ * block_q]`, of the whole softmax.
    g: `[B, H, NQ * block_q, V]`, the output's cotangent.
    delta: `[B, H, NQ * block_q]`, the row sums of output times cotangent,
      less the log-partition's cotangent.

  Returns:
    The queries' part `[B, H, NQ * block_q, K]` and a `Tail` of cotangents;
    that of the bias is zero.
  """
  shape = lambda x: _blocked(x, exact, tail, options)
  per_row = (
    shape(lse[..., None]),
    shape(g.astype(lse.dtype)),
    shape(delta[..., None]),
  )
  zero = jax.tree.map(
    jnp.zeros_like, tail._replace(bias=None, segments=None, slope=None)
  )
  zero, _ = meshes.vary_alike((zero, lse))

  def body(total, xs):
    rows, (lse, g, delta) = xs
    dq, grads, dslope = _row_gradients(rows, tail, options, lse, g, delta)
    return jax.tree.map(jnp.add, total, grads), (dq, dslope)

  rows = _rows(exact, tail, options)
  total, (dq, dslope) = jax.lax.scan(body, zero, (rows, per_row))
  if tail.slope is not None:
    if tail.slope.shape[2] == 1:
      dslope = jnp.sum(dslope, axis=0)
    else:
      dslope = jnp.moveaxis(dslope, 0, 2).reshape(tail.slope.shape)
  total = total._replace(bias=jnp.zeros_like(tail.bias), slope=dslope)
  return _join(dq, exact), total


def _row_gradients(rows, tail, options, lse, g, delta):
  """(dq, cotangents of k, v, variance and local, cotangent of slope)."""
  scale = options.scale
  scores, free = _scores(rows, tail, options)
  probs = jnp.exp(scores - lse)
  inner = products.einsum("bgrnqv,bgjv->bgrnqj", g, tail.v)
  grads = problem.Tail(
    k=None, v=products.einsum("bgrnqj,bgrnqv->bgjv", probs, g), bias=None
  )
  dq, dslope = 0.0, None
  if tail.slope is not None:
    # slope^T q meets every pooled key alike: it sees only their total weight.
    share = jnp.sum(probs, axis=-1, keepdims=True)
    turned = products.einsum("bgrnqv,bgnkv->bgrnqk", g, _all(rows.slope, rows))
    inner = inner + scale * jnp.sum(rows.q * turned, axis=-1, keepdims=True)
    dq = scale * share * turned
    dslope = scale * products.einsum("bgrnqk,bgrnqv->bgnkv", share * rows.q, g)
    if rows.slope.shape[2] == 1:
      dslope = jnp.sum(dslope, axis=2, keepdims=True)
  if tail.local is not None:
    turned = products.einsum("bgrnqv,bgjkv->bgrnqjk", g, tail.local)
    inner = inner + scale * products.einsum(
      "bgrnqk,bgrnqjk->bgrnqj", rows.q, turned
    )
    dq = dq + scale * products.einsum("bgrnqj,bgrnqjk->bgrnqk", probs, turned)
    outer = scale * probs[..., None] * rows.q[..., None, :]
    grads = grads._replace(
      local=products.einsum("bgrnqjk,bgrnqv->bgjkv", outer, g)
    )
  dscores = probs * (inner - delta)
  dq = dq + scale * products.einsum("bgrnqj,bgjk->bgrnqk", dscores, tail.k)
  dk = scale * products.einsum("bgrnqj,bgrnqk->bgjk", dscores, rows.q)
  if tail.variance is not None:
    dfree = jnp.where(free, dscores, 0.0) * scale**2
    dq = dq + rows.q * products.einsum(
      "bgrnqj,bgjk->bgrnqk", dfree, tail.variance
    )
    dvar = products.einsum("bgrnqj,bgrnqk->bgjk", dfree, jnp.square(rows.q)) / 2
    grads = grads._replace(variance=dvar)
  return dq, grads._replace(k=dk), dslope


def _scores(rows, tail, options):
  """Scores [B, G, R, n, block_q, NK], and where the cumulant is not cut."""
  scores = (
    products.einsum("bgrnqk,bgjk->bgrnqj", rows.q, tail.k) * options.scale
  )
  free = None
  if tail.variance is not None:
    cumulant = products.einsum(
      "bgrnqk,bgjk->bgrnqj", jnp.square(rows.q), tail.variance
    )
    cumulant = cumulant * (options.scale**2 / 2)
    free = cumulant < problem.MAX_CUMULANT
    scores = scores + jnp.where(free, cumulant, problem.MAX_CUMULANT)
  # The bias is added where it is a weight, and replaces where it is a mask:
  # rows that see nothing must not be told apart by their scores.
  visible = rows.bias > problem.MASKED / 2
  visible = visible[..., None, :]
  if tail.segments is not None:
    own = rows.segments[..., None] == tail.segments[:, None, None]
    visible = visible & own[:, None, None]
  scores = scores + rows.bias[..., None, :]
  return jnp.where(visible, scores, problem.MASKED), free


def _values(probs, rows, tail, options):
  """Weighted values [B, G, R, n, block_q, V]."""
  out = products.einsum("bgrnqj,bgjv->bgrnqv", probs, tail.v)
  if tail.slope is not None:
    first = products.einsum(
      "bgrnqk,bgnkv->bgrnqv", rows.q, _all(rows.slope, rows)
    )
    out = out + options.scale * first
  if tail.local is not None:
    weighted = probs[..., None] * rows.q[..., None, :]
    out = out + options.scale * products.einsum(
      "bgrnqjk,bgjkv->bgrnqv", weighted, tail.local
    )
  return out


def _all(slope, rows):
  """The slope of each block of queries."""
  b, g, _, n = rows.q.shape[:4]
  return jnp.broadcast_to(slope, (b, g, n, *slope.shape[3:]))


def _per_step(exact, tail, options):
  """How many query blocks a step takes: a divisor of NQ."""
  num_q = exact.counts.shape[2]
  width = tail.k.shape[2] * (1 if tail.local is None else tail.k.shape[3])
  most = max(1, _SCORES // (options.block_q * width))
  return max(n for n in range(1, min(num_q, most) + 1) if num_q % n == 0)


def _blocked(x, exact, tail, options):
  """[B, H, NQ * block_q, w] to [steps, B, G, R, n, block_q, w]."""
  n = _per_step(exact, tail, options)
  b, h, length, width = x.shape
  g = exact.k.shape[1]
  x = x.reshape(b, g, h // g, -1, n, options.block_q, width)
  return jnp.moveaxis(x, 3, 0)


def _rows(exact, tail, options):
  """The problem's `_Rows`, steps in front; a slope that all share is there
  once in each."""
  n = _per_step(exact, tail, options)
  b, h, num_q, num_kv = tail.bias.shape
  g = exact.k.shape[1]
  steps = num_q // n
  q = _blocked(exact.q, exact, tail, options).astype(tail.k.dtype)
  bias = tail.bias.reshape(b, g, h // g, steps, n, num_kv)
  segments = slope = None
  if tail.segments is not None:
    segments = exact.q_segments.reshape(b, steps, n, options.block_q)
    segments = jnp.moveaxis(segments, 1, 0)
  if tail.slope is not None:
    size = tail.slope.shape[3:]
    if tail.slope.shape[2] == 1:
      slope = jnp.broadcast_to(tail.slope, (steps, b, g, 1, *size))
    else:
      slope = jnp.moveaxis(tail.slope.reshape(b, g, steps, n, *size), 2, 0)
  return _Rows(q, jnp.moveaxis(bias, 3, 0), segments, slope)


def _join(x, exact):
  """[steps, B, G, R, n, block_q, w] to [B, H, NQ * block_q, w]."""
  b, h, length = exact.q.shape[:3]
  return jnp.moveaxis(x, 0, 3).reshape(b, h, length, x.shape[-1])
