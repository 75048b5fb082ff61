"""Attention of several responses that share their prefix, computed once.

Prefix Grouper (arXiv:2506.05433): where N responses of R tokens continue one
prefix of P, as in reinforcement learning from groups of samples, the repeated
form pays N (P + R)^2 / 2 pairs of query and key; here the prefix attends to
itself once and every response to the prefix and to itself, P^2 / 2 +
N (P R + R^2 / 2), with the same values and gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, meshes
from kernels_pallas.sparse import api, core, dense


def prefix_shared_attention(
  prefix: tuple[jax.Array, jax.Array, jax.Array],
  suffixes: tuple[jax.Array, jax.Array, jax.Array],
  *,
  prefix_lengths: jax.Array | None = None,
  scale: float | None = None,
  implementation: str | None = None,
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
    implementation: as for `full_attention`.

  Returns:
    `[B, P, H, V]` and `[B, N, R, H, V]` in the dtype that all arrays promote
    to. Both can be differentiated, as `full_attention` can.

  Raises:
    TypeError: for arrays of other dtypes, and for what is no (q, k, v).
    ValueError: for shapes and lengths that do not fit.
  """
  _check(prefix, suffixes)
  scale = arguments.check_scale(scale, jnp.shape(prefix[0])[-1])
  arrays = dict(
    zip(_LETTERS, api.common(*prefix, *suffixes), strict=False),
    prefix_lengths=_lengths(prefix_lengths, prefix),
  )
  attend = functools.partial(
    dense.full_attention, scale=scale, implementation=implementation
  )
  layout = meshes.Layout(arrays=_LETTERS, out=("BPHV", "BNRHV"))
  return meshes.run(functools.partial(_attend, attend), arrays, layout)


_LETTERS = {
  "prefix's q": "BPHK",
  "prefix's k": "BPGK",
  "prefix's v": "BPGV",
  "suffixes' q": "BNRHK",
  "suffixes' k": "BNRGK",
  "suffixes' v": "BNRGV",
  "prefix_lengths": "B",
}


def _attend(attend, arrays):
  *arrays, lengths = (arrays[name] for name in _LETTERS)
  prefix, suffixes = arrays[:3], arrays[3:]
  b = prefix[0].shape[0]
  # Nothing that exists reads what follows it.
  first = attend(*prefix, causal=True)
  one_row = lambda x: x.reshape(b, -1, *x.shape[3:])
  to_prefix = attend(
    one_row(suffixes[0]), *prefix[1:], lengths=lengths, return_lse=True
  )
  one_each = lambda x: x.reshape(-1, *x.shape[2:])
  to_self = attend(
    *(one_each(x) for x in suffixes), causal=True, return_lse=True
  )
  shape = suffixes[0].shape[1:4]
  whole = lambda x: x.reshape(b, *shape, *x.shape[3:])
  parts = [tuple(whole(x) for x in part) for part in (to_prefix, to_self)]
  return first, core.merge(parts)[0].astype(first.dtype)


def _lengths(x: Any, prefix: Any) -> jax.Array | None:
  if x is None:
    return None
  b, p = jnp.shape(prefix[0])[:2]
  return dense.check_lengths("prefix_lengths", x, b, p, "P")


def _check(prefix: Any, suffixes: Any) -> None:
  """Raises where something does not fit."""
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
