"""Members that are another member's recurrence in other letters.

GDN-2 and RWKV-7 are delta rules with per-channel decay and an erase key of
their own. DeltaProduct and RWKV-7 move the state several times per token;
each move is a token ("micro-token") to the chunk algebra, with the decay on
the first and the query on the last.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, meshes
from kernels_pallas.linear import api, problem, steps


def gdn2(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  erase: jax.Array,
  write: jax.Array,
  **how: Any,
) -> tuple[jax.Array, jax.Array]:
  """Gated DeltaNet-2: vector gates for what is erased and what is written.

  Per token, with alpha = exp(log_decay):

    S = diag(alpha) S;  S = S + k (write o v - S^T (erase o k))^T;
    o = S^T (scale q)

  Args:
    q: `[B, T, G, K]`.
    k: `[B, T, G, K]`.
    v: `[B, T, H, V]`.
    log_decay: `[B, T, H, K]`.
    erase: `[B, T, H, K]`.
    write: `[B, T, H, V]`.
    **how: the keyword arguments of `kda`, without `erase_key`.

  Returns:
    o, `[B, T, H, V]`, and the final state `[B, H, K, V]`.
  """
  q, v = arguments.floating("q", q), arguments.floating("v", v)
  b, t, g, h, size, width = problem.sizes(q, v)
  k = arguments.shaped("k", k, (b, t, g, size), "B, T, G, K")
  wanted = b, t, h, size
  log_decay = arguments.shaped("log_decay", log_decay, wanted, "B, T, H, K")
  erase = arguments.shaped("erase", erase, wanted, "B, T, H, K")
  write = arguments.shaped("write", write, (b, t, h, width), "B, T, H, V")
  args, erase_key = _gdn2(q, k, v, log_decay, erase, write, "BT")
  o, state = api.kda(*args, erase_key=erase_key, **how)
  return o.astype(v.dtype), state


def gdn2_step(
  state: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  erase: jax.Array,
  write: jax.Array,
  *,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token of `gdn2`; arrays lack its T axis."""
  q = arguments.ranked("q", q, "B, G, K")
  v = arguments.ranked("v", v, "B, H, V")
  k = arguments.shaped("k", k, q.shape, "B, G, K")
  (b, _, size), (h, width) = q.shape, v.shape[1:]
  if h % q.shape[1]:
    raise ValueError(
      f"v must have a multiple of q's and k's {q.shape[1]} heads, got {h} heads"
    )
  log_decay = arguments.shaped("log_decay", log_decay, (b, h, size), "B, H, K")
  erase = arguments.shaped("erase", erase, (b, h, size), "B, H, K")
  write = arguments.shaped("write", write, (b, h, width), "B, H, V")
  args, erase_key = _gdn2(q, k, v, log_decay, erase, write, "B")
  o, state = steps.kda_step(state, *args, erase_key=erase_key, scale=scale)
  return o.astype(v.dtype), state


def _gdn2(q, k, v, log_decay, erase, write, letters):
  """`kda`'s arguments and erase key, with one key head per value head."""
  keys, values = f"{letters}GK", f"{letters}HV"
  wide = f"{letters}HK"

  def expand(x):
    axis = len(letters)
    repeat = x["v"].shape[axis] // x["k"].shape[axis]
    q, k = (jnp.repeat(x[name], repeat, axis=axis) for name in "qk")
    erase_key = jnp.exp(x["log_decay"]) * x["erase"] * k
    return q, k, x["write"] * x["v"], erase_key

  layout = meshes.Layout(
    arrays=dict(
      q=keys, k=keys, v=values, log_decay=wide, erase=wide, write=values
    ),
    out=(wide, wide, values, wide),
  )
  arrays = dict(q=q, k=k, v=v, log_decay=log_decay, erase=erase, write=write)
  q, k, v, erase_key = meshes.run(expand, arrays, layout)
  ones = jnp.ones(v.shape[:-1], log_decay.dtype)
  return (q, k, v, log_decay, ones), erase_key


def rwkv7(
  q: jax.Array,
  log_decay: jax.Array,
  k: jax.Array,
  v: jax.Array,
  a: jax.Array,
  b: jax.Array,
  *,
  scale: float = 1.0,
  **how: Any,
) -> tuple[jax.Array, jax.Array]:
  """RWKV-7 (arXiv:2503.14456): a decay, a rank-one change and a write.

  Per token: S = diag(exp(log_decay)) S + b (a^T S) + k v^T, all of the old
  S, and o = S^T (scale q).

  Args:
    q: `[B, T, H, K]`, the receptance.
    log_decay: `[B, T, H, K]`.
    k: `[B, T, H, K]`.
    v: `[B, T, H, V]`.
    a: `[B, T, H, K]`, the removal key with its sign.
    b: `[B, T, H, K]`, the replacement key.
    scale: of q.
    **how: the keyword arguments of `kda`, without `erase_key`.

  Returns:
    o, `[B, T, H, V]`, and the final state `[B, H, K, V]`.
  """
  (q, v), (log_decay, k, a, b) = _rwkv7(q, v, log_decay, k, a, b, "B, T, H")
  zero_k, zero_v = jnp.zeros_like(k), jnp.zeros_like(v)
  pair = lambda first, second: _interleave((first, second))
  o, state = api.kda(
    pair(zero_k, q),
    pair(b, k),
    pair(zero_v, v),
    pair(log_decay, jnp.zeros_like(log_decay)),
    jnp.ones((q.shape[0], 2 * q.shape[1], q.shape[2]), log_decay.dtype),
    erase_key=pair(-a, zero_k),
    scale=scale,
    **_micro(how, *q.shape[:2], 2),
  )
  return o[:, 1::2], state


