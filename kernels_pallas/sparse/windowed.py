"""Attention to bands of distances and to the first tokens.

The distance of a key is the query's position less its own. A window is one
band from 0; streaming attention (arXiv:2309.17453) and LongGen
(arXiv:2410.01485) add the first tokens, MoA (arXiv:2406.14909) gives each head
its own window, and heads that look at fixed offsets (arXiv:2601.08297) have
bands around those. Each is a list of the key blocks that a block of queries
can see and a mask within them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments
from kernels_pallas.sparse import api, problem
from kernels_pallas.sparse import blocks as block_lists

_pack = jax.jit(block_lists.pack, static_argnums=1)


def windowed_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  window: int | jax.Array,
  sink: int | jax.Array = 0,
  causal: bool = True,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
  block_q: int = 64,
  block_kv: int = 64,
  implementation: api.Implementation = None,
  interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Attends to the last `window` tokens and the first `sink`.

  The query at position t sees the key at position s where t - s < window, or
  |t - s| < window unless causal, and where s < sink; never s > t where causal.

  Args:
    q: `[B, T, H, K]`, K up to 256.
    k: `[B, S, G, K]`.
    v: `[B, S, G, V]`.
    window: at least 1, an int or int `[H]` of any size: T + S is as good as
      more. Values may be traced; then the
      lists are as long as the longest window would make them, S / block_kv:
      the result is the same, the time is that of dense attention.
    sink: at least 0, an int or int `[H]`.
    causal: as `api` says, and so what follows.
    scale: of the scores.
    segment_ids: int `[B, T]`. Sinks are the array's first tokens, so only
      the segments there have any.
    sinks: float `[H]`, logits without a value; no relation to `sink`.
    return_lse: also return the log-partition.
    block_q: queries of a block.
    block_kv: keys of a block.
    implementation: which code.
    interpret: whether Pallas interprets.

  Returns:
    `[B, T, H, V]`, and on request the log-partition `[B, T, H]`.
  """
  _, t, s, heads, _ = api.sizes(q, k, v)
  window = _per_head("window", window, heads, 1, t + s)
  xp = np if isinstance(window, np.ndarray) else jnp
  low = xp.zeros_like(window) if causal else 1 - window
  return banded_attention(
    q,
    k,
    v,
    bands=xp.stack([low, window - 1], axis=-1)[:, None],
    sink=sink,
    causal=causal,
    scale=scale,
    segment_ids=segment_ids,
    sinks=sinks,
    return_lse=return_lse,
    block_q=block_q,
    block_kv=block_kv,
    implementation=implementation,
    interpret=interpret,
  )


