"""A budget of keys, kept by learned gates (TRIM-KV, arXiv:2512.03324).

When a token comes, a gate of each key head gives it a beta in (0, 1); t tokens
on, its score is beta^t, and what has the least is evicted where there is no
room. Gates are trained with the model frozen, on attention in which a key's
score lowers its logit by as much as it would lower the chance to be there, so
that evicting what has a score of about 0 changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import attention, block, layers, stack
from models import config as config_lib
from models.cache_policies import base


def with_gates(
  params: Any, weight: jax.Array, bias: jax.Array, cfg: config_lib.Config
) -> Any:
  """Parameters whose softmax layers have retention gates.

  Args:
    params: as for `transformer.apply`.
    weight: `[L, D, G]`, of the softmax layers in order.
    bias: `[L, G]`; about 8 forgets one in 3000 a token.
    cfg: the model.

  Returns:
    The parameters.
  """
  leaves = {"trim_gate": weight, "trim_bias": bias}
  return stack.with_leaves(params, leaves, cfg, config_lib.SOFTMAX)


def log_retention(states: jax.Array, p: Any) -> jax.Array:
  """log beta, float32 `[B, T, G]`, of normed states `[B, T, D]`."""
  if "trim_gate" not in p:
    raise ValueError(
      "params: got layers without gates, which the policy Retention needs; "
      "allowed: what cache_policies.with_gates returns"
    )
  logits = layers.dot(
    states.astype(jnp.float32), p["trim_gate"].astype(jnp.float32), 2, 0
  )
  return jax.nn.log_sigmoid(logits + p["trim_bias"].astype(jnp.float32))


def retention_attention(heads: block.Heads, log_beta: jax.Array) -> jax.Array:
  """Causal attention whose logits fade: what gates are trained on.

  The logit of the key at position i for the query at t is
  `q k / sqrt(K) + (t - i) log beta_i`. Takes memory of T x T.

  Args:
    heads: rotated.
    log_beta: `[B, T, G]`, at most 0.

  Returns:
    `[B, T, H, K]` in q's dtype.
  """
  faded = _fade(log_beta)
  repeat = heads.q.shape[2] // log_beta.shape[2]
  scores = attention.scores(heads.q, heads.k)
  scores = scores + jnp.repeat(faded, repeat, axis=1)
  mask = jnp.tri(scores.shape[2], dtype=bool)[None]
  return attention.weigh(scores, heads.v, mask).astype(heads.q.dtype)


def capacity_loss(log_beta: jax.Array, budget: int) -> jax.Array:
  """How far expected keys exceed a budget, as a share of it.

  Args:
    log_beta: `[B, T, G]`.
    budget: keys of one head.

  Returns:
    The mean over heads and positions t of `max(0, sum_i beta_i^(t - i) -
    budget) / budget`.
  """
  mask = jnp.tri(log_beta.shape[1], dtype=bool)
  kept = jnp.sum(jnp.where(mask, jnp.exp(_fade(log_beta)), 0), axis=-1)
  return jnp.mean(jnp.maximum(kept - budget, 0)) / budget


def _fade(log_beta):
  """(t - i) log beta_i, `[B, G, T, T]`; 0 for keys yet to come."""
  time = jnp.arange(log_beta.shape[1])
  age = jnp.maximum(time[:, None] - time, 0)
  return jnp.swapaxes(log_beta, 1, 2)[:, :, None] * age


class State(NamedTuple):
  """What a layer keeps, in no order.

  Attributes:
    kept: the keys and values.
    log_beta: float32 `[B, S, G]`.
    positions: int32 `[B, S, G]`, -1 in empty slots.
  """

  kept: base.KeysValues
  log_beta: jax.Array
  positions: jax.Array


@dataclasses.dataclass(frozen=True)
class Retention:
  """`budget` keys of each head: those with the largest beta^age.

  A query sees what was kept and the tokens that come with it; then what is
  over the budget goes. Gates choose what is kept and do not weigh it.

  Attributes:
    budget: keys of a head.
  """

  budget: int

  def __post_init__(self):
    base.positive("budget", self.budget)

  def init(self, cfg: base.Config, batch: int, max_length: int) -> State:
    slots = min(self.budget, max_length)
    shape = (batch, slots, cfg.kv_heads)
    return State(
      base.KeysValues.empty(cfg, batch, slots),
      jnp.zeros(shape, jnp.float32),
      jnp.full(shape, -1, jnp.int32),
    )

  def capacity(self, state: State) -> int | None:
    """Any, unless the whole text was to be within the budget."""
    slots = state.positions.shape[-2]
    return None if slots == self.budget else slots

  def attend(
    self, state: State, new: base.New, p: Any, cfg: base.Config
  ) -> tuple[jax.Array, State]:
    heads = block.rotate(new.heads, new.rotation)
    log_beta = log_retention(new.states, p)
    positions = jnp.broadcast_to(new.positions[:, None], log_beta.shape)
    join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1)
    seen = State(
      state.kept.followed_by(heads),
      join(state.log_beta, log_beta),
      join(state.positions, positions),
    )
    # [B, G, T, S] to the query heads.
    at = jnp.swapaxes(seen.positions, 1, 2)[:, :, None]
    mask = (at >= 0) & (at <= new.positions[:, None])
    mask = jnp.repeat(mask, cfg.num_heads // cfg.kv_heads, axis=1)
    y = attention.attention(
      heads.q, seen.kept.keys, seen.kept.values, mask=mask
    )
    return y, self._evict(seen, new.positions[-1], state.positions.shape[1])

  def _evict(self, seen, last, slots):
    """The `slots` with the largest score; of equals, the newest."""
    age = (last - seen.positions).astype(jnp.float32)
    score = jnp.where(seen.positions >= 0, seen.log_beta * age, -jnp.inf)
    # `top_k` takes the first of equals, and new tokens come last.
    score = jnp.moveaxis(score[:, ::-1], 1, 2)
    chosen = score.shape[2] - 1 - jax.lax.top_k(score, slots)[1]
    chosen = jnp.swapaxes(chosen, 1, 2)
    take = lambda x: jnp.take_along_axis(x, chosen, axis=1)
    wide = lambda x: jnp.take_along_axis(x, chosen[..., None], axis=1)
    kept = base.KeysValues(wide(seen.kept.keys), wide(seen.kept.values))
    return State(kept, take(seen.log_beta), take(seen.positions))
