"""Decoding with a cache of what each layer remembers.

Softmax attention keeps the keys and values of every token, a linear mixer a
state of constant size. Dimensions: B batch, T length, S cache length, V
vocabulary, L layers, D width, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import attention, block, layers, mixers, stack
from models import config as config_lib


class KeysValues(NamedTuple):
  """What softmax attention keeps.

  Attributes:
    keys: `[L, B, S, G, K]` in the compute dtype, rotated.
    values: `[L, B, S, G, K]`.
  """

  keys: jax.Array
  values: jax.Array


class Cache(NamedTuple):
  """What the layers remember of the tokens so far.

  Attributes:
    states: by position of the mixer pattern, the `KeysValues` or the
      `mixers.State` of its layers, stacked in front.
    length: int32 scalar, how many tokens that is.
  """

  states: tuple[Any, ...]
  length: jax.Array


def init_cache(cfg: config_lib.Config, batch: int, max_length: int) -> Cache:
  """An empty cache for `batch` sequences of at most `max_length` tokens.

  Without softmax attention its size, and how far decoding may go, do not
  depend on `max_length`.

  Raises:
    ValueError: `batch` or `max_length` is below 1.
  """
  for name, value in (("batch", batch), ("max_length", max_length)):
    if value < 1:
      raise ValueError(f"{name}: got {value}; allowed: at least 1")

  def state(position, mixer):
    n = cfg.layers_at(position)
    if mixer == "full":
      shape = (n, batch, max_length, cfg.kv_heads, cfg.key_size)
      dtype = jnp.dtype(cfg.compute_dtype)
      # Two buffers: one could not be donated as both.
      return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return jax.tree.map(
      lambda x: jnp.zeros((n, *x.shape), x.dtype),
      mixers.init_state(mixer, cfg, batch),
    )

  states = tuple(state(*entry) for entry in enumerate(cfg.pattern))
  return Cache(states, jnp.zeros((), jnp.int32))


def cache_bytes(cfg: config_lib.Config, length: int) -> int:
  """Bytes of what is kept of one sequence of `length` tokens."""
  cache = jax.eval_shape(lambda: init_cache(cfg, 1, length))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.states))


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
  length = tokens.shape[1]
  kept = [s for s in cache.states if isinstance(s, KeysValues)]
  capacity = kept[0].keys.shape[2] if kept else max(length, 1)
  if not 1 <= length <= capacity:
    raise ValueError(
      f"tokens: got a length of {length}; allowed: 1 to max_length={capacity}"
    )
  rotation = mask = None
  if kept:
    positions = cache.length + jnp.arange(length)
    rotation = layers.rope_table(positions, cfg.key_size, cfg.rope_theta)
    mask = (jnp.arange(capacity) <= positions[:, None])[None]
  x = block.embed(params, tokens, cfg)

  def body(mixer, x, entry):
    p, state = entry
    if mixer == "full":
      q, k, v = block.project(x, p, cfg, *rotation)
      start = (0, cache.length, 0, 0)
      keys = jax.lax.dynamic_update_slice(state.keys, k, start)
      values = jax.lax.dynamic_update_slice(state.values, v, start)
      state = KeysValues(keys, values)
      y = attention.attention(q, keys, values, mask=mask)
      y = block.merge_heads(y, p)
    else:
      y, state = mixers.apply(mixer, block.norm(x, p, cfg), p, cfg, state=state)
    x = x + y
    return x + block.feed_forward(x, p, cfg), state

  stacks = zip(stack.split(params["layers"], cfg), cache.states, strict=True)
  x, states = stack.walk(body, x, tuple(stacks), cfg, scan=True)
  x = layers.rms_norm(x[:, -1], params["final_norm"], cfg.norm_eps)
  logits = block.logits(x, params, cfg)
  return logits, Cache(states, cache.length + length)
