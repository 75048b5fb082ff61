"""Attention of several responses that share their prefix, computed once.

Prefix Grouper (arXiv:2506.05433): where N responses of R tokens continue one
prefix of P, as in reinforcement learning from groups of samples, the repeated
form pays N (P + R)^2 / 2 pairs of query and key; here the prefix attends to
itself once and every response to the prefix and to itself, P^2 / 2 +
N (P R + R^2 / 2), with the same values and gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import arguments
from kernels_pallas.sparse import api, core, dense


def prefix_shared_attention(
  prefix: tuple[jax.Array, jax.Array, jax.Array],
  suffixes: tuple[jax.Array, jax.Array, jax.Array],
  *,
  prefix_lengths: jax.Array | None = None,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Causal attention over `[prefix; suffix n]` for every n.

  Rotary embeddings are the caller's: those of a suffix start where its prefix
  ends. A suffix shorter than R is padded at its end and reads nothing of what
  pads it.

  Args:
    prefix: q `[B, P, H, K]`, k `[B, P, G, K]` and v `[B, P, G, V]` of the
      shared tokens, K up to 256.
    suffixes: q `[B, N, R, H, K]`, k `[B, N, R, G, K]`, v `[B, N, R, G, V]`.
    prefix_lengths: int `[B]`, how many tokens of a prefix exist, the first
      ones; None is P.
    scale: multiplies the scores; None is K**-0.5.

  Returns:
    `[B, P, H, V]` and `[B, N, R, H, V]` in the dtype that all arrays promote
    to. Both can be differentiated, in reverse mode.

  Raises:
    TypeError: for arrays of other dtypes.
    ValueError: for shapes that do not fit.
  """
  b = _check(prefix, suffixes)
  arrays = api.common(*prefix, *suffixes)
  prefix, suffixes = arrays[:3], arrays[3:]
  scale = arguments.check_scale(scale, prefix[0].shape[-1])
  # Nothing that exists reads what follows it.
  first = dense.full_attention(*prefix, causal=True, scale=scale)
  one_row = lambda x: x.reshape(b, -1, *x.shape[3:])
  to_prefix = dense.full_attention(
    one_row(suffixes[0]),
    *prefix[1:],
    scale=scale,
    lengths=prefix_lengths,
    return_lse=True,
  )
  one_each = lambda x: x.reshape(-1, *x.shape[2:])
  to_self = dense.full_attention(
    *(one_each(x) for x in suffixes), causal=True, scale=scale, return_lse=True
  )
  shape = suffixes[0].shape[1:4]
  whole = lambda x: x.reshape(b, *shape, *x.shape[3:])
  parts = [tuple(whole(x) for x in part) for part in (to_prefix, to_self)]
  return first, core.merge(parts)[0].astype(first.dtype)


def _check(prefix: Any, suffixes: Any) -> int:
  """B, where everything fits."""
  for name, x in (("prefix", prefix), ("suffixes", suffixes)):
    if not isinstance(x, tuple | list) or len(x) != 3:
      got = f" of {len(x)}" if isinstance(x, tuple | list) else ""
      raise TypeError(
        f"{name} must be a tuple (q, k, v), got {type(x).__name__}{got}"
      )
  prefix = [
    arguments.floating(f"prefix's {name}", x)
    for name, x in zip("qkv", prefix, strict=True)
  ]
  try:
    api.sizes(*prefix)
  except ValueError as e:
    raise ValueError(f"prefix's {e}") from None
  if prefix[0].shape[1] != prefix[1].shape[1]:
    raise ValueError(
      "prefix must have as many queries as keys, got P = "
      f"{prefix[0].shape[1]} and {prefix[1].shape[1]}"
    )
  q = jnp.shape(suffixes[0])
  for name, x, like in zip("qkv", suffixes, prefix, strict=True):
    x = arguments.floating(f"suffixes' {name}", x)
    wanted = like.shape[:1], like.shape[2:]
    fits = x.ndim == 5 and 0 not in x.shape
    if (
      not fits or (x.shape[:1], x.shape[3:]) != wanted or x.shape[1:3] != q[1:3]
    ):
      raise ValueError(
        f"suffixes' {name} must have the shape [B, N, R, heads, size] with B, "
        f"heads and size as prefix's {list(like.shape)}, N and R at least 1 "
        f"and as q's, got {list(x.shape)}"
      )
  return q[0]
