"""Token by token: one for decoding, all where a CPU is faster so.

Unlike `reference`, which stays the plain definition, a token's products with
the states are ordered to read them as seldom as XLA can: with the delta rule
what is read out and what is erased come from the old state in one pass,

    o = q^T (a S) + (q . k) e

without it the output comes from the new state, in the pass that makes it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.linear import problem

States = tuple[jax.Array, ...]


def faster(inputs: problem.Inputs, *, delta: bool) -> bool:
  """Whether a CPU walks forward faster by tokens than by chunks.

  It does with decays per channel, which cost a chunk an exponential for
  each channel and pair of blocks, until the state is much larger than what
  it is updated with; and without the delta rule with small states (0.7 to 1.3
  of the chunks' time, most often less).
  """
  key, value = inputs.q.shape[-1], inputs.v.shape[-1]
  if inputs.log_decay.ndim == 4:
    return key <= 128
  return not delta and key * value <= 64 * 64


def run(
  inputs: problem.Inputs, options: problem.Options
) -> tuple[jax.Array, States]:
  """Walks over the tokens.

  Args:
    inputs: the arrays.
    options: `scale` and `delta` are used.

  Returns:
    o, `[B, T, H, V]` in the states' dtype, and the states after the last
    token.
  """
  first = lambda x: jnp.moveaxis(x, 1, 0)
  tokens = jax.tree.map(first, inputs._replace(state=None, segments=None))
  segments = inputs.segments

  def walk(state, piece):
    token, fresh = piece
    if fresh is not None:
      fresh = fresh[:, None, None, None]
      state = tuple(jnp.where(fresh, 0.0, x) for x in state)
    o, state = advance(token, state, scale=options.scale, delta=options.delta)
    return state, o

  if segments is not None:
    # The state that enters belongs to segment 0.
    segments = first(jnp.diff(segments, axis=1, prepend=0) != 0)
  state, o = jax.lax.scan(walk, inputs.state, (tokens, segments))
  return jnp.moveaxis(o, 0, 1), state


def advance(
  token: problem.Inputs, state: States, *, scale: float, delta: bool
) -> tuple[jax.Array, States]:
  """Takes the states past one token.

  Args:
    token: `Inputs` without the T axis; `state` and `segments` are not used.
    state: M arrays `[B, H, K, V]`.
    scale: multiplies q.
    delta: whether values are corrected by what the state predicts.

  Returns:
    o, `[B, H, V]`, and the new states.
  """
  s = state[0]
  repeat = token.v.shape[1] // token.q.shape[1]
  heads = lambda x: jnp.repeat(x.astype(s.dtype), repeat, axis=1)
  q, k = heads(token.q) * scale, heads(token.k)
  e = token.v.astype(s.dtype)
  decay = jnp.exp(token.log_decay)
  if decay.ndim == 2:
    decay = decay[..., None]
  if not delta:
    new = decay[..., None] * s + k[..., None] * e[..., None, :]
    return _rows(q[:, :, None], new)[:, :, 0], (new,)
  p = decay * k if token.p is None else heads(token.p)
  both = _rows(jnp.stack([decay * q, p], axis=2), s)
  o, e = both[:, :, 0], e - both[:, :, 1]
  beta = token.beta[..., None]
  if token.log_momentum is None:
    e = beta * e
    new = (decay[..., None] * s + k[..., None] * e[..., None, :],)
  else:
    e = token.eta[..., None] * e
    momentum = jnp.exp(token.log_momentum)[..., None]
    kept = beta * momentum
    o = o + kept * _rows(q[:, :, None], state[1])[:, :, 0]
    n = momentum[..., None] * state[1] + k[..., None] * e[..., None, :]
    new = (decay[..., None] * s + beta[..., None] * n, n)
    e = beta * e
  return o + jnp.sum(q * k, axis=-1, keepdims=True) * e, new


def _rows(rows, state):
  """`[B, H, J, K]` by `[B, H, K, V]`."""
  return jnp.einsum("bhjk,bhkv->bhjv", rows, state, precision="highest")
