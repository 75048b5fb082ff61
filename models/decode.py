"""Decoding with a cache of what each layer remembers.

Softmax attention keeps keys and values, all of them or as a policy has it
(`models.cache_policies`), a linear mixer a state of constant size. The mixer
"window" keeps its window and its first tokens; "sparse" and "in_context" read
all keys there are, for one query has no block of queries to choose for.

Dimensions: B batch, T length, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_ext import meshes
from kernels_pallas import arguments
from models import block, cache_policies, layers, mixers, stack
from models import config as config_lib


class Cache(NamedTuple):
  """What the layers remember of the tokens so far.

  Attributes:
    states: by position of the mixer pattern, the `cache_policies.Entry` or
      the `mixers.State` of its layers, stacked in front.
    length: int32 scalar, how many tokens that is.
  """

  states: tuple[Any, ...]
  length: jax.Array


def init_cache(
  cfg: config_lib.Config,
  batch: int,
  max_length: int,
  *,
  policy: cache_policies.Policy | None = None,
) -> Cache:
  """An empty cache for `batch` sequences of at most `max_length` tokens.

  Where no layer keeps every token, its size, and how far decoding may go, do
  not depend on `max_length`.

  Args:
    cfg: the model.
    batch: B.
    max_length: at least 1.
    policy: what the layers "full", "sparse" and "in_context" keep; None is
      everything.

  Returns:
    The cache, which knows its policies: decoding needs not be told.

  Raises:
    ValueError: `batch` or `max_length` is below 1.
  """
  for name, value in (("batch", batch), ("max_length", max_length)):
    if value < 1:
      raise ValueError(f"{name}: got {value}; allowed: at least 1")
  everything = policy or cache_policies.Full()

  def state(position, mixer):
    if mixer in config_lib.LINEAR:
      one = mixers.init_state(mixer, cfg, batch)
    else:
      own = everything
      if mixer == "window":
        own = cache_policies.Window(cfg.window_at(position), cfg.sink)
      one = cache_policies.Entry(own.init(cfg, batch, max_length), own)
    return _repeat(one, cfg.layers_at(position))

  states = tuple(state(*entry) for entry in enumerate(cfg.pattern))
  return Cache(states, jnp.zeros((), jnp.int32))


def _repeat(tree, n):
  """`n` copies of each array, stacked."""
  # One array each: two that were one could not both be donated.
  return jax.tree.map(
    lambda x: jnp.array(jnp.broadcast_to(x, (n, *x.shape))), tree
  )


def cache_bytes(
  cfg: config_lib.Config,
  length: int,
  *,
  policy: cache_policies.Policy | None = None,
) -> int:
  """Bytes of what is kept of one sequence of `length` tokens."""
  cache = jax.eval_shape(lambda: init_cache(cfg, 1, length, policy=policy))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.states))


def decode_step(
  params: Any, cache: Cache, tokens_t: jax.Array, *, cfg: config_lib.Config
) -> tuple[jax.Array, Cache]:
  """Logits of the token after `tokens_t`, and the cache with it appended.

  Args:
    params: as for `transformer.apply`.
    cache: of the tokens before.
    tokens_t: int `[B]`.
    cfg: the model.

  Returns:
    float32 logits `[B, V]` and the new cache. Past the cache's `max_length`
    the logits are NaN, where `cache.length` is traced.

  Raises:
    ValueError: `cache.length` is known and its `max_length` is reached.
  """
  return prefill(params, cache, tokens_t[:, None], cfg=cfg)


def _prefill_specs(*, params, cache, tokens, cfg):
  logits = PartitionSpec(
    meshes.spec(tokens)[0], block.vocab_axes(params, tokens, cfg)
  )
  kept = jax.tree.map(lambda x: PartitionSpec(*meshes.spec(x)), cache)
  return logits, kept


@meshes.automatic(
  "params", "cache", "tokens", batch="tokens", out_specs=_prefill_specs
)
def prefill(
  params: Any, cache: Cache, tokens: jax.Array, *, cfg: config_lib.Config
) -> tuple[jax.Array, Cache]:
  """Appends a whole `[B, T]` of tokens; `decode_step` for T tokens at once.

  Returns:
    float32 logits `[B, V]` of the token after the last, and the new cache. The
    logits are NaN where the cache turns out too short for its traced length.

  Raises:
    ValueError: T is 0 or exceeds what is known to be left of the cache.
  """
  length = tokens.shape[1]
  capacity = _capacity(cache)
  _check_room(length, capacity, cache.length)
  positions = cache.length + jnp.arange(length)
  rotation = layers.rope_table(positions, cfg.key_size, cfg.rope_theta)
  x = block.embed(params, tokens, cfg)

  def body(position, x, entry):
    p, state = entry
    mixer, y = cfg.pattern[position], block.norm(x, p, cfg)
    if mixer in config_lib.LINEAR:
      y, state = mixers.apply(mixer, y, p, cfg, state=state)
    else:
      new = cache_policies.New(
        y, block.project(y, p, cfg), rotation, cache.length
      )
      y, kept = state.policy.attend(state.state, new, p, cfg)
      state = cache_policies.Entry(kept, state.policy)
      y = block.merge_heads(y, p)
    x = x + y
    return x + block.feed_forward(x, p, cfg), state

  stacks = zip(stack.split(params["layers"], cfg), cache.states, strict=True)
  x, states = stack.walk(body, x, tuple(stacks), cfg, scan=True)
  x = block.final_norm(x[:, -1], params, cfg)
  logits = block.logits(x, params, cfg)
  if capacity is not None:
    # The last slots have been written over: no answer but a visible one.
    logits = jnp.where(cache.length + length <= capacity, logits, jnp.nan)
  return logits, Cache(states, cache.length + length)


def _check_room(length, capacity, used):
  """Refuses tokens that a cache has no room for, where `used` is known."""
  if capacity is None:
    if length < 1:
      raise ValueError(f"tokens: got a length of {length}; allowed: at least 1")
    return
  used = int(used) if arguments.known(used) else 0
  if not 1 <= length <= capacity - used:
    full = f" less the {used} that the cache holds" if used else ""
    raise ValueError(
      f"tokens: got a length of {length}; allowed: 1 to max_length={capacity}"
      f"{full}"
    )


def _capacity(cache):
  """How many tokens every layer has room for; None is any number."""
  found = [
    entry.policy.capacity(entry.state)
    for entry in cache.states
    if isinstance(entry, cache_policies.Entry)
  ]
  return min((n for n in found if n is not None), default=None)
