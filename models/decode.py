"""Decoding with a cache of keys and values.

Dimensions: B batch, T length, S cache length, V vocabulary, L layers, D
width, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import attention, block, layers
from models import config as config_lib


class Cache(NamedTuple):
  """Keys and values of the tokens so far.

  Attributes:
    keys: `[L, B, S, G, K]` in the compute dtype, rotated.
    values: `[L, B, S, G, K]`.
    length: int32 scalar, how many of the S positions are filled.
  """

  keys: jax.Array
  values: jax.Array
  length: jax.Array


def init_cache(cfg: config_lib.Config, batch: int, max_length: int) -> Cache:
  """An empty cache for `batch` sequences of at most `max_length` tokens.

  Raises:
    ValueError: `batch` or `max_length` is below 1.
  """
  for name, value in (("batch", batch), ("max_length", max_length)):
    if value < 1:
      raise ValueError(f"{name}: got {value}; allowed: at least 1")
  shape = (cfg.num_layers, batch, max_length, cfg.kv_heads, cfg.key_size)
  zeros = jnp.zeros(shape, jnp.dtype(cfg.compute_dtype))
  return Cache(zeros, zeros, jnp.zeros((), jnp.int32))


def decode_step(
  params: Any, cache: Cache, tokens_t: jax.Array, *, cfg: config_lib.Config
) -> tuple[jax.Array, Cache]:
  """Logits of the token after `tokens_t`, and the cache with it appended.

  Past the cache's length the result is undefined: nothing checks it, for the
  length is a traced value.

  Args:
    params: as for `transformer.apply`.
    cache: of the tokens before.
    tokens_t: int `[B]`.
    cfg: the model.

  Returns:
    float32 logits `[B, V]` and the new cache.
  """
  return prefill(params, cache, tokens_t[:, None], cfg=cfg)


def prefill(
  params: Any, cache: Cache, tokens: jax.Array, *, cfg: config_lib.Config
) -> tuple[jax.Array, Cache]:
  """Appends a whole `[B, T]` of tokens; `decode_step` for T tokens at once.

  Returns:
    float32 logits `[B, V]` of the token after the last, and the new cache.

  Raises:
    ValueError: T is 0 or exceeds the cache.
  """
  length, capacity = tokens.shape[1], cache.keys.shape[2]
  if not 1 <= length <= capacity:
    raise ValueError(
      f"tokens: got a length of {length}; allowed: 1 to max_length={capacity}"
    )
  positions = cache.length + jnp.arange(length)
  cos, sin = layers.rope_table(positions, cfg.key_size, cfg.rope_theta)
  mask = (jnp.arange(capacity) <= positions[:, None])[None]
  x = block.embed(params, tokens, cfg)

  def body(x, layer):
    p, keys, values = layer
    q, k, v = block.project(x, p, cfg, cos, sin)
    start = (0, cache.length, 0, 0)
    keys = jax.lax.dynamic_update_slice(keys, k, start)
    values = jax.lax.dynamic_update_slice(values, v, start)
    y = attention.attention(q, keys, values, mask=mask)
    x = x + block.merge_heads(y, p)
    return x + block.feed_forward(x, p, cfg), (keys, values)

  x, (keys, values) = jax.lax.scan(
    body, x, (params["layers"], cache.keys, cache.values)
  )
  x = layers.rms_norm(x[:, -1], params["final_norm"], cfg.norm_eps)
  logits = block.logits(x, params, cfg)
  return logits, Cache(keys, values, cache.length + length)
