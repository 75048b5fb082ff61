"""Systems of members whose decay is a vector, one per key channel (KDA, GLA).

The score of t and j is sum_d q_td k_jd exp(g_{j+1,d} + .. + g_td): no single
product of decayed keys, since either factor may overflow. Here each pair of
tokens is split at the border between the two halves of the smallest aligned
block of 2, 4, 8 .. C tokens that holds both: the later token decays since the
border, the earlier one up to it, both factors are at most 1 for any decay
below one, and each of the log2 C levels is one product under a mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import products
from kernels_pallas.linear import chunk

# Tokens of the block that the finest levels are computed in together.
_MIN_WIDTH = 16


def vector_system(
  q: jax.Array,
  k: jax.Array,
  p: jax.Array | None,
  gates: chunk.Gates,
  segments: chunk.Segments | None,
  *,
  scale: float,
  delta: bool,
  whole: bool = False,
  precision: jax.lax.PrecisionLike = "highest",
  mask_dot: products.MaskDot = products.mask_dot,
) -> chunk.System:
  """The system of a chunk under per-channel decay.

  Args:
    q: `[..., C, K]`.
    k: `[..., C, K]`.
    p: `[..., C, K]`, the erase key; None is the decay times k.
    gates: `log_decay` `[..., C, K]`, and `beta` `[..., C, 1]` or None.
    segments: None is one segment.
    scale: of q.
    delta: whether values are corrected by what the state predicts.
    whole: whether every level is one product of all rows, instead of a
      batch of small ones (a Pallas kernel has no batches).
    precision: of the products of decayed q, k and p.
    mask_dot: as for `chunk.scalar_system`.

  Returns:
    The `chunk.System`, whose q, k and p carry the decays.
  """
  masks = chunk.Masks(q.shape[-2], segments)
  free = delta and p is not None
  g = gates.log_decay
  rows = {"at": q}
  if delta:
    rows["lower"] = p if free else k
  scores = _scores(rows, k, g, masks, free, whole, precision, mask_dot)
  diagonal = masks.token == masks.source
  own = jnp.sum(q * k, axis=-1, keepdims=True)
  at = scores["at"] + jnp.where(diagonal, own, 0.0)
  beta = gates.beta
  weigh = lambda x: x if beta is None else x * chunk.flip(beta)
  decay = lambda mask: jnp.exp(mask_dot(mask, g))
  upto = decay(masks.token >= masks.source)
  total = upto[..., -1:, :]
  before = since = _keep(upto, masks.inside)
  if free:
    before = decay(masks.token > masks.source)
    before = _keep(before, masks.inside)
  if masks.inside is not None:
    total = jnp.where(masks.inside[..., -1:, :], total, 0.0)
  ones = jnp.ones((*g.shape[:-1], 1), g.dtype)
  return chunk.System(
    p=rows["lower"] * before if delta else None,
    q=q * since,
    k=k * _keep(decay(masks.token < masks.source), masks.leaving),
    lower=weigh(scores["lower"]) if delta else None,
    at=weigh(at) * scale,
    p_scale=(ones,) if delta else (),
    q_scale=(ones * scale,),
    k_scale=(ones if beta is None else beta,),
    decay=((chunk.flip(total),),),
  )


def _keep(x, tokens):
  """Zero at other tokens than these; None is all."""
  return x if tokens is None else jnp.where(tokens, x, 0.0)


def _scores(rows, k, g, masks, free, whole, precision, mask_dot):
  """Decayed products of each of `rows` with k, strictly lower triangular."""
  size = k.shape[-2]
  out = dict.fromkeys(rows, 0.0)
  half = 1
  while half < size:
    width = size if whole else min(size, max(_MIN_WIDTH, 2 * half))
    token, source = chunk.iota(width, 0), chunk.iota(width, 1)
    pieces = _blocks(g, width)
    decay = lambda mask, pieces=pieces: jnp.exp(mask_dot(mask, pieces))
    half_of = lambda x, half=half: chunk.block(x, half)
    whole_of = lambda x, half=half: chunk.block(x, 2 * half)
    late = half_of(token) > 2 * whole_of(token)
    same_half = half_of(token) == half_of(source)
    # An early token decays from itself to the border, a late one from the
    # border to itself; the free erase key of a token meets the state before
    # that token's own decay.
    early = ~late & same_half & (source > token)
    factors = {
      True: decay(early | late & same_half & (source <= token)),
      False: None,
    }
    if free:
      factors[False] = decay(early | late & same_half & (source < token))
    pair = (whole_of(token) == whole_of(source)) & (
      half_of(token) > half_of(source)
    )
    columns = _blocks(k, width) * factors[True]
    for name, x in rows.items():
      factor = factors[not (free and name == "lower")]
      product = products.dot(
        _blocks(x, width) * factor, columns, tb=True, precision=precision
      )
      out[name] += _diagonal(jnp.where(pair, product, 0.0), size)
    half *= 2
  return {name: jnp.where(masks.causal(), x, 0.0) for name, x in out.items()}


def _blocks(x, width):
  """`[..., C, K]` to `[..., C / width, width, K]`; itself if one block."""
  if x.shape[-2] == width:
    return x
  return x.reshape(*x.shape[:-2], -1, width, x.shape[-1])


def _diagonal(x, size):
  """Blocks `[..., C / width, width, width]` on the diagonal of `[.., C, C]`."""
  width = x.shape[-1]
  if width == size:
    return x
  count = size // width
  x = x.reshape(*x.shape[:-3], size, width)
  inside = chunk.block(chunk.iota(size, 0), width) == chunk.block(
    chunk.iota(size, 1), width
  )
  return jnp.where(inside, jnp.concatenate([x] * count, axis=-1), 0.0)
