"""Which key blocks a query block should attend to exactly.

Scores are those of mean queries with mean keys, `s q_i k_j`: one product of
1 / (2 block_q block_kv) of dense attention's work. Blocks a query block may
only see in part are always listed, because nothing can be pooled of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments, meshes
from kernels_pallas.sparse import (
  api,
  choose,
  core,
  problem,
)
from kernels_pallas.sparse import blocks as block_lists
from kernels_pallas.sparse import scores as scoring

METHODS = ("topk", "threshold", "top_p")
_ARGUMENT = {"topk": "density", "threshold": "tau", "top_p": "top_p"}


def select_blocks(
  q: jax.Array,
  k: jax.Array,
  *,
  block_q: int = 64,
  block_kv: int = 64,
  method: str = "topk",
  density: float | None = None,
  tau: float | None = None,
  top_p: float | None = None,
  min_density: float = 0.0,
  max_density: float = 1.0,
  always: tuple[int | str, ...] = (),
  causal: bool = False,
  segment_ids: jax.Array | None = None,
  covariance_aware: bool = False,
  error_aware: bool = False,
  scale: float | None = None,
  v: jax.Array | None = None,
) -> block_lists.BlockIndices:
  """Lists, for each query block and head, the key blocks to keep exact.

  "topk" lists the `density` share of the blocks that a query block sees with
  the highest scores (PISA). "threshold" lists those whose score exceeds the
  row's mean by `tau` standard deviations, both from the mean and the
  per-channel variance of the mean keys (the "diag" form of Sol-Attn,
  arXiv:2607.24027): of Gaussian scores a share of 1 - Phi(tau). "top_p" lists
  the fewest blocks with the share `top_p` of the softmax over blocks.

  The shares `min_density` and `max_density` of what a row sees bound the last
  two, the highest scores first; what exceeds the bound falls to the tail. A
  list has at least one block and all that are forced, which count in its
  share and may exceed it.

  Forced blocks are listed whatever their scores. Queries, keys and values
  that are not finite do not take part in scores; of the blocks that are not
  forced, those that hold such keys come first.

  Args:
    q: `[B, T, H, K]`.
    k: `[B, S, G, K]`.
    block_q: queries of a block.
    block_kv: keys of a block.
    method: "topk", "threshold" or "top_p".
    density: of "topk", in (0, 1].
    tau: of "threshold", in standard deviations.
    top_p: of "top_p", in (0, 1].
    min_density: of "threshold" and "top_p", in [0, 1].
    max_density: of "threshold" and "top_p", in (0, 1]; with it falls M, and
      with M the work of implementations that pad lists.
    always: blocks that every list has: their numbers, from the end where
      negative (0 is an attention sink's), and "diagonal" for those that
      overlap the query block in position.
    causal: whether a query sees no later key; the diagonal is then forced.
    segment_ids: int `[B, T]`, as `block_sparse_attention` takes it; blocks
      of several segments are forced where a query may see some of their
      keys. Segments should be contiguous.
    covariance_aware: adds log(||H_j||_F + 1e-5) to the scores, H_j the
      covariance of a block's keys with its values times its length: blocks
      that their mean describes badly come first (PISA, for images).
    error_aware: scores a block by the error that its mean key makes for the
      mean query, log sum_t |exp(s q_i k_t) - exp(s q_i k_j)| (SVG-EAR,
      arXiv:2603.08982): 1 / block_q of dense attention's scores.
    scale: of the scores; None is K**-0.5.
    v: `[B, S, G, V]`, for `covariance_aware`.

  Returns:
    A `BlockIndices`, ascending, with the achieved density: the listed share
    of the blocks that queries can see. It has no gradient.

  Raises:
    TypeError: naming the argument, for dtypes that are not allowed.
    ValueError: naming the argument, for shapes and values that are not.
  """
  b, t, s, heads, _ = api.sizes(q, k, k if v is None else v)
  scale = arguments.check_scale(scale, jnp.shape(q)[-1])
  block_q = api.check_block("block_q", block_q)
  block_kv = api.check_block("block_kv", block_kv)
  options = problem.Options(
    scale, block_q, block_kv, causal=api.check_causal(causal, t, s)
  )
  amount = _check_method(method, density, tau, top_p)
  low = choose.check_share("min_density", min_density, zero=True)
  high = choose.check_share("max_density", max_density)
  if method == "topk" and (low, high) != (0.0, 1.0):
    raise ValueError(
      "min_density and max_density bound the methods threshold and top_p; "
      "method topk has its density"
    )
  if low > high:
    raise ValueError(
      f"min_density must be at most max_density = {high}, got {low}"
    )
  if covariance_aware and v is None:
    raise ValueError("covariance_aware needs v, got None")
  if covariance_aware and error_aware:
    raise ValueError("covariance_aware and error_aware are two other scores")
  if (covariance_aware or error_aware) and method == "threshold":
    raise ValueError(
      "the threshold's moments are those of the plain scores; allowed with "
      "covariance_aware and error_aware: topk, top_p"
    )
  rule = _Rule(
    method=method,
    amount=amount,
    low=amount if method == "topk" else low,
    high=amount if method == "topk" else high,
    covariance_aware=bool(covariance_aware),
    error_aware=bool(error_aware),
    always=_entries(always, problem.num_blocks(s, block_kv)),
  )
  used = (q, k, v) if covariance_aware else (q, k)
  used = (jax.lax.stop_gradient(x) for x in api.common(*used))
  arrays = dict(zip("qkv", used, strict=False))
  arrays["segment_ids"] = api.check_segments(segment_ids, b, t, s)
  layout = meshes.Layout(
    arrays=dict(q="BTHK", k="BSGK", v="BSGV", segment_ids="BT"),
    out=("BHNM", "BHN", "BHN"),
  )
  indices, counts, seen = meshes.run(
    lambda x: _select(**x, options=options, rule=rule), arrays, layout
  )
  share = jnp.sum(counts) / jnp.sum(seen)
  return block_lists.BlockIndices(indices, counts, share.astype(jnp.float32))


class _Rule(NamedTuple):
  """What `select_blocks` was asked for: `amount` is its method's."""

  method: str
  amount: float
  low: float
  high: float
  covariance_aware: bool
  error_aware: bool
  always: list[int | str]


def _select(q, k, v=None, *, segment_ids, options, rule):
  """The lists, their counts, and how many blocks each query block sees."""
  b, t, heads, _ = q.shape
  num_q = problem.num_blocks(t, options.block_q)
  num_kv = problem.num_blocks(k.shape[1], options.block_kv)
  none = jnp.zeros((b, heads, num_q), jnp.int32)
  values = k if v is None else v
  exact = core.pad(
    problem.Inputs(q, k, values, none[..., None], none, segments=segment_ids),
    options,
  )
  forced = _forced(rule.always, num_q, num_kv, options, t)
  longest = max(
    1,
    choose.rounded(rule.high, num_kv),
    _most_forced(forced, exact, options),
  )
  longest = min(int(longest), num_kv)
  allowed, forced = _visibility(exact, options, t, forced)
  scored = scoring.score_blocks(exact, options, t, error_aware=rule.error_aware)
  scores = scored.scores
  if rule.covariance_aware:
    scores = scores + scoring.repeat(scoring.spread(scored), scores)
  candidates = choose.Candidates(scores, allowed, forced, scored.odd)
  wanted = None
  if rule.method == "threshold":
    wanted = scores > scoring.gaussian_bound(
      scored, allowed, options, rule.amount
    )
  if rule.method == "top_p":
    wanted = choose.heaviest(candidates, rule.amount)
  lists = choose.choose(
    candidates, longest, low=rule.low, high=rule.high, wanted=wanted
  )
  seen = jnp.sum(jnp.broadcast_to(allowed, scores.shape), -1, dtype=jnp.int32)
  return lists.indices, lists.counts, seen


def _check_method(method, density, tau, top_p) -> float:
  """The one amount that the method has."""
  if method not in METHODS:
    raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
  given = {"density": density, "tau": tau, "top_p": top_p}
  own = _ARGUMENT[method]
  for name, value in given.items():
    if (value is None) == (name == own):
      raise ValueError(
        f"method {method!r} needs {own} and no other amount, got {name}="
        f"{value!r}"
      )
  if own == "tau":
    value = arguments.number(tau)
    if value is None or not math.isfinite(value):
      raise ValueError(f"tau must be a number, and finite, got {tau!r}")
    return value
  return choose.check_share(own, given[own])


def _forced(always, num_q, num_kv, options, length) -> np.ndarray:
  """Which blocks `always` and causality force: bool [NQ, NK]."""
  start = np.arange(num_q)[:, None] * options.block_q
  stop = np.minimum(start + options.block_q, length)
  first = np.arange(num_kv) * options.block_kv
  overlap = (first < stop) & (first + options.block_kv > start)
  forced = np.zeros((num_q, num_kv), bool)
  if options.causal:
    forced |= overlap
  for entry in always:
    if entry == "diagonal":
      forced |= overlap
    else:
      forced[:, entry] = True
  if options.causal:
    forced &= first < stop
  return forced


def _entries(always, num_kv) -> list[int | str]:
  """What `always` holds, checked."""
  if isinstance(always, str) or not np.iterable(always):
    raise ValueError(
      "always must be a sequence of 'diagonal' and block numbers, got "
      f"{always!r}"
    )
  entries = []
  for entry in always:
    if isinstance(entry, str) and entry == "diagonal":
      entries.append(entry)
      continue
    try:
      entries.append(arguments.integer("always", entry, -num_kv, num_kv - 1))
    except ValueError as e:
      raise ValueError(
        "always must hold 'diagonal' and block numbers from "
        f"{-num_kv} to {num_kv - 1}, got {entry!r}"
      ) from e
  return entries


def _most_forced(forced, exact, options) -> int:
  """How many blocks a list may have to hold, whatever its share."""
  most = int(forced.sum(axis=1).max())
  if exact.q_segments is not None:
    # Of contiguous segments a query block sees in part, beside the blocks at
    # its own place, those where its first begins and where its last ends.
    most += 2 + (options.block_q - 1) // options.block_kv + 2
  return most


def _visibility(exact, options, length, forced):
  """(allowed, forced) of `Candidates`."""
  num_q, num_kv = forced.shape
  allowed = np.ones_like(forced)
  if options.causal:
    stop = np.minimum((np.arange(num_q) + 1) * options.block_q, length)
    allowed = np.arange(num_kv) * options.block_kv < stop[:, None]
  if exact.q_segments is None:
    return jnp.asarray(allowed)[None, None], jnp.asarray(forced)[None, None]

  def ends(ids, size):
    ids = ids.reshape(ids.shape[0], 1, -1, size)
    return jnp.min(ids, axis=-1), jnp.max(ids, axis=-1)

  q_low, q_high = ends(exact.q_segments, options.block_q)
  low, high = ends(exact.kv_segments, options.block_kv)
  meets = (low[:, :, None] <= q_high[..., None]) & (
    high[:, :, None] >= q_low[..., None]
  )
  allowed = meets & allowed
  return allowed, allowed & (forced | (low != high)[:, :, None])


def select_within(
  exact: problem.Exact,
  options: problem.Options,
  density: float,
  *,
  error_aware: bool = False,
) -> block_lists.BlockIndices:
  """The `density` share of a padded problem's blocks, of those not empty.

  What `select_blocks` does where nothing but the blocks' lengths limits the
  choice; a row of blocks that are all empty is not allowed.
  """
  stop = jax.lax.stop_gradient
  exact = exact._replace(k=stop(exact.k), q=stop(exact.q), v=stop(exact.v))
  scored = scoring.score_blocks(
    exact, options, exact.q.shape[2], error_aware=error_aware
  )
  allowed = scoring.repeat(exact.lengths > 0, scored.scores)
  return choose.best(scored.scores, allowed, density, scored.odd)
