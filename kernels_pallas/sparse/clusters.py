"""Blocks of tokens that are alike, wherever they stand (SVG-EAR).

Keys are clustered and sorted by cluster; every cluster is cut into blocks, of
which the last one is short. Queries are sorted by their own clusters. Blocks
of alike keys are what their mean describes well, so the pooled tail is closer
than with blocks of neighbours.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments, meshes, products
from kernels_pallas.sparse import api, choose, core, problem, select
from kernels_pallas.sparse import blocks as block_lists


def kmeans(
  x: jax.Array,
  num_clusters: int,
  *,
  iterations: int = 5,
  centroids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Lloyd's algorithm in each batch entry and head, with no gradient.

  Starts from evenly spaced tokens, or from `centroids`, such as those of the
  sampling step before. A cluster that loses all its tokens keeps its place.
  Tokens that are not finite count as 0, and move no centroid.

  Args:
    x: `[B, T, H, K]`.
    num_clusters: C, from 1 to T.
    iterations: of assignment and averaging, at least 1.
    centroids: `[B, H, C, K]` to start from.

  Returns:
    int32 `[B, H, T]`, the cluster of each token, and the centroids, `[B, H,
    C, K]`, float32 (float64 where x is), from which they were assigned.

  Raises:
    TypeError: naming the argument, for dtypes that are not allowed.
    ValueError: naming the argument, for shapes and numbers that are not.
  """
  x = arguments.floating("x", x)
  if x.ndim != 4:
    raise ValueError(f"x must have the shape [B, T, H, K], got {list(x.shape)}")
  b, t, h, size = x.shape
  num_clusters = arguments.integer("num_clusters", num_clusters, 1, t)
  iterations = arguments.integer("iterations", iterations, 1, 1000)
  if centroids is not None:
    wanted = (b, h, num_clusters, size)
    centroids = arguments.shaped("centroids", centroids, wanted, "B, H, C, K")
  arrays = jax.lax.stop_gradient(dict(x=x, centroids=centroids))
  layout = meshes.Layout(
    arrays=dict(x="BTHK", centroids="BHCK"), out=("BHT", "BHCK")
  )
  return meshes.run(
    lambda arrays: _lloyd(**arrays, number=num_clusters, iterations=iterations),
    arrays,
    layout,
  )


def _lloyd(x, centroids, *, number, iterations):
  """`kmeans` of checked arguments."""
  x = jnp.swapaxes(x, 1, 2)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # Tokens that are not finite are assigned, but move no centroid.
  finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
  x = jnp.where(finite, x, 0)
  if centroids is None:
    start = x[:, :, (jnp.arange(number) * x.shape[2]) // number]
  else:
    start, _ = meshes.vary_alike((centroids.astype(x.dtype), x))

  def assign(centroids):
    # |x - c|^2 less what all clusters share.
    norms = jnp.sum(jnp.square(centroids), axis=-1)
    inner = products.einsum("bhtk,bhck->bhtc", x, centroids)
    return jnp.argmin(norms[:, :, None] - 2 * inner, axis=-1)

  def body(_, centroids):
    member = jax.nn.one_hot(assign(centroids), number, dtype=x.dtype)
    member = jnp.where(finite, member, 0)
    count = jnp.sum(member, axis=2)[..., None]
    total = products.einsum("bhtc,bhtk->bhck", member, x)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), centroids)

  centroids = jax.lax.fori_loop(0, iterations - 1, body, start)
  return assign(centroids).astype(jnp.int32), centroids


