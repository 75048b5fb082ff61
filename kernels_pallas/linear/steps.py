"""One token at a time, for decoding: each op's `_step`.

A step takes the state that the parallel function returned, and returns what
that function would have returned for one more token. Arrays lack the parallel
function's T axis: q, k and erase keys are `[B, G, K]`, v and o `[B, H, V]`,
gates `[B, H]` (`[B, H, K]` per channel), states `[B, H, K, V]`. Dtypes and
errors are the parallel functions'.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import arguments
from kernels_pallas.linear import api, problem, recurrent


def momentum_delta_rule_step(
  state: api.MomentumState,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None,
  log_momentum: jax.Array,
  beta: jax.Array,
  eta: jax.Array,
  *,
  erase_key: jax.Array | None = None,
  scale: float | None = None,
) -> tuple[jax.Array, api.MomentumState]:
  """One token of `momentum_delta_rule`.

  Args:
    state: two arrays `[B, H, K, V]`.
    q: `[B, G, K]`.
    k: `[B, G, K]`.
    v: `[B, H, V]`.
    log_decay: `[B, H]`, or None for no decay.
    log_momentum: `[B, H]`.
    beta: `[B, H]`.
    eta: `[B, H]`.
    erase_key: `[B, G, K]`; None is the decay times k.
    scale: multiplies q; None is K**-0.5.

  Returns:
    o, `[B, H, V]` in v's dtype, and the new state.
  """
  o, state = _step(
    (q, k, erase_key, v),
    dict(log_decay=log_decay, log_momentum=log_momentum, beta=beta, eta=eta),
    state,
    scale,
    delta=True,
    required=("log_momentum", "beta", "eta"),
    fields=api.MomentumState._fields,
  )
  return o, api.MomentumState(*state)


def gated_delta_rule_step(
  state: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None,
  beta: jax.Array,
  *,
  erase_key: jax.Array | None = None,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token of `gated_delta_rule`.

  Args:
    state: `[B, H, K, V]`.
    q: `[B, G, K]`.
    k: `[B, G, K]`.
    v: `[B, H, V]`.
    log_decay: `[B, H]`, or None for no decay.
    beta: `[B, H]`.
    erase_key: `[B, G, K]`; None is the decay times k.
    scale: multiplies q; None is K**-0.5.

  Returns:
    o, `[B, H, V]` in v's dtype, and the new state.
  """
  o, (state,) = _step(
    (q, k, erase_key, v),
    dict(log_decay=log_decay, beta=beta),
    state,
    scale,
    delta=True,
    required=("beta",),
  )
  return o, state


def kda_step(
  state: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  beta: jax.Array,
  *,
  erase_key: jax.Array | None = None,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token of `kda`.

  Args:
    state: `[B, H, K, V]`.
    q: `[B, G, K]`.
    k: `[B, G, K]`.
    v: `[B, H, V]`.
    log_decay: `[B, H, K]`.
    beta: `[B, H]`.
    erase_key: `[B, G, K]`; None is the decay times k.
    scale: multiplies q; None is K**-0.5.

  Returns:
    o, `[B, H, V]` in v's dtype, and the new state.
  """
  o, (state,) = _step(
    (q, k, erase_key, v),
    dict(log_decay=log_decay, beta=beta),
    state,
    scale,
    delta=True,
    required=("log_decay", "beta"),
    channels="always",
  )
  return o, state


def linear_attention_step(
  state: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token of `linear_attention`.

  Args:
    state: `[B, H, K, V]`.
    q: `[B, G, K]`.
    k: `[B, G, K]`.
    v: `[B, H, V]`.
    log_decay: `[B, H]`, `[B, H, K]`, or None for no decay.
    scale: multiplies q; None is K**-0.5.

  Returns:
    o, `[B, H, V]` in v's dtype, and the new state.
  """
  o, (state,) = _step(
    (q, k, None, v),
    dict(log_decay=log_decay),
    state,
    scale,
    delta=False,
    channels="allowed",
  )
  return o, state


def _step(vectors, gates, state, scale, *, delta, **how):
  """Validates one token and takes the state past it."""
  if state is None:
    raise TypeError("state must be the state before the token, got None")
  names = ("q", "k", "erase_key", "v")
  vectors = [
    _as_sequence(name, x, (3,)) for name, x in zip(names, vectors, strict=True)
  ]
  channels = how.get("channels", "never")
  ranks = {"never": (2,), "allowed": (2, 3), "always": (3,)}[channels]
  gates = {
    name: _as_sequence(name, x, ranks if name == "log_decay" else (2,))
    for name, x in gates.items()
  }
  inputs = problem.make_inputs(
    *vectors, gates, state=state, segment_ids=None, state_name="state", **how
  )
  scale = arguments.check_scale(scale, inputs.q.shape[-1])
  token = jax.tree.map(lambda x: x[:, 0], inputs._replace(state=None))
  token = token._replace(state=inputs.state)

  advance = lambda token, _: recurrent.advance(
    token, token.state, scale=scale, delta=delta
  )
  o, state = problem.run_divided(advance, token, state_name="state")
  return o.astype(jnp.result_type(vectors[3])), state


def _as_sequence(name: str, x: Any, ranks: tuple[int, ...]) -> Any:
  """`[B, ...]` to `[B, 1, ...]`, None to None."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim not in ranks:
    raise ValueError(
      f"{name} must have {' or '.join(map(str, ranks))} axes (one token), got "
      f"the shape {list(x.shape)}"
    )
  return x[:, None]
