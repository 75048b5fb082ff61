"""Attention to lists of key blocks, with the rest pooled or dropped.

Shapes are in `problem`'s letters, arrays `[B, T, H, K]` as in
`jax.nn.dot_product_attention`. Common arguments, returns and errors of the
functions of this package:

  block_q, block_kv: queries and keys of a block, any sizes for "reference"
    and "xla"; the Pallas kernels say which they take. T and S need not be
    multiples: the last block has its true length.
  scale: multiplies the scores; None is K**-0.5.
  causal: a query sees no later key; needs T = S. Blocks that are not wholly
    before a query block are never pooled: they belong in its list
    (`select_blocks` puts them there), and are dropped if they are not.
  segment_ids: int `[B, T]`, needs T = S: a query sees keys of its own id. A
    block is pooled for the queries whose id all its keys have.
  sinks: float `[H]`, learned logits that take part in the softmax's
    denominator and have no value.
  return_lse: also return the log-partition, float32 `[B, T, H]`, -1e30 in
    rows that see nothing (their output is 0): what merging with attention to
    other keys needs. It can be differentiated too.
  implementation: "reference" (every score written down), "xla" (gathered
    blocks, any platform), "pallas_tpu", "pallas_gpu"; a sequence of names is
    a preference order; None is the best for the platform. Nothing falls back
    to dense attention.
  interpret: runs a Pallas implementation in Pallas's interpreter.

A query that sees a key which, or whose value, is not finite is NaN, with the
blocks that are pooled as with those that are listed; no other query is.

Batch and heads may be divided over a mesh, also over axes of
`AxisType.Explicit` and within `jax.shard_map`: every device attends to its
own part.

Statistics, scores and sums are float32 (float64 for float64 inputs); outputs
have v's dtype. Every floating input can be differentiated. Lists have no
gradient: which blocks are chosen is not differentiable.

Raises ValueError for shapes, sizes and names that do not fit or are not
allowed, TypeError for arrays of other dtypes, each naming the argument, and
NotImplementedError with the reason where a named implementation cannot run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, dispatch, meshes
from kernels_pallas.sparse import blocks as block_lists
from kernels_pallas.sparse import core, problem

Implementation = dispatch.Implementation


def block_sparse_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: block_lists.BlockIndices,
  *,
  block_q: int = 64,
  block_kv: int = 64,
  tail: str = "drop",
  scale: float | None = None,
  causal: bool = False,
  segment_ids: jax.Array | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
  implementation: Implementation = None,
  interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Attends exactly to the listed blocks and pools or drops the others.

  Args:
    q: `[B, T, H, K]`, K up to 256.
    k: `[B, S, G, K]`.
    v: `[B, S, G, V]`.
    blocks: for each query block the key blocks, as `select_blocks` returns
      them; duplicates and blocks that do not exist are refused where the
      values are known, that is outside `jax.jit`.
    block_q: as the module says, and so what follows but `tail`.
    block_kv: keys of a block.
    tail: what the blocks not listed contribute: "drop" nothing, "mean" their
      mean key and value with their length as weight, "mean_global" also
      PISA's global first-order term (not with `segment_ids`), "mean_local"
      the first-order term of each block, "mean_var" the mean with the
      diagonal second cumulant in the weight.
    scale: of the scores.
    causal: whether a query sees no later key.
    segment_ids: int `[B, T]`.
    sinks: float `[H]`.
    return_lse: also return the log-partition.
    implementation: which code.
    interpret: whether Pallas interprets.

  Returns:
    `[B, T, H, V]`, and on request the log-partition `[B, T, H]`.
  """
  b, t, s, heads, _ = sizes(q, k, v)
  block_q = check_block("block_q", block_q)
  block_kv = check_block("block_kv", block_kv)
  if tail not in problem.TAILS:
    raise ValueError(f"tail must be one of {list(problem.TAILS)}, got {tail!r}")
  if tail == "mean_global" and segment_ids is not None:
    raise ValueError(
      "tail 'mean_global' has one slope for all queries and does not go with "
      "segment_ids; allowed with them: drop, mean, mean_local, mean_var"
    )
  num_q = problem.num_blocks(t, block_q)
  indices, counts = block_lists.check(
    blocks, (b, heads, num_q), problem.num_blocks(s, block_kv)
  )
  q, k, v = common(q, k, v)
  inputs = problem.Inputs(
    q=q,
    k=k,
    v=v,
    indices=indices,
    counts=counts,
    segments=check_segments(segment_ids, b, t, s),
  )
  options = problem.Options(
    scale=arguments.check_scale(scale, q.shape[-1]),
    block_q=block_q,
    block_kv=block_kv,
    tail=tail,
    causal=check_causal(causal, t, s),
    interpret=interpret,
  )
  return attend(inputs, options, sinks, return_lse, implementation)