def clustered_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_clusters: jax.Array,
  kv_clusters: jax.Array,
  num_kv_clusters: int,
  density: float = 0.15,
  error_aware: bool = True,
  block_size: int = 64,
  tail: str = "mean",
  scale: float | None = None,
  implementation: api.Implementation = None,
  interpret: bool = False,
) -> jax.Array:
  """Piecewise attention among clusters (SVG-EAR, arXiv:2603.08982).

  Every block holds keys of one cluster only. Where a block is not attended
  to exactly, its mean key and value stand for it, weighted by its length; a
  cluster of several blocks has a mean for each, which is closer than the
  paper's one for all.

  Args:
    q: `[B, T, H, K]`.
    k: `[B, S, H, K]`; heads that share keys must be repeated, because each
      has its own order of them.
    v: `[B, S, H, V]`.
    q_clusters: int `[B, H, T]`, the cluster of each query (`kmeans`): any
      numbers, in whose order the queries are cut into blocks.
    kv_clusters: int `[B, H, S]`, from 0 to `num_kv_clusters` - 1, which is
      checked where the values are known, that is outside `jax.jit`. A traced
      label beyond belongs to no cluster: no query sees its key, and where a
      head has no other keys its output is 0.
    num_kv_clusters: C; the blocks are at most S / block_size + C.
    density: the listed share of those blocks.
    error_aware: as for `select_blocks`: lists the blocks whose means would
      be most wrong, as the paper does, or those with the highest scores.
    block_size: queries and keys of a block.
    tail: as for `block_sparse_attention`.
    scale: of the scores; None is K**-0.5.
    implementation: as for `block_sparse_attention`.
    interpret: whether Pallas interprets.

  Returns:
    `[B, T, H, V]` in v's dtype, in the order of q.

  Raises:
    TypeError: naming the argument, for dtypes that are not allowed.
    ValueError: naming the argument, for shapes and values that are not.
    NotImplementedError: where a named implementation cannot run.
  """
  b, t, s, heads, groups = api.sizes(q, k, v)
  if heads != groups:
    raise ValueError(f"k must have as many heads as q, {heads}, got {groups}")
  num_kv_clusters = arguments.integer("num_kv_clusters", num_kv_clusters, 1)
  q_clusters = arguments.renumbered(
    _labels("q_clusters", q_clusters, (b, heads, t), "B, H, T")
  )
  kv_clusters = _key_labels(kv_clusters, (b, heads, s), num_kv_clusters)
  density = choose.check_share("density", density)
  block_size = api.check_block("block_size", block_size)
  if tail not in problem.TAILS:
    raise ValueError(f"tail must be one of {list(problem.TAILS)}, got {tail!r}")
  options = problem.Options(
    scale=arguments.check_scale(scale, jnp.shape(q)[-1]),
    block_q=block_size,
    block_kv=block_size,
    tail=tail,
    interpret=interpret,
  )
  q, k, v = api.common(q, k, v)
  arrays = dict(q=q, k=k, v=v, q_clusters=q_clusters, kv_clusters=kv_clusters)

  def run(arrays):
    q, k, v = (jnp.swapaxes(arrays[name], 1, 2) for name in "qkv")
    order = jnp.argsort(arrays["q_clusters"], axis=-1)
    take = lambda x, slots: jnp.take_along_axis(x, slots[..., None], axis=2)
    q = take(q, order)
    source, lengths = _blocks(
      arrays["kv_clusters"], num_kv_clusters, block_size
    )
    # Slots of no key read a zero behind the end.
    behind = ((0, 0), (0, 0), (0, 1), (0, 0))
    k, v = (take(jnp.pad(x, behind), source) for x in (k, v))
    flat = lambda x: jnp.swapaxes(x, 1, 2)
    num_q = problem.num_blocks(t, block_size)
    none = jnp.zeros((*q.shape[:2], num_q), jnp.int32)
    inputs = problem.Inputs(
      flat(q), flat(k), flat(v), none[..., None], none, lengths
    )
    blocks = select.select_within(
      core.pad(inputs, options), options, density, error_aware=error_aware
    )
    inputs = inputs._replace(indices=blocks.indices, counts=blocks.counts)
    out = api.attend(inputs, options, None, False, implementation)
    return flat(take(flat(out), jnp.argsort(order, axis=-1)))

  return meshes.run(run, arrays, _LAYOUT)


_LAYOUT = meshes.Layout(
  arrays=dict(
    q="BTHK", k="BSHK", v="BSHV", q_clusters="BHT", kv_clusters="BHS"
  ),
  out="BTHV",
)


def _labels(
  name: str, x: Any, wanted: tuple[int, ...], letters: str
) -> np.ndarray | jax.Array:
  x = arguments.integers(name, x)
  arguments.check_shape(name, x, wanted, letters)
  return x


def _key_labels(x: Any, wanted: tuple[int, ...], number: int) -> jax.Array:
  """int32 `[B, H, S]`, `number` for what is no cluster's."""
  x = _labels("kv_clusters", x, wanted, "B, H, S")
  arguments.check_range("kv_clusters", x, number - 1, "num_kv_clusters - 1")
  x = jnp.asarray(arguments.saturated(x, number))
  return jnp.where(x < 0, number, x)


def _blocks(labels, num_clusters, size):
  """Slots of blocks that hold one cluster each.

  Returns:
    int32 `[B, H, NK * size]`, the key of each slot, S for none; and int32
    `[B, H, NK]`, how many keys each block has.
  """
  s = labels.shape[2]
  num_blocks = s // size + num_clusters
  member = jax.nn.one_hot(labels, num_clusters, dtype=jnp.int32)
  count = jnp.sum(member, axis=2)
  before = lambda x: jnp.cumsum(x, axis=-1) - x
  first = before((count + size - 1) // size)
  order = jnp.argsort(labels, axis=-1)
  own = jnp.take_along_axis(labels, order, axis=-1)
  # What is no cluster's comes last, and has no slot.
  of_own = lambda x: jnp.take_along_axis(x, own, axis=-1, mode="clip")
  rank = jnp.arange(s) - of_own(before(count))
  slot = (of_own(first) + rank // size) * size + rank % size
  slot = jnp.where(own < num_clusters, slot, num_blocks * size)
  empty = jnp.full((*labels.shape[:2], num_blocks * size), s, jnp.int32)
  source = block_lists.write(empty, slot, order.astype(jnp.int32))
  filled = (source < s).reshape(*labels.shape[:2], num_blocks, size)
  return source, jnp.sum(filled, axis=-1, dtype=jnp.int32)
