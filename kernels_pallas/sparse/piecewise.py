"""PISA: block-sparse attention that chooses its blocks itself."""

from __future__ import annotations

import jax

from kernels_pallas.sparse import api, select


def piecewise_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  density: float | None = None,
  block_size: int = 64,
  block_q: int | None = None,
  tail: str = "mean_global",
  method: str = "topk",
  tau: float | None = None,
  top_p: float | None = None,
  max_density: float = 1.0,
  always: tuple[int | str, ...] = (),
  covariance_aware: bool = False,
  scale: float | None = None,
  causal: bool = False,
  segment_ids: jax.Array | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
  implementation: api.Implementation = None,
  interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Piecewise sparse attention (PISA, arXiv:2602.01077).

  Each query block attends exactly to the key blocks with the highest pooled
  scores and to the others through their statistics: `select_blocks`, then
  `block_sparse_attention`. Tokens that lie close together in an image should
  lie in one block (`tile`).

  Args:
    q: `[B, T, H, K]`.
    k: `[B, S, G, K]`.
    v: `[B, S, G, V]`.
    density: share of the blocks that are exact, of the method "topk"; None is
      0.15 there.
    block_size: queries and keys of a block.
    block_q: queries of a block, where they are to differ; None is
      `block_size`. With more queries to a list, each list's keys are read
      less often.
    tail: as for `block_sparse_attention`; "mean_global" is the paper's hybrid
      first order, "mean" its zeroth, "mean_local" its block-wise first.
    method: as for `select_blocks`, and so the next five; "threshold" with the
      tail "mean" is Sol-Attn (arXiv:2607.24027).
    tau: of "threshold".
    top_p: of "top_p".
    max_density: of "threshold" and "top_p".
    always: blocks of every list.
    covariance_aware: the paper's selection for images.
    scale: as for `block_sparse_attention`, and so what follows.
    causal: whether a query sees no later key.
    segment_ids: int `[B, T]`.
    sinks: float `[H]`.
    return_lse: also return the log-partition.
    implementation: which code.
    interpret: whether Pallas interprets.

  Returns:
    `[B, T, H, V]`, and on request the log-partition `[B, T, H]`.
  """
  if density is None and method == "topk":
    density = 0.15
  if block_q is None:
    block_q = block_size
  blocks = select.select_blocks(
    q,
    k,
    block_q=block_q,
    block_kv=block_size,
    method=method,
    density=density,
    tau=tau,
    top_p=top_p,
    max_density=max_density,
    always=always,
    causal=causal,
    segment_ids=segment_ids,
    covariance_aware=covariance_aware,
    scale=scale,
    v=v if covariance_aware else None,
  )
  return api.block_sparse_attention(
    q,
    k,
    v,
    blocks,
    block_q=block_q,
    block_kv=block_size,
    tail=tail,
    scale=scale,
    causal=causal,
    segment_ids=segment_ids,
    sinks=sinks,
    return_lse=return_lse,
    implementation=implementation,
    interpret=interpret,
  )