def rwkv7_step(
  state: jax.Array,
  q: jax.Array,
  log_decay: jax.Array,
  k: jax.Array,
  v: jax.Array,
  a: jax.Array,
  b: jax.Array,
  *,
  scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """One token of `rwkv7`; arrays lack its T axis."""
  (q, v), (log_decay, k, a, b) = _rwkv7(q, v, log_decay, k, a, b, "B, H")
  ones = jnp.ones(q.shape[:-1], log_decay.dtype)
  zero = jnp.zeros_like(log_decay)
  _, state = steps.kda_step(
    state, q, b, jnp.zeros_like(v), log_decay, ones, erase_key=-a, scale=scale
  )
  return steps.kda_step(
    state, q, k, v, zero, ones, erase_key=jnp.zeros_like(k), scale=scale
  )


def delta_product(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None,
  beta: jax.Array,
  **how: Any,
) -> tuple[jax.Array, jax.Array]:
  """Gated DeltaProduct (arXiv:2502.10297): several delta steps per token.

  Args:
    q: `[B, T, G, K]`.
    k: `[B, T, N, G, K]`, the keys of the N steps.
    v: `[B, T, N, H, V]`.
    log_decay: `[B, T, H]`, before the first step, or None.
    beta: `[B, T, N, H]`.
    **how: the keyword arguments of `gated_delta_rule`, without `erase_key`.

  Returns:
    o, `[B, T, H, V]`, after the last step, and the final state
    `[B, H, K, V]`.
  """
  q, k, v, beta = _delta_product(q, k, v, beta, "B, T")
  if log_decay is not None:
    wanted = *q.shape[:2], v.shape[3]
    log_decay = arguments.shaped("log_decay", log_decay, wanted, "B, T, H")
  count = k.shape[2]
  flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
  nothing = [jnp.zeros_like(q)] * (count - 1)
  if log_decay is not None:
    rest = [jnp.zeros_like(log_decay)] * (count - 1)
    log_decay = _interleave((log_decay, *rest))
  o, state = api.gated_delta_rule(
    _interleave((*nothing, q)),
    flat(k),
    flat(v),
    log_decay,
    flat(beta),
    **_micro(how, *q.shape[:2], count),
  )
  return o[:, count - 1 :: count], state


def delta_product_step(
  state: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None,
  beta: jax.Array,
  *,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token of `delta_product`; arrays lack its T axis."""
  q, k, v, beta = _delta_product(q, k, v, beta, "B")
  o = None
  for i in range(k.shape[1]):
    o, state = steps.gated_delta_rule_step(
      state, q, k[:, i], v[:, i], log_decay, beta[:, i], scale=scale
    )
    log_decay = None
  return o, state


def _rwkv7(q, v, log_decay, k, a, b, letters):
  """The arrays of `rwkv7` or of its step, checked; `letters` but K and V."""
  q = arguments.ranked("q", q, f"{letters}, K")
  v = arguments.ranked("v", v, f"{letters}, V")
  arguments.check_shape("v", v, (*q.shape[:-1], v.shape[-1]), f"{letters}, V")
  others = dict(log_decay=log_decay, k=k, a=a, b=b)
  return (q, v), [
    arguments.shaped(name, x, q.shape, f"{letters}, K")
    for name, x in others.items()
  ]


def _delta_product(q, k, v, beta, letters):
  """The arrays of `delta_product` or of its step; `letters` before N."""
  q = arguments.ranked("q", q, f"{letters}, G, K")
  k = arguments.ranked("k", k, f"{letters}, N, G, K")
  at = q.ndim - 2
  if k.shape[:at] + k.shape[at + 1 :] != q.shape or not k.shape[at]:
    raise ValueError(
      f"k must have the shape [{letters}, N, G, K] with N at least 1 and q's "
      f"[{letters}, G, K] = {list(q.shape)}, got {list(k.shape)}"
    )
  v = arguments.ranked("v", v, f"{letters}, N, H, V")
  front = k.shape[: at + 1]
  wanted = (*front, *v.shape[-2:])
  v = arguments.shaped("v", v, wanted, f"{letters}, N, H, V")
  wanted = (*front, v.shape[-2])
  beta = arguments.shaped("beta", beta, wanted, f"{letters}, N, H")
  return q, k, v, beta


def _micro(how, b, t, count):
  """Keyword arguments that count tokens, where each is `count` of them."""
  how = dict(how)
  lengths = problem.check_lengths(how.pop("lengths", None), b, t)
  ids = problem.check_segments(how.pop("segment_ids", None), b, t)
  return how | dict(
    lengths=None if lengths is None else lengths * count,
    segment_ids=None if ids is None else jnp.repeat(ids, count, axis=1),
  )


def _interleave(parts):
  """N arrays `[B, T, ..]` to `[B, N T, ..]`, the n-th of each token in turn."""
  x = jnp.stack(parts, axis=2)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
