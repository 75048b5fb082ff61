"""Lists from scores: the best so many of each row, without sorting."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments, meshes
from kernels_pallas.sparse import blocks as block_lists

_BITS = 32


class Candidates(NamedTuple):
  """What a query block may list.

  Attributes:
    scores: `[B, H, NQ, NK]`, float32 (float64 where q is).
    allowed: bool, broadcastable to the scores: of which it sees some key.
    forced: bool, likewise: which it must list; all allowed.
    odd: bool, likewise: which come before those with any score, as do scores
      of NaN.
  """

  scores: jax.Array
  allowed: jax.Array
  forced: jax.Array
  odd: jax.Array


def check_share(name: str, share: Any, *, zero: bool = False) -> float:
  """A share as a float; ValueError unless it lies in (0, 1] (or [0, 1])."""
  number = arguments.number(share)
  if number is None or not (0 < number <= 1 or (zero and number == 0)):
    allowed = "[0, 1]" if zero else "(0, 1]"
    raise ValueError(f"{name} must be a number in {allowed}, got {share!r}")
  # The decimal that a narrower NumPy number was written as, see `rounded`.
  return float(str(share)) if isinstance(share, np.floating) else number


def rounded(share: float, number: Any) -> Any:
  """floor(share * number), as if `share` were exact in decimal."""
  return np.floor(np.asarray(number) * share + 1e-9).astype(np.int32)


def heaviest(candidates: Candidates, top_p: float) -> jax.Array:
  """The fewest blocks with a share `top_p` of each row's softmax."""
  # What overflows has the largest weight, rather than none that is a number.
  most = jnp.finfo(jnp.float32).max
  scores = jnp.nan_to_num(candidates.scores.astype(jnp.float32), nan=most)
  scores = jnp.where(candidates.allowed, scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1)
  order = _ordered(scores)
  # Sums of 2048 probabilities in float32 may miss 1 by some 1e-6.
  bound = _bound(order, probs, jnp.float32(top_p * (1 - 1e-6)))
  return order >= bound


def choose(
  candidates: Candidates,
  longest: int,
  *,
  low: float,
  high: float,
  wanted: jax.Array | None = None,
) -> block_lists.BlockIndices:
  """Lists the best of the candidates.

  Args:
    candidates: of which each row has at least one.
    longest: M.
    low: each row lists at least this share of what it sees,
    high: and at most this one; but always one, and what is forced.
    wanted: bool `[B, H, NQ, NK]`, how many are listed between the two; None
      where they are the same.

  Returns:
    A `BlockIndices` without a density.
  """
  scores, allowed, forced, odd = candidates
  num_kv = scores.shape[-1]
  count = lambda x: jnp.sum(
    jnp.broadcast_to(x, scores.shape), axis=-1, dtype=jnp.int32
  )
  seen, due = count(allowed), count(forced)
  shares = lambda share: jnp.asarray(rounded(share, np.arange(num_kv + 1)))
  number = least = jnp.maximum(jnp.maximum(shares(low)[seen], 1), due)
  if wanted is not None:
    most = jnp.maximum(jnp.maximum(shares(high)[seen], 1), due)
    wanted = ((wanted | odd) & allowed) | forced
    number = jnp.clip(count(wanted), least, most)
  number = jnp.minimum(number, longest)
  # By index, not by score: no score is above these.
  int32 = jnp.iinfo(jnp.int32)
  order = jnp.where(odd | jnp.isnan(scores), int32.max - 1, _ordered(scores))
  order = jnp.where(forced, int32.max, order)
  order = jnp.where(allowed, order, int32.min)
  member = _top(order, number)
  return block_lists.BlockIndices(*block_lists.pack(member, longest))


def best(
  scores: jax.Array,
  allowed: jax.Array,
  share: float,
  odd: jax.Array | None = None,
) -> block_lists.BlockIndices:
  """Lists a `share` of the allowed blocks, none of which is forced.

  Args:
    scores: `[B, H, NQ, NK]`.
    allowed: bool, broadcastable to the scores.
    share: in (0, 1]; every row lists at least one block.
    odd: as of `Candidates`; None is none.

  Returns:
    A `BlockIndices` without a density.
  """
  longest = max(1, int(rounded(share, scores.shape[3])))
  none = jnp.zeros_like(allowed)
  candidates = Candidates(scores, allowed, none, none if odd is None else odd)
  return choose(candidates, longest, low=share, high=share)


def _ordered(x):
  """int32 in the order of float32 `x`; -0 is 0."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.int32)
  return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _bound(order, weights, target):
  """The largest x of each row with sum(weights[order >= x]) >= target.

  Found bit by bit: 32 sums cost less than sorting, on every platform.
  """
  lowest = jnp.full((*order.shape[:-1], 1), jnp.iinfo(jnp.int32).min)
  lowest, *_ = meshes.vary_alike((lowest, order, weights, target))

  def body(i, x):
    higher = x + jnp.left_shift(jnp.int32(1), _BITS - 1 - i)
    mass = jnp.sum(
      jnp.where(order >= higher, weights, 0), axis=-1, keepdims=True
    )
    return jnp.where(mass >= target, higher, x)

  return jax.lax.fori_loop(0, _BITS, body, lowest)


def _top(order, number):
  """The `number` [..] largest of each row; of equal ones the first."""
  number = number[..., None]
  bound = _bound(order, jnp.int32(1), number)
  above = order > bound
  equal = order == bound
  rank = jnp.cumsum(equal, axis=-1, dtype=jnp.int32)
  spare = number - jnp.sum(above, axis=-1, dtype=jnp.int32, keepdims=True)
  return above | (equal & (rank <= spare))
