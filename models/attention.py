"""Softmax attention with grouped heads, dense and sparse.

Dimensions: B batch, T query length, S key length, H query heads, G key/value
heads (G divides H: query head h reads key head `h // (H / G)`), K head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as ops
from jaxlib_ext import meshes
from models import config as config_lib
from models import layers

# Finite, so that a row with nothing to attend to gives no NaN.
_MASKED = -1e30
_MIN_BLOCK = 128
_MAX_BLOCKS = 8
# From here on chunks of keys are as fast as whole rows, in far less memory.
_LONG = 4096


def mix(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  cfg: config_lib.Config,
  position: int,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """The causal self-attention of a layer.

  Args:
    q: `[B, T, H, K]`, rotated.
    k: `[B, T, G, K]`, rotated.
    v: `[B, T, G, K]`.
    cfg: the model.
    position: of the layer in the pattern, where one of `config.SOFTMAX` is.
    segment_ids: int `[B, T]`; a position attends only to its own segment.

  Returns:
    `[B, T, H, K]` in q's dtype.

  Raises:
    ValueError: for `segment_ids` where "window" has sinks, which are the
      first tokens of a row and not of each segment, and where "in_context"
      has a context; for a row that is no longer than this.
  """
  mixer = cfg.pattern[position]
  if mixer == "full":
    return causal_attention(q, k, v, segment_ids=segment_ids)
  if mixer == "sparse":
    return ops.piecewise_attention(
      q,
      k,
      v,
      density=cfg.density,
      block_size=cfg.block_size,
      tail=cfg.tail,
      causal=True,
      segment_ids=segment_ids,
    )
  if mixer == "in_context":
    return _in_context(q, k, v, cfg, segment_ids)
  if segment_ids is not None and cfg.sink:
    raise ValueError(
      f"segment_ids: the mixer 'window' has sink={cfg.sink} first tokens of a "
      "row, not of each segment; allowed with segments: sink=0"
    )
  return ops.windowed_attention(
    q,
    k,
    v,
    window=np.array(cfg.window_at(position)),
    sink=cfg.sink,
    block_q=cfg.block_size,
    block_kv=cfg.block_size,
    segment_ids=segment_ids,
  )


def _in_context(q, k, v, cfg, segment_ids):
  if segment_ids is not None:
    raise ValueError(
      "segment_ids: the mixer 'in_context' has a context of a row, not of each "
      "segment; allowed: None"
    )
  if cfg.context >= q.shape[1]:
    raise ValueError(
      f"context: got {cfg.context}; allowed: less than the {q.shape[1]} tokens "
      "of a row"
    )
  return ops.in_context_attention(
    q,
    k,
    v,
    context_length=cfg.context,
    keep=cfg.keep,
    sharp=cfg.sharp,
    density=cfg.density,
    block_size=cfg.block_size,
    causal=True,
  )


def max_logits(
  q: jax.Array,
  k: jax.Array,
  *,
  cfg: config_lib.Config,
  position: int,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """The largest scaled score of each head, of those that `mix` softmaxes.

  It has no gradient. No more than the scores of a block of queries are held
  at a time.

  Args:
    q: as for `mix`, and so all others.
    k: `[B, T, G, K]`.
    cfg: the model.
    position: of the layer in the pattern. The mixers "sparse" and
      "in_context" choose among all earlier positions; the maximum is over all
      of them.
    segment_ids: int `[B, T]`.

  Returns:
    float32 `[H]`, over the batch and all positions.
  """
  q, k = (_heads_first(jax.lax.stop_gradient(x)) for x in (q, k))
  k = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
  tops = []
  for start, stop in _blocks(q.shape[2]):
    scores = _scores(q, k, segment_ids, start, stop)
    if cfg.pattern[position] == "window":
      window = np.array(cfg.window_at(position))[:, None, None]
      column = np.arange(stop)
      near = np.arange(start, stop)[:, None] - column < window
      scores = jnp.where(near | (column < cfg.sink), scores, _MASKED)
    tops.append(jnp.max(scores, axis=(0, 2, 3)))
  return jnp.max(jnp.stack(tops), axis=0)


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array
) -> jax.Array:
  """Attention under any mask, by the definition.

  Args:
    q: `[B, T, H, K]`.
    k: `[B, S, G, K]`.
    v: `[B, S, G, K]`.
    mask: as for `weigh`.

  Returns:
    `[B, T, H, K]` in q's dtype; scores and softmax are float32.
  """
  return weigh(scores(q, k), v, mask).astype(q.dtype)


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Scaled products of all queries and keys, float32 `[B, H, T, S]`."""
  b, t, h, size = q.shape
  groups = k.shape[2]
  q = q.reshape(b, t, groups, h // groups, size)
  products = jnp.einsum(
    "btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32
  )
  return products.reshape(b, h, t, k.shape[1]) * size**-0.5


def weigh(scores: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """Values by the softmax of their scores.

  Args:
    scores: float32 `[B, H, T, S]`.
    v: `[B, S, G, K]`.
    mask: bool, broadcastable to `[B, T, S]`, or of four axes to
      `[B, H, T, S]`, true where attending is allowed.

  Returns:
    `[B, T, H, K]` in float32.
  """
  b, h, t, s = scores.shape
  mask = mask[:, None] if mask.ndim == 3 else mask
  probs = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)
  groups, size = v.shape[2:]
  out = jnp.einsum(
    "bgrts,bsgk->btgrk",
    probs.astype(v.dtype).reshape(b, groups, h // groups, t, s),
    v,
    preferred_element_type=jnp.float32,
  )
  return out.reshape(b, t, h, size)


def causal_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Causal self-attention that keeps no T x T array for the backward pass.

  Query blocks see only the keys before their end, and the backward pass
  computes the probabilities again from the saved log-partition
  (arXiv:2205.14135, algorithm 4, with query blocks only). Reverse mode, and
  forward over reverse, differentiate it; forward mode alone does not.

  Args:
    q: `[B, T, H, K]`.
    k: `[B, T, G, K]`.
    v: `[B, T, G, K]`.
    segment_ids: int `[B, T]`; a position attends only to its own segment.

  Returns:
    `[B, T, H, K]` in q's dtype; scores and softmax are float32.
  """
  b, t, h, size = q.shape
  if t >= _LONG:
    return ops.full_attention(q, k, v, causal=True, segment_ids=segment_ids)
  repeat = h // k.shape[2]
  q, k, v = (_heads_first(x) for x in (q, k, v))
  if repeat > 1:
    k, v = (jnp.repeat(x, repeat, axis=1) for x in (k, v))
  out = _causal(*meshes.vary_alike(q, k, v, segment_ids))
  return jnp.swapaxes(out, 1, 2)


def _heads_first(x):
  """[B, T, H, K] to [B, H, T, K] by a copy, as in `layers.transpose`."""
  b, t, h, size = x.shape
  block = layers.block_size(t)
  x = x.reshape(b, t // block, block, h, size)
  return jnp.moveaxis(x, 3, 1).reshape(b, h, t, size)


def _blocks(length: int) -> list[tuple[int, int]]:
  block = max(_MIN_BLOCK, -(-min(length, _LONG) // _MAX_BLOCKS))
  return [(i, min(i + block, length)) for i in range(0, length, block)]


def _dot(a, b, a_axis, b_axis):
  """[B, H, ., .] by [B, H, ., .] contracting one axis of each, in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((a_axis,), (b_axis,)), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )


def _scores(q, k, segment_ids, start, stop):
  """Masked scores [B, H, stop - start, stop] of one block of queries."""
  scores = _dot(q[:, :, start:stop], k[:, :, :stop], 3, 3)
  scores = scores * q.shape[-1] ** -0.5
  mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
  if segment_ids is not None:
    own = segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
    mask = mask & own[:, None]
  return jnp.where(mask, scores, _MASKED)


@jax.custom_vjp
def _causal(q, k, v, segment_ids):
  return _causal_fwd(q, k, v, segment_ids)[0]


def _causal_fwd(q, k, v, segment_ids):
  out, log_z = [], []
  for start, stop in _blocks(q.shape[2]):
    scores = _scores(q, k, segment_ids, start, stop)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    block = _dot(weights.astype(v.dtype), v[:, :, :stop], 3, 2) / total
    out.append(block.astype(q.dtype))
    log_z.append(top + jnp.log(total))
  out = jnp.concatenate(out, axis=2)
  return out, (q, k, v, segment_ids, out, jnp.concatenate(log_z, axis=2))


def _causal_bwd(residuals, g):
  q, k, v, segment_ids, out, log_z = residuals
  length, size = q.shape[2:]
  inner = jnp.sum(
    g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True
  )
  dq, dk, dv = [], 0.0, 0.0
  for start, stop in _blocks(length):
    rows = functools.partial(
      jax.lax.slice_in_dim, start_index=start, limit_index=stop, axis=2
    )
    scores = _scores(q, k, segment_ids, start, stop)
    probs = jnp.exp(scores - rows(log_z))
    dprobs = _dot(rows(g), v[:, :, :stop], 3, 3)
    dscores = (probs * (dprobs - rows(inner))).astype(q.dtype)
    dq.append(_dot(dscores, k[:, :, :stop], 3, 2))
    pad = ((0, 0), (0, 0), (0, length - stop), (0, 0))
    dk += jnp.pad(_dot_rows(dscores, rows(q)), pad)
    dv += jnp.pad(_dot_rows(probs.astype(q.dtype), rows(g)), pad)
  scale = size**-0.5
  dq = (jnp.concatenate(dq, axis=2) * scale).astype(q.dtype)
  return dq, (dk * scale).astype(k.dtype), dv.astype(v.dtype), None


def _dot_rows(a, b):
  """`a^T b` over the query axis: [B, H, T, S], [B, H, T, K] to [B, H, S, K]."""
  return _dot(layers.transpose(a), b, 3, 2)


_causal.defvjp(_causal_fwd, _causal_bwd)
