"""The recurrences, token by token: slow, and nothing but their definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import meshes
from kernels_pallas.linear import problem


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Walks over the tokens; differentiable by JAX itself.

  Args:
    inputs: the arrays.
    options: `scale` and `delta` are used.

  Returns:
    o, `[B, T, H, V]` in v's dtype, and the states after the last token.
  """
  b, t = inputs.v.shape[:2]
  state = inputs.state
  dtype = state[0].dtype
  repeat = inputs.v.shape[2] // inputs.q.shape[2]
  heads = lambda x: (
    None if x is None else jnp.repeat(x.astype(dtype), repeat, axis=2)
  )
  segments = inputs.segments
  if segments is None:
    segments = jnp.zeros((b, t), jnp.int32)
  tokens = dict(
    q=heads(inputs.q) * options.scale,
    k=heads(inputs.k),
    p=heads(inputs.p),
    v=inputs.v.astype(dtype),
    log_decay=inputs.log_decay,
    log_momentum=inputs.log_momentum,
    beta=inputs.beta,
    eta=inputs.eta,
    segment=segments,
  )
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)

  def walk(carry, token):
    state, segment = carry
    fresh = (token["segment"] != segment)[:, None, None, None]
    state = tuple(jnp.where(fresh, 0.0, x) for x in state)
    state = _update(state, token, options.delta)
    o = jnp.einsum("bhkv,bhk->bhv", state[0], token["q"], precision="highest")
    return (state, token["segment"]), o

  start = (state, jnp.zeros((b,), jnp.int32))
  start, tokens = meshes.vary_alike((start, tokens))
  (state, _), o = jax.lax.scan(walk, start, tokens)
  return jnp.moveaxis(o, 0, 1).astype(inputs.v.dtype), state


def _update(state, token, delta):
  """The states after a token, `[B, H, K, V]` each."""
  s, k, e = state[0], token["k"], token["v"]
  decay = jnp.exp(token["log_decay"])
  if decay.ndim == 2:
    decay = decay[..., None]
  if delta:
    p = decay * k if token["p"] is None else token["p"]
    e = e - jnp.einsum("bhkv,bhk->bhv", s, p, precision="highest")
  written = k[..., None] * e[..., None, :]
  weight = lambda name: token[name][..., None, None]
  decayed = decay[..., None] * s
  if token["log_momentum"] is not None:
    momentum = jnp.exp(weight("log_momentum"))
    n = momentum * state[1] + weight("eta") * written
    return decayed + weight("beta") * n, n
  if delta:
    written = weight("beta") * written
  return (decayed + written,)
