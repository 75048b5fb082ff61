"""What every implementation of block-sparse attention is given.

Dimensions: B batch, T queries, S keys, H query/value heads, G key heads (G
divides H: query head h reads key head `h // (H / G)`), K query/key size, V
value size, NQ = ceil(T / block_q) query blocks, NK = ceil(S / block_kv) key
blocks, M the longest list, s the scale.

Query block i attends exactly to the blocks j of its list. Of the others those
that all its queries may see whole are pooled, unless the tail is "drop": with
L_j keys of mean k_j and values of mean v_j, and H_j the sum over the block of
(k - k_j) v^T, a query q meets block j as one key of

  weight  L_j exp(s q k_j)      times exp(min(s^2 (q^2) var_j / 2, 2)) for
                                "mean_var", var_j the keys' variances,
  value   v_j                   plus s q H_j / L_j for "mean_local", or
                                s q H / N for "mean_global", where H sums H_j
                                over the N keys that could be pooled, listed
                                or not.

Exact and pooled keys share one softmax. The first order has no part in the
denominator: the deviations from the mean sum to 0. ("mean_global" is PISA,
arXiv:2602.01077; "mean" its zeroth order, as in Sol-Attn, arXiv:2607.24027.)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

TAILS = ("drop", "mean", "mean_global", "mean_local", "mean_var")
# Finite, so that a row with nothing to attend to gives no NaN.
MASKED = -1e30
# The second cumulant is an expansion around 0: bounded where it is not small.
MAX_CUMULANT = 2.0


class Inputs(NamedTuple):
  """The arrays of one problem; q, k and v share one dtype.

  Attributes:
    q: `[B, T, H, K]`, not yet scaled.
    k: `[B, S, G, K]`.
    v: `[B, S, G, V]`.
    indices: int32 `[B, H, NQ, M]`, distinct up to the count.
    counts: int32 `[B, H, NQ]`, how many of each list are meant.
    lengths: int32 `[B, G, NK]`, how many keys of each block exist, the first
      ones; 0 leaves a block out. None is all of them.
    segments: int32 `[B, T]`, queries see keys of their own; None is one.
    bands: int32 `[H, N, 2]`: where given, a query sees only keys whose
      distance (its position less theirs) lies within `[low, high]` of one
      band, and those that `sink_tokens` grants. Only with the tail "drop".
    sink_tokens: int32 `[H]`, how many of the first keys bands do not hide.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  indices: jax.Array
  counts: jax.Array
  lengths: jax.Array | None = None
  segments: jax.Array | None = None
  bands: jax.Array | None = None
  sink_tokens: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Options:
  """What is known when a problem is traced.

  Attributes:
    scale: multiplies the scores.
    block_q: queries of a block.
    block_kv: keys of a block.
    tail: one of `TAILS`.
    causal: whether a query sees no later key (then T = S).
    interpret: whether Pallas kernels are interpreted, or with which
      parameters (`pltpu.InterpretParams`).
  """

  scale: float
  block_q: int
  block_kv: int
  tail: str = "drop"
  causal: bool = False
  interpret: bool | Any = False


class Exact(NamedTuple):
  """`Inputs` as kernels want them: heads first, padded to whole blocks.

  Padded queries give rows that are cut off; padded keys are beyond their
  block's length.

  Attributes:
    q: `[B, H, NQ * block_q, K]`.
    k: `[B, G, NK * block_kv, K]`.
    v: `[B, G, NK * block_kv, V]`.
    indices: int32 `[B, H, NQ, M]`.
    counts: int32 `[B, H, NQ]`.
    lengths: int32 `[B, G, NK]`.
    q_segments: int32 `[B, NQ * block_q]` or None.
    kv_segments: int32 `[B, NK * block_kv]` or None.
    bands: int32 `[H, N, 2]` or None.
    sink_tokens: int32 `[H]` or None; given where bands are.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  indices: jax.Array
  counts: jax.Array
  lengths: jax.Array
  q_segments: jax.Array | None
  kv_segments: jax.Array | None
  bands: jax.Array | None
  sink_tokens: jax.Array | None


class Tail(NamedTuple):
  """The pooled keys, float32 (float64 where q is), heads first.

  Pooled key j of query block i has for a query q the score
  `s q k_j + bias_ij` (plus the second cumulant) and the value
  `v_j + s q slope_i` (or `v_j + s q local_j`).

  Attributes:
    k: `[B, G, NK, K]`, mean keys.
    v: `[B, G, NK, V]`, mean values.
    bias: `[B, H, NQ, NK]`, log L_j, or `MASKED` where block j is in the list
      of i or cannot be pooled for it, as if its keys have several segments.
    segments: int32 `[B, NK]`, the segment of a block's keys; a query sees
      those of its own. None is one segment.
    variance: `[B, G, NK, K]` of "mean_var", else None.
    slope: `[B, G, 1 or NQ, K, V]` of "mean_global", else None: H / N, of one
      query block each where causal.
    local: `[B, G, NK, K, V]` of "mean_local", else None: H_j / L_j.
  """

  k: jax.Array
  v: jax.Array
  bias: jax.Array
  segments: jax.Array | None = None
  variance: jax.Array | None = None
  slope: jax.Array | None = None
  local: jax.Array | None = None


def num_blocks(length: int, size: int) -> int:
  """Blocks of `size` that cover `length`."""
  return -(-length // size)