def attend(
  inputs: problem.Inputs,
  options: problem.Options,
  sinks: Any,
  return_lse: bool,
  implementation: Implementation,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Runs a checked problem and adds the sinks to its softmax."""
  if sinks is not None:
    heads = inputs.q.shape[2]
    sinks = arguments.shaped("sinks", sinks, (heads,), "H")

  def run(arrays):
    sinks = arrays.pop("sinks")
    given = problem.Inputs(**arrays)
    k, v = core.contained(given.k, given.v)
    out, lse = dispatch.run(
      "sparse",
      given._replace(k=k, v=v),
      options,
      implementation=implementation,
    )
    if sinks is None:
      return out, lse
    sinks = sinks.astype(lse.dtype)
    total = jnp.logaddexp(lse, sinks)
    share = jnp.exp(lse - total)[..., None]
    return (out * share).astype(out.dtype), total

  arrays = inputs._asdict() | dict(sinks=sinks)
  out, lse = meshes.run(run, arrays, _LAYOUT)
  return (out, lse) if return_lse else out


_LAYOUT = meshes.Layout(
  arrays=dict(
    q="BTHK",
    k="BSGK",
    v="BSGV",
    indices="BHNM",
    counts="BHN",
    lengths="BGJ",
    segments="BT",
    bands="HCE",
    sink_tokens="H",
    sinks="H",
  ),
  out=("BTHV", "BTH"),
)


def sizes(q: Any, k: Any, v: Any) -> tuple[int, int, int, int, int]:
  """(B, T, S, H, G) of the public arrays.

  Raises:
    TypeError: for arrays that are not floating.
    ValueError: for shapes that do not fit.
  """
  q, k, v = (
    arguments.floating(name, x) for name, x in (("q", q), ("k", k), ("v", v))
  )
  for name, x, letters in (
    ("q", q, "B, T, H, K"),
    ("k", k, "B, S, G, K"),
    ("v", v, "B, S, G, V"),
  ):
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(
        f"{name} must have the shape [{letters}] with every size at least 1, "
        f"got {list(x.shape)}"
      )
  b, t, heads, size = q.shape
  s, groups = k.shape[1:3]
  if (k.shape[0], k.shape[3]) != (b, size):
    raise ValueError(
      f"k must have the shape [B, S, G, K] with B = {b} and K = {size} as q "
      f"has, got {list(k.shape)}"
    )
  if v.shape[:3] != k.shape[:3]:
    raise ValueError(
      f"v must have the shape [B, S, G, V] with [B, S, G] = "
      f"{list(k.shape[:3])} as k has, got {list(v.shape)}"
    )
  if heads % groups:
    raise ValueError(
      f"q must have a multiple of k's and v's {groups} heads, got {heads}"
    )
  if max(size, v.shape[3]) > 256:
    raise ValueError(
      f"q, k and v must have heads of at most 256, got K = {size} and V = "
      f"{v.shape[3]}"
    )
  return b, t, s, heads, groups


def common(*arrays: Any) -> tuple[jax.Array, ...]:
  """The arrays in one dtype."""
  dtype = jnp.result_type(*arrays)
  return tuple(jnp.asarray(x, dtype) for x in arrays)


def check_block(name: str, size: Any) -> int:
  """A block's size; ValueError unless it is an int of at least 1."""
  return arguments.integer(name, size, 1)


def check_causal(causal: Any, t: int, s: int) -> bool:
  """`causal`; ValueError where it is set and the lengths differ."""
  if causal and t != s:
    raise ValueError(
      f"causal needs as many queries as keys, got T = {t} and S = {s}"
    )
  return bool(causal)


def check_segments(
  segment_ids: Any, b: int, t: int, s: int
) -> jax.Array | None:
  """`segment_ids` as int32 `[B, T]`.

  Raises:
    TypeError: unless they are integers.
    ValueError: for another shape, or T unlike S.
  """
  if segment_ids is None:
    return None
  segment_ids = arguments.integers("segment_ids", segment_ids)
  if t != s:
    raise ValueError(
      f"segment_ids needs as many queries as keys, got T = {t} and S = {s}"
    )
  arguments.check_shape("segment_ids", segment_ids, (b, t), "B, T")
  return arguments.renumbered(segment_ids)
