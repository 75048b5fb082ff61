"""Drawing continuations of a prompt."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_ext import meshes
from kernels_pallas import arguments
from models import config as config_lib
from models import decode, ids


def sample(
  key: jax.Array,
  params: Any,
  prompt: jax.Array,
  *,
  cfg: config_lib.Config,
  steps: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """Continues each prompt by `steps` tokens.

  The prompt is read in one pass, the rest is one compiled scan.

  Args:
    key: of the draws.
    params: as for `transformer.apply`.
    prompt: int `[B, T]`, T at least 1; an array or nested lists.
    cfg: the model.
    steps: how many tokens to add.
    temperature: divides the logits; 0, and what float32 rounds to 0 or has
      no normal number for, takes the likeliest token.
    top_k: keep only the k likeliest tokens; 0 keeps all.
    top_p: keep the smallest set of likeliest tokens whose probability
      reaches this (arXiv:1904.09751, section 3.1); 1 keeps all. Applied after
      `temperature` and `top_k`.

  Returns:
    int32 `[B, steps]`, without the prompt.

  Raises:
    TypeError: the prompt is not of integers.
    ValueError: an argument out of its range, a known token of the prompt that
      is not in the vocabulary among them.
  """
  prompt = _prompt(prompt, cfg.vocab_size)
  _check("steps", _whole(steps) and steps >= 1, steps, "at least 1")
  _check(
    "temperature",
    _real(temperature) and 0 <= temperature < math.inf,
    temperature,
    "0 or a positive number",
  )
  _check("top_k", _whole(top_k) and top_k >= 0, top_k, "0 or more")
  _check(
    "top_p", _real(top_p) and 0 < top_p <= 1, top_p, "above 0 and at most 1"
  )
  top_k = min(int(top_k), cfg.vocab_size)
  # What float32 can divide by: subnormal numbers are zero in arithmetic.
  limits = jnp.finfo(jnp.float32)
  tiny, largest = float(limits.tiny), float(limits.max)
  temperature = float(min(temperature, largest))
  greedy = temperature < tiny
  return _sample(
    key,
    params,
    prompt,
    jnp.float32(1.0 if greedy else temperature),
    jnp.float32(max(top_p, tiny)),
    cfg=cfg,
    steps=int(steps),
    greedy=greedy,
    top_k=top_k,
    nucleus=top_p < 1,
  )


@functools.partial(
  jax.jit, static_argnames=("cfg", "steps", "greedy", "top_k", "nucleus")
)
@meshes.automatic(
  "key",
  "params",
  "prompt",
  "temperature",
  "top_p",
  batch="prompt",
  out_specs=lambda *, prompt, **_: meshes.batch_spec(prompt),
)
def _sample(
  key, params, prompt, temperature, top_p, *, cfg, steps, greedy, top_k, nucleus
):
  def draw(key, logits):
    if greedy:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Of the largest, 0, whatever it is divided by: the others may overflow.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = truncate(
      logits / temperature, top_k=top_k, top_p=top_p if nucleus else None
    )
    return jax.random.categorical(key, logits).astype(jnp.int32)

  batch, length = prompt.shape
  # The last token drawn is never fed back.
  cache = decode.init_cache(cfg, batch, length + steps - 1)
  logits, cache = decode.prefill(params, cache, prompt, cfg=cfg)
  keys = jax.random.split(key, steps)
  first = draw(keys[0], logits)

  def body(carry, key):
    cache, token = carry
    logits, cache = decode.decode_step(params, cache, token, cfg=cfg)
    token = draw(key, logits)
    return (cache, token), token

  _, rest = jax.lax.scan(body, (cache, first), keys[1:])
  return jnp.concatenate([first[:, None], rest.T], axis=1)


def truncate(
  logits: jax.Array, *, top_k: int = 0, top_p: Any = None
) -> jax.Array:
  """Sets the logits that sampling must not choose to minus infinity.

  Args:
    logits: `[..., V]`.
    top_k: keep the k largest (and what equals the k-th); 0 keeps all.
    top_p: keep the largest whose summed probability, before each, is below
      this; None keeps all.

  Returns:
    `[..., V]`.
  """
  if top_k:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None:
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.where(before < top_p, ordered, jnp.inf)
    least = jnp.min(kept, axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def _prompt(prompt: Any, size: int) -> Any:
  """The prompt as an array, none of whose ids JAX has cut to 32 bits."""
  prompt = arguments.integers("prompt", prompt)
  shape = tuple(prompt.shape)
  _check("prompt", len(shape) == 2 and min(shape) >= 1, shape,
         "a shape [batch, length], both at least 1")  # fmt: skip
  ids.check("prompt", prompt, size)
  return prompt


def _whole(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _real(value: Any) -> bool:
  return _whole(value) or isinstance(value, float | np.floating)


def _check(name: str, ok: bool, got: Any, allowed: str) -> None:
  if not ok:
    raise ValueError(f"{name}: got {got!r}; allowed: {allowed}")