def banded_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  bands: jax.Array,
  sink: int | jax.Array = 0,
  causal: bool = True,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
  block_q: int = 64,
  block_kv: int = 64,
  implementation: api.Implementation = None,
  interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Attends to keys whose distance lies in a band, and to the first `sink`.

  Arguments but `bands` as in `windowed_attention`.

  Args:
    q: `[B, T, H, K]`.
    k: `[B, S, G, K]`.
    v: `[B, S, G, V]`.
    bands: int `[H, N, 2]`, intervals `[low, high]` of distance with both ends
      included; they may overlap, and a head of fewer repeats one.
    sink: tokens that every query sees.
    causal: whether a query sees no later key.
    scale: of the scores.
    segment_ids: int `[B, T]`.
    sinks: float `[H]`.
    return_lse: also return the log-partition.
    block_q: queries of a block.
    block_kv: keys of a block.
    implementation: which code.
    interpret: whether Pallas interprets.

  Returns:
    `[B, T, H, V]`, 0 in rows that see nothing, and on request the
    log-partition `[B, T, H]`.
  """
  b, t, s, heads, _ = api.sizes(q, k, v)
  options = problem.Options(
    scale=arguments.check_scale(scale, q.shape[-1]),
    block_q=api.check_block("block_q", block_q),
    block_kv=api.check_block("block_kv", block_kv),
    causal=api.check_causal(causal, t, s),
    interpret=interpret,
  )
  bands = _check_bands(bands, heads, t + s)
  sink = _per_head("sink", sink, heads, 0, t + s)
  indices, counts = _lists(bands, sink, t, s, options)
  everywhere = lambda x: jnp.broadcast_to(x, (b, *x.shape))
  q, k, v = api.common(q, k, v)
  inputs = problem.Inputs(
    q=q,
    k=k,
    v=v,
    indices=everywhere(indices),
    counts=everywhere(counts),
    segments=api.check_segments(segment_ids, b, t, s),
    bands=jnp.asarray(bands),
    sink_tokens=jnp.asarray(sink),
  )
  return api.attend(inputs, options, sinks, return_lse, implementation)


def _per_head(name: str, x: Any, heads: int, least: int, most: int) -> Any:
  """int32 `[H]`, of NumPy where the values are known, brought to `most`.

  Raises:
    TypeError: unless they are integers.
    ValueError: for another shape, and below `least` where that is known.
  """
  x = _known(arguments.integers(name, x))
  if x.shape not in ((), (heads,)):
    raise ValueError(
      f"{name} must be one integer or have the shape [H] = {[heads]}, got "
      f"{list(x.shape)}"
    )
  if isinstance(x, np.ndarray) and x.min() < least:
    raise ValueError(f"{name} must be at least {least}, got {x.min()}")
  xp = np if isinstance(x, np.ndarray) else jnp
  return xp.broadcast_to(arguments.saturated(x, most), (heads,))


def _known(x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
  """`x`, of NumPy where its values are known."""
  return np.asarray(x) if arguments.known(x) else x


def _check_bands(bands: Any, heads: int, most: int) -> Any:
  bands = _known(arguments.integers("bands", bands))
  wanted = (heads, *bands.shape[1:2], 2)
  if bands.ndim != 3 or bands.shape != wanted or bands.shape[1] < 1:
    raise ValueError(
      f"bands must have the shape [H, N, 2] with H = {heads} and N at least "
      f"1, got {list(bands.shape)}"
    )
  if isinstance(bands, np.ndarray) and (bands[..., 0] > bands[..., 1]).any():
    bad = bands[bands[..., 0] > bands[..., 1]][0]
    raise ValueError(
      f"bands must have no high below its low, got {bad.tolist()}"
    )
  return arguments.saturated(bands, most)


def _lists(bands, sink, t, s, options):
  """int32 `[H, NQ, M]` of blocks in reach of each query block, and counts.

  M is the longest list where bands and sinks are known, else NK.
  """
  if isinstance(bands, np.ndarray) and isinstance(sink, np.ndarray):
    # Heads that see the same share their lists.
    table = np.concatenate([bands.reshape(len(bands), -1), sink[:, None]], 1)
    rows, head = np.unique(table, axis=0, return_inverse=True)
    bands, sink = rows[:, :-1].reshape(len(rows), -1, 2), rows[:, -1]
    member = _reach(np, bands, sink, t, s, options)
    with jax.ensure_compile_time_eval():
      lists = _pack(jnp.asarray(member), int(member.sum(-1).max()))
    return tuple(jnp.asarray(np.asarray(x)[head.ravel()]) for x in lists)
  bands, sink = jnp.asarray(bands), jnp.asarray(sink)
  member = _reach(jnp, bands, sink, t, s, options)
  return block_lists.pack(member, member.shape[-1])


def _reach(xp, bands, sink, t, s, options):
  """Whether a query of block i may see a key of block j: bool [H, NQ, NK].

  The first block is there where a row would be empty: a list has one block
  at least, and the mask hides it.
  """
  first, last = _ends(xp, t, options.block_q)
  start, stop = _ends(xp, s, options.block_kv)
  # The distances between two blocks are all those from least to most.
  least = first[:, None] - stop
  most = last[:, None] - start
  if options.causal:
    least = xp.maximum(least, 0)
  low, high = (bands[..., i, None, None] for i in range(2))
  member = xp.any((low <= most) & (high >= least), axis=1)
  member = member | (start < sink[:, None, None])
  if options.causal:
    member = member & (most >= 0)
  empty = ~xp.any(member, axis=-1, keepdims=True)
  return member | (empty & (xp.arange(len(start)) == 0))


def _ends(xp, length, block):
  """The first and the last position of each block, int32."""
  first = xp.arange(0, length, block, dtype=xp.int32)
  return first, xp.minimum(first + block, length) - 1
