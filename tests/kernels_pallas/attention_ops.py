"""Every function of softmax attention as one of q, k, v and what goes along."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import kernels_pallas as ops

B, T, H, G, K = 4, 16, 4, 2, 4


def arrays(dtype: Any = np.float32, batch: int = B) -> dict[str, np.ndarray]:
  """q, k, v; two documents per row; the clusters of queries and keys."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return dict(
    q=draw(batch, T, H, K),
    k=draw(batch, T, G, K),
    v=draw(batch, T, G, K),
    ids=np.repeat([[0, 1]], [9, 7], axis=1).repeat(batch, 0),
    clusters=rng.integers(0, 3, (batch, H, T)),
  )


def _piecewise(**options):
  apart = options.get("tail") is not None

  def run(q, k, v, ids, clusters, **more):
    del clusters
    # The default tail has one slope for all, and no documents.
    more["segment_ids"] = ids if apart else None
    return ops.piecewise_attention(
      q, k, v, block_size=4, causal=True, **options, **more
    )  # fmt: skip

  return run


def _clustered(q, k, v, ids, clusters, **more):
  """Keys and values have as many heads as queries: they are the queries."""
  del k, v, ids
  return ops.clustered_attention(
    q, q, q, q_clusters=clusters, kv_clusters=clusters, num_kv_clusters=3,
    density=0.3, block_size=4, **more
  )  # fmt: skip


def _prefixed(q, k, v, ids, clusters, **more):
  del clusters
  suffixes = tuple(jnp.stack([x[:, :7], x[:, 7:14]], 1) for x in (q, k, v))
  return ops.prefix_shared_attention(
    (q, k, v), suffixes, prefix_lengths=ids[:, 0] + 5, **more
  )


def _error_aware(q, k, v, ids, clusters, **more):
  del clusters
  blocks = ops.select_blocks(
    q, k, v=v, block_q=4, block_kv=4, density=0.5, causal=True,
    segment_ids=ids, error_aware=True,
  )  # fmt: skip
  return ops.block_sparse_attention(
    q, k, v, blocks, block_q=4, block_kv=4, causal=True, segment_ids=ids, **more
  )


# Those in which a position sees no later one and no other document.
CONFINED = {
  "full": lambda q, k, v, ids, clusters, **more: ops.full_attention(
    q, k, v, causal=True, segment_ids=ids, **more
  ),
  "window": lambda q, k, v, ids, clusters, **more: ops.windowed_attention(
    q, k, v, window=50, segment_ids=ids, block_q=4, block_kv=4, **more
  ),
  "drop": _piecewise(tail="drop", density=0.5),
  "mean": _piecewise(tail="mean", density=0.5),
  "mean_local": _piecewise(tail="mean_local", density=0.5),
  "mean_var": _piecewise(tail="mean_var", density=0.5),
  "threshold": _piecewise(tail="mean", method="threshold", tau=1.0),
  "top_p": _piecewise(tail="mean", method="top_p", top_p=0.4),
  "covariance": _piecewise(tail="mean", density=0.5, covariance_aware=True),
}
OPS = {
  **CONFINED,
  "error_aware": _error_aware,
  "lengths": lambda q, k, v, ids, clusters, **more: ops.full_attention(
    q, k, v, lengths=ids[:, 0] + 9, **more
  ),
  "near": lambda q, k, v, ids, clusters, **more: ops.windowed_attention(
    q, k, v, window=5, sink=1, block_q=4, block_kv=4, **more
  ),
  "mean_global": _piecewise(density=0.4),
  "in_context": lambda q, k, v, ids, clusters, **more: ops.in_context_attention(
    q, k, v, context_length=8, block_size=4, density=0.3,
    residual=jnp.ones(()), **more
  ),
  "causal_context": lambda q, k, v, ids, clusters, **more: (
    ops.in_context_attention(
      q, k, v, context_length=8, block_size=4, density=0.3, causal=True, **more
    )
  ),
  "clusters": _clustered,
  "prefix": _prefixed,
}  # fmt: skip
