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

from kernels_pallas import arguments
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
  b, t, _, h, size, width = problem.sizes(q, v)
  erase = arguments.shaped("erase", erase, (b, t, h, size), "B, T, H, K")
  write = arguments.shaped("write", write, (b, t, h, width), "B, T, H, V")
  args, erase_key = _gdn2(q, k, v, log_decay, erase, write, 2)
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
  args, erase_key = _gdn2(q, k, v, log_decay, erase, write, 1)
  o, state = steps.kda_step(state, *args, erase_key=erase_key, scale=scale)
  return o.astype(v.dtype), state


def _gdn2(q, k, v, log_decay, erase, write, axis):
  """`kda`'s arguments and erase key, with one key head per value head."""
  repeat = v.shape[axis] // k.shape[axis]
  q, k = (jnp.repeat(x, repeat, axis=axis) for x in (q, k))
  ones = jnp.ones(v.shape[:-1], log_decay.dtype)
  erase_key = jnp.exp(log_decay) * erase * k
  return (q, k, write * v, log_decay, ones), erase_key


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
  for name, x in (("k", k), ("a", a), ("b", b)):
    arguments.shaped(name, x, q.shape, "B, T, H, K")
  zero_k, zero_v = jnp.zeros_like(k), jnp.zeros_like(v)
  pair = lambda first, second: _interleave((first, second))
  ids = how.pop("segment_ids", None)
  o, state = api.kda(
    pair(zero_k, q),
    pair(b, k),
    pair(zero_v, v),
    pair(log_decay, jnp.zeros_like(log_decay)),
    jnp.ones((q.shape[0], 2 * q.shape[1], q.shape[2]), log_decay.dtype),
    erase_key=pair(-a, zero_k),
    scale=scale,
    segment_ids=None if ids is None else jnp.repeat(ids, 2, axis=1),
    **how,
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
  if k.ndim != 5 or k.shape[:2] + k.shape[3:] != q.shape:
    raise ValueError(
      "k must have the shape [B, T, N, G, K] with q's [B, T, G, K] = "
      f"{list(q.shape)}, got {list(k.shape)}"
    )
  count = k.shape[2]
  for name, x in (("v", v), ("beta", beta)):
    if x.shape[:3] != k.shape[:3]:
      raise ValueError(
        f"{name} must begin with [B, T, N] = {list(k.shape[:3])} as k does, "
        f"got {list(x.shape)}"
      )
  flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
  nothing = [jnp.zeros_like(q)] * (count - 1)
  if log_decay is not None:
    rest = [jnp.zeros_like(log_decay)] * (count - 1)
    log_decay = _interleave((log_decay, *rest))
  ids = how.pop("segment_ids", None)
  o, state = api.gated_delta_rule(
    _interleave((*nothing, q)),
    flat(k),
    flat(v),
    log_decay,
    flat(beta),
    segment_ids=None if ids is None else jnp.repeat(ids, count, axis=1),
    **how,
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
  o = None
  for i in range(k.shape[1]):
    o, state = steps.gated_delta_rule_step(
      state, q, k[:, i], v[:, i], log_decay, beta[:, i], scale=scale
    )
    log_decay = None
  return o, state


def _interleave(parts):
  """N arrays `[B, T, ..]` to `[B, N T, ..]`, the n-th of each token in turn."""
  x = jnp.stack(parts, axis=2)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
