"""Low-rank factors of old keys and values (CSKV, arXiv:2409.10593).

A token's keys of all G heads, before the rotation, are one vector of G K
numbers; `down` takes it to `rank` numbers, which the cache keeps, and `up`
takes them back when they are read, before the rotation. The last tokens are
kept as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_ext import sequencing
from models import attention, block, layers, stack
from models import config as config_lib
from models.cache_policies import base, rolling


class Factors(NamedTuple):
  """Of every softmax layer, in order, or of one.

  Attributes:
    keys_down: `[L, G * K, rank]`.
    keys_up: `[L, rank, G * K]`.
    values_down: `[L, G * K, rank]`.
    values_up: `[L, rank, G * K]`.
  """

  keys_down: jax.Array
  keys_up: jax.Array
  values_down: jax.Array
  values_up: jax.Array


def low_rank_factors(
  qkv: block.Heads, cfg: config_lib.Config, *, rank: int
) -> Factors:
  """The factors that lose least of some calibration text.

  Of all projections of one rank, those onto the leading right singular
  vectors of the keys (of the values) that the text gives have the least
  squared error: the activation-aware decomposition of the matrix that makes
  them, written on its output.

  Args:
    qkv: `transformer.apply(..., return_qkv=True).qkv`, `[L, B, T, ., K]`,
      rotated, of at least G K tokens (B T) for a full rank.
    cfg: the model.
    rank: numbers kept of a token's keys, and as many of its values; at most
      G K.

  Returns:
    `Factors` in the dtype of the heads.

  Raises:
    ValueError: for a rank that is not from 1 to G K.
  """
  width = cfg.kv_heads * cfg.key_size
  if type(rank) is not int or not 1 <= rank <= width:
    raise ValueError(
      f"rank: got {rank!r}; allowed: 1 to num_kv_heads * head_dim = {width}"
    )
  cos, sin = layers.rope_table(
    jnp.arange(qkv.k.shape[2]), cfg.key_size, cfg.rope_theta
  )
  keys = jax.vmap(lambda k: layers.rope(k, cos, -sin))(qkv.k)

  def factors(x, earlier=None):
    rows = x.reshape(x.shape[0], -1, width).astype(jnp.float32)
    # Of the smaller matrix of second moments; its eigenvalues ascend.
    moments = jnp.einsum("lnw,lnu->lwu", rows, rows)
    moments = sequencing.after(moments, earlier)
    down = jnp.linalg.eigh(moments)[1][..., ::-1][..., :rank].astype(x.dtype)
    return down, jnp.swapaxes(down, 1, 2)

  of_keys = factors(keys)
  return Factors(*of_keys, *factors(qkv.v, of_keys[0]))


def with_factors(params: Any, factors: Factors, cfg: config_lib.Config) -> Any:
  """Parameters whose softmax layers have `factors`, for `LowRank`."""
  named = {f"cskv_{name}": x for name, x in factors._asdict().items()}
  return stack.with_leaves(params, named, cfg, config_lib.SOFTMAX)


class State(NamedTuple):
  """What a layer keeps.

  Attributes:
    keys: `[B, S, rank]`, of every token.
    values: `[B, S, rank]`.
    recent: the last ones whole, a ring.
  """

  keys: jax.Array
  values: jax.Array
  recent: base.KeysValues


@dataclasses.dataclass(frozen=True)
class LowRank:
  """Old tokens by `rank` numbers for keys and for values, the last ones whole.

  A query sees the tokens that come with it as they are, so that a prompt given
  at once is read exactly, and `window` tokens before those.

  Attributes:
    rank: as the parameters have it (`with_factors`).
    window: how many of the last tokens are kept whole.
  """

  rank: int
  window: int = 32

  def __post_init__(self):
    base.positive("rank", self.rank)
    base.positive("window", self.window)

  def init(self, cfg: base.Config, batch: int, max_length: int) -> State:
    dtype = jnp.dtype(cfg.compute_dtype)
    shape = (batch, max_length, self.rank)
    ring = min(self.window, max_length)
    return State(
      jnp.zeros(shape, dtype),
      jnp.zeros(shape, dtype),
      base.KeysValues.empty(cfg, batch, ring),
    )

  def capacity(self, state: State) -> int:
    return state.keys.shape[-2]

  def attend(
    self, state: State, new: base.New, p: Any, cfg: base.Config
  ) -> tuple[jax.Array, State]:
    down, up = self._factors(p)
    slots, ring = state.keys.shape[1], state.recent.keys.shape[1]
    old = jnp.arange(slots)
    whole = lambda x, up: layers.matmul(x, up).reshape(
      x.shape[0], slots, cfg.kv_heads, cfg.key_size
    )
    table = layers.rope_table(old, cfg.key_size, cfg.rope_theta)
    heads = block.rotate(new.heads, new.rotation)
    seen = base.KeysValues(
      layers.rope(whole(state.keys, up[0]), *table), whole(state.values, up[1])
    )
    seen = seen.followed_by(
      heads._replace(k=state.recent.keys, v=state.recent.values)
    )
    seen = seen.followed_by(heads)
    column = jnp.concatenate(
      [
        jnp.where(old < new.start - ring, old, -1),
        rolling.positions(ring, 0, new.start),
        new.positions,
      ]
    )
    mask = (column >= 0) & (column <= new.positions[:, None])
    y = attention.attention(heads.q, seen.keys, seen.values, mask=mask[None])

    def append(x, new_heads, down):
      rows = new_heads.reshape(*new_heads.shape[:2], -1)
      x_new = layers.matmul(rows, down)
      return jax.lax.dynamic_update_slice_in_dim(x, x_new, new.start, 1)

    return y, State(
      append(state.keys, new.heads.k, down[0]),
      append(state.values, new.heads.v, down[1]),
      rolling.store(state.recent, heads, new.start, 0),
    )

  def _factors(self, p):
    """((keys_down, values_down), (keys_up, values_up)) of a layer."""
    if "cskv_keys_down" not in p:
      raise ValueError(
        "params: got layers without factors, which the policy LowRank needs; "
        "allowed: what cache_policies.with_factors returns"
      )
    rank = p["cskv_keys_down"].shape[-1]
    if rank != self.rank:
      raise ValueError(
        f"rank: got {self.rank}; allowed: {rank}, as the factors in params have"
      )
    get = lambda end: tuple(p[f"cskv_{x}_{end}"] for x in ("keys", "values"))
    return get("down"), get("up")
