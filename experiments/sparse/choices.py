"""What is attended to exactly: lists of blocks, and masks to compare with.

Every choice is made at a density: the share of what queries can see that it
keeps. Thresholds and masses (top-p) are searched so that their density comes
as near as can be to that of the top-k lists of the same name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas.sparse import choose as choosing

Blocks = kernels_pallas.BlockIndices

# Lists of blocks: by pooled scores; those and the first block; with PISA's
# term for blocks that a mean describes badly; over a threshold; of the
# smallest number with a share of the pooled softmax; by the attention itself.
LISTS = ("topk", "topk_sink", "topk_cov", "threshold", "top_p", "oracle")
# Masks over tokens: the nearest keys; those and the first four; the keys with
# the highest scores of each query.
MASKS = ("window", "window_sink", "tokens")
SINK = 4
# What is searched: each amount is a program of its own. Steps of 0.05 are of
# some 8 % of the density where that is 0.1 of Gaussian scores.
_TAUS = np.arange(5, -1.5, -0.05).round(2).tolist()
_SHARES = [*np.arange(0.02, 1, 0.02).round(2).tolist(), 0.99, 0.995, 0.999]

# Values are all that matters here, and there are many small programs.
_select = jax.jit(
  kernels_pallas.select_blocks,
  static_argnames=(
    "block_q",
    "block_kv",
    "method",
    "density",
    "tau",
    "top_p",
    "always",
    "causal",
    "covariance_aware",
  ),
  compiler_options={"xla_backend_optimization_level": 0},
)


@functools.partial(jax.jit, static_argnames=("causal", "density"))
def _by_mass(mass: jax.Array, causal: bool, density: float) -> Blocks:
  number = mass.shape[-1]
  every = jnp.ones((1, 1, *mass.shape[2:]), bool)
  allowed = jnp.tril(every) if causal else every
  forced = allowed & jnp.eye(number, dtype=bool) if causal else ~every
  longest = max(1, int(density * number + 1e-9))
  odd = jnp.zeros_like(forced)
  candidates = choosing.Candidates(mass, allowed, forced, odd)
  return choosing.choose(candidates, longest, low=density, high=density)


def lists(
  name: str,
  qkv: tuple[jax.Array, jax.Array, jax.Array],
  mass: jax.Array,
  *,
  block: int,
  causal: bool,
  density: float,
) -> Blocks:
  """The blocks that every query block keeps.

  Args:
    name: one of `LISTS`.
    qkv: each `[B, T, H, K]`.
    mass: `[B, H, NQ, NK]`, the attention that each block really gets.
    block: tokens of a block, divides T.
    causal: whether a query sees no later key.
    density: of top-k; the others come near to what that achieves.

  Returns:
    The lists, with their density.
  """
  q, k, v = qkv
  if name == "oracle":
    return _by_mass(mass, causal, density)
  options = dict(block_q=block, block_kv=block, causal=causal)
  if name == "topk_sink":
    options["always"] = (0,)
  if name == "topk_cov":
    options |= dict(covariance_aware=True, v=v)
  if name.startswith("topk"):
    return _select(q, k, method="topk", density=density, **options)
  target = float(_select(q, k, method="topk", density=density, **options)[2])
  if name == "threshold":
    return _nearest(
      lambda tau: _select(q, k, method="threshold", tau=tau, **options),
      _TAUS,
      target,
    )
  return _nearest(
    lambda share: _select(q, k, method="top_p", top_p=share, **options),
    _SHARES,
    target,
  )


def _nearest(
  choose: Callable[[float], Blocks], amounts: list[float], target: float
) -> Blocks:
  """The choice whose density is nearest; it must grow along `amounts`."""
  low, high = 0, len(amounts) - 1
  ends = {low: choose(amounts[low]), high: choose(amounts[high])}
  while high - low > 1:
    middle = (low + high) // 2
    ends[middle] = choose(amounts[middle])
    if ends[middle].density < target:
      low = middle
    else:
      high = middle
  both = ends[low], ends[high]
  return min(both, key=lambda blocks: abs(float(blocks.density) - target))


def window(length: int, density: float, sink: int = 0) -> np.ndarray:
  """The last keys of each query, and `sink` first ones: bool `[T, T]`.

  As many for all queries, so that their share of the pairs that a causal
  query sees comes nearest to `density`.
  """
  seen = np.arange(1, length + 1)
  sizes = np.arange(1, length + 1)[:, None]
  kept = np.minimum(sizes, seen)
  kept = kept + np.minimum(np.maximum(seen - sizes, 0), sink)
  error = abs(kept.sum(axis=1) - density * seen.sum())
  size = int(sizes[error.argmin(), 0])
  distance = np.arange(length)[:, None] - np.arange(length)
  near = (distance < size) | (np.arange(length) < sink)
  return near & (distance >= 0)


def nearest(places: np.ndarray, density: float) -> np.ndarray:
  """The keys nearest to each query in the grid: bool `[T, T]`.

  Args:
    places: int `[T, axes]`.
    density: the share of the keys; of equally near ones the first.
  """
  square = np.square(places[:, None] - places).sum(axis=-1)
  count = max(1, round(density * len(places)))
  order = np.argsort(square, axis=1, kind="stable")[:, :count]
  mask = np.zeros(square.shape, bool)
  np.put_along_axis(mask, order, True, axis=1)
  return mask


def best_tokens(
  scores: np.ndarray, ordered: np.ndarray, causal: bool, density: float
) -> np.ndarray:
  """The keys with each query's highest scores: bool `[B, H, T, S]`.

  Args:
    scores: `[B, H, T, S]`, -inf where a query does not see a key.
    ordered: the same, ascending along the last axis.
    causal: whether row t has t + 1 keys to see.
    density: the share of those that is kept, at least one.
  """
  length, keys = scores.shape[2:]
  seen = np.arange(1, length + 1) if causal else np.full(length, keys)
  count = np.maximum(1, np.rint(density * seen).astype(int))
  bound = ordered[:, :, np.arange(length), keys - count]
  return scores >= bound[..., None]
