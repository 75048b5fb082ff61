"""How far attention with a choice and a tail is from dense attention.

Errors are relative: the norm of the difference of the outputs over that of
dense attention's, of one head over all examples and tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from experiments.sparse import choices
from experiments.sparse.sources import Source
from kernels_pallas.sparse import blocks as block_lists
from kernels_pallas.sparse import in_context, problem, statistics
from kernels_pallas.sparse import scores as scoring

TAILS = problem.TAILS
# Where few are enough: none, and the published ones of PISA.
FEW_TAILS = ("drop", "mean", "mean_global")
# Of in-context attention: several `sharp`, the published one last, and the
# published `keep` and `density` of flat queries. Where it keeps everything,
# what is left of it is its two groups of queries.
SHARP = (0.1, 0.25, 0.5)
KEEP, FLAT = 0.125, 0.0625
# A float32 softmax of some thousand scores and its weighted mean: rounding
# errors of 2**-24 that grow with the root of their number, and exponentials
# of scores of some ten.
_EXACT = 1e-5

_attend = jax.jit(
  kernels_pallas.block_sparse_attention,
  static_argnames=("block_q", "block_kv", "tail", "causal", "implementation"),
)
_in_context = jax.jit(
  kernels_pallas.in_context_attention,
  static_argnames=(
    "context_length",
    "keep",
    "sharp",
    "density",
    "block_size",
    "causal",
  ),
)


class DisagreementError(Exception):
  """Attention to everything differs from dense attention."""


class Dense(NamedTuple):
  """One layer.

  Attributes:
    qkv: each `[B, T, H, K]`.
    scores: `[B, H, T, S]`, -inf where a query does not see a key.
    probs: their softmax.
    out: `[B, T, H, K]`.
    mass: `[B, H, NQ, NK]`, the share of a query block's attention that a
      key block gets.
  """

  qkv: tuple[jax.Array, jax.Array, jax.Array]
  scores: jax.Array
  probs: jax.Array
  out: jax.Array
  mass: jax.Array


@functools.partial(jax.jit, static_argnums=(3, 4))
def dense(
  q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, block: int
) -> Dense:
  """Attention with every score written down."""
  scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
  if causal:
    seen = jnp.tri(q.shape[1], dtype=bool)
    scores = jnp.where(seen, scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1)
  b, h, t, s = probs.shape
  cut = probs.reshape(b, h, t // block, block, s // block, block)
  mass = cut.sum(axis=(3, 5)) / block
  return Dense((q, k, v), scores, probs, _weigh(probs, v), mass)


def _weigh(probs, v):
  return jnp.einsum("bhts,bshv->bthv", probs, v)


@jax.jit
def _masked(layer: Dense, mask: jax.Array):
  """The output and the kept share `[H]` of the attention under a mask."""
  scores = jnp.where(mask, layer.scores, -jnp.inf)
  kept = jnp.sum(jnp.where(mask, layer.probs, 0), axis=-1)
  out = _weigh(jax.nn.softmax(scores, axis=-1), layer.qkv[2])
  return out, jnp.mean(kept, axis=(0, 2))


@jax.jit
def _error(out: jax.Array, want: jax.Array) -> jax.Array:
  square = lambda x: jnp.sum(jnp.square(x), axis=(0, 1, 3))
  return jnp.sqrt(square(out - want) / square(want))


def error(out: jax.Array, want: jax.Array) -> list[float]:
  """Relative error of each head of `[B, T, H, K]`.

  Raises:
    FloatingPointError: one is not finite.
  """
  found = np.asarray(_error(out, want), np.float64)
  if not np.isfinite(found).all():
    raise FloatingPointError(f"errors that are not finite: {found}")
  return rounded(found)


def rounded(values: Sequence[float]) -> list[float]:
  """To four digits, for records."""
  return [float(f"{x:.4g}") for x in values]


class Layer:
  """Measures one layer of a source.

  Args:
    source: the model.
    number: of the layer.
  """

  def __init__(self, source: Source, number: int):
    self._source = source
    qkv = (jnp.asarray(x[number]) for x in (source.q, source.k, source.v))
    self._dense = dense(*qkv, source.causal, source.block)
    self._number = source.q.shape[2] // source.block

  def facts(self) -> dict[str, Any]:
    """Entropy of the attention over its largest; the check of density 1.

    Raises:
      DisagreementError: density 1 is not dense attention.
    """
    probs = self._dense.probs
    entropy = -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
    length = probs.shape[-1]
    seen = jnp.arange(1, length + 1) if self._source.causal else length
    # The first causal query sees one key and has no choice.
    share = (entropy / jnp.maximum(jnp.log(seen), 1e-9))[:, :, 1:]
    whole = self.lists("topk", 1.0)
    found = error(self.attend(whole, "drop"), self._dense.out)
    if max(found) > _EXACT:
      raise DisagreementError(
        f"{self._source.name}: attention to all blocks differs from dense "
        f"attention by {max(found):.1e}, allowed {_EXACT:.0e}"
      )
    return {
      "entropy": rounded(np.asarray(share.mean(axis=(0, 2)))),
      "error_at_density_1": max(found),
    }

  def lists(self, name: str, density: float) -> choices.Blocks:
    """`choices.lists` of this layer."""
    source, layer = self._source, self._dense
    return choices.lists(
      name,
      layer.qkv,
      layer.mass,
      block=source.block,
      causal=source.causal,
      density=density,
    )

  def attend(self, blocks: choices.Blocks, tail: str) -> jax.Array:
    """Block-sparse attention, `[B, T, H, K]`."""
    source = self._source
    # Of two lengths: each is a program to compile.
    longest = -(-self._number // 4)
    if int(blocks.counts.max()) > longest:
      longest = self._number
    spare = ((0, 0),) * 3 + ((0, longest),)
    indices = jnp.pad(blocks.indices, spare, mode="edge")[..., :longest]
    return _attend(
      *self._dense.qkv,
      (indices, blocks.counts),
      block_q=source.block,
      block_kv=source.block,
      tail=tail,
      causal=source.causal,
      implementation="xla",
    )

  def choice(
    self, name: str, density: float, tails: Sequence[str]
  ) -> dict[str, Any]:
    """The errors of one choice of blocks with each tail."""
    blocks = self.lists(name, density)
    layer, number = self._dense, self._number
    member = block_lists.membership(blocks.indices, blocks.counts, number)
    listed = jnp.sum(jnp.where(member, layer.mass, 0), axis=-1)
    seen = number * (number + 1) / 2 if self._source.causal else number**2
    counts = np.asarray(blocks.counts.sum(axis=-1).mean(axis=0))
    return {
      "choice": name,
      "density": density,
      "achieved": rounded(counts / seen),
      "mass": rounded(np.asarray(jnp.mean(listed, axis=(0, 2)))),
      "error": {
        tail: error(self.attend(blocks, tail), layer.out) for tail in tails
      },
    }

  @functools.cached_property
  def _ordered(self) -> np.ndarray:
    return np.sort(np.asarray(self._dense.scores), axis=-1)

  def mask(self, name: str, density: float) -> dict[str, Any]:
    """The error of a mask over tokens, at the density of top-k blocks."""
    source, layer = self._source, self._dense
    achieved = float(self.lists("topk", density).density)
    length = source.q.shape[2]
    if name == "tokens":
      scores = np.asarray(layer.scores)
      mask = choices.best_tokens(scores, self._ordered, source.causal, achieved)
    elif source.causal:
      sink = choices.SINK if name == "window_sink" else 0
      mask = choices.window(length, achieved, sink)[None, None]
    else:
      mask = choices.nearest(source.places(), achieved)[None, None]
    out, mass = _masked(layer, jnp.asarray(mask))
    seen = length * (length + 1) / 2 if source.causal else length**2
    kept = np.broadcast_to(mask, layer.scores.shape).sum(axis=(2, 3))
    return {
      "choice": name,
      "density": density,
      "achieved": rounded(kept.mean(axis=0) / seen),
      "mass": rounded(np.asarray(mass)),
      "error": {"drop": error(out, layer.out)},
    }

  def grouped(self, sharp: float, keep: float) -> dict[str, Any]:
    """In-context attention, and top-k with the same number of exact blocks.

    Of text the first half is the context, and the second, the target, is what
    errors and blocks are counted of.
    """
    source, layer = self._source, self._dense
    start = self._number // 2 * source.block if source.causal else 0
    out = _in_context(
      *layer.qkv,
      context_length=start or source.context,
      keep=keep,
      sharp=sharp,
      density=FLAT,
      block_size=source.block,
      causal=source.causal,
    )
    density = in_context_density(self._number, sharp, keep)
    if source.causal:
      density = self._continued_density(sharp, keep)
    uniform = self.lists("topk", density)
    outs = {"in_context": out} | {
      tail: self.attend(uniform, tail) for tail in FEW_TAILS
    }
    counts = uniform.counts[:, :, start // source.block :]
    return {
      "choice": "in_context",
      "sharp": sharp,
      "keep": keep,
      "density": rounded([density])[0],
      "error": {
        name: error(x[:, start:], layer.out[:, start:])
        for name, x in outs.items()
      },
      "uniform": rounded(
        np.asarray(counts.sum(axis=-1).mean(axis=0)) / self._seen_by_target()
      ),
    }

  def _seen_by_target(self) -> float:
    """Pairs of blocks of which the target's queries see some key."""
    number = self._number
    if not self._source.causal:
      return number**2
    return number * (number + 1) / 2 - number // 2 * (number // 2 + 1) / 2

  def _continued_density(self, sharp: float, keep: float) -> float:
    """The share of the blocks that a text's target attends to exactly."""
    block, number = self._source.block, self._number
    q, k = (
      statistics.mean(
        statistics.split(jnp.swapaxes(x, 1, 2), block), jnp.full(number, block)
      )
      for x in self._dense.qkv[:2]
    )
    scale = self._source.q.shape[-1] ** -0.5
    scores = scoring.pooled_scores(q, k, scale)
    _, part = in_context.causal_parts(scores, number // 2, keep, sharp, FLAT)
    listed = float(part.lists.counts.sum(axis=-1).mean())
    return listed / self._seen_by_target()


def in_context_density(number: int, sharp: float, keep: float = KEEP) -> float:
  """The share of exact blocks of in-context attention.

  Args:
    number: of blocks, half of them the context's.
    sharp: as for `kernels_pallas.in_context_attention`.
    keep: likewise.
  """
  kept = number - number // 2 + max(1, int(keep * (number // 2) + 1e-9))
  full = int(sharp * number + 0.5)
  flat = max(1, int(FLAT * kept + 1e-9))
  return (full * kept + (number - full) * flat) / number**2


def study(
  source: Source, number: int, densities: Sequence[float]
) -> Iterator[dict[str, Any]]:
  """Measures one layer, choice after choice.

  Args:
    source: the model.
    number: of the layer.
    densities: of the choices.

  Yields:
    First the layer's facts, then a result for each choice and density.
  """
  layer = Layer(source, number)
  yield layer.facts()
  for name in names(source):
    for density in densities:
      if name in choices.MASKS:
        yield layer.mask(name, density)
      else:
        yield layer.choice(name, density, TAILS)
  if _has_context(source):
    for keep in (KEEP, 1.0):
      for sharp in SHARP:
        yield layer.grouped(sharp, keep)


def _has_context(source: Source) -> bool:
  return source.causal or bool(source.context and source.tile)


def names(source: Source) -> tuple[str, ...]:
  """The choices that a source is measured with.

  Raster order only shows what tiles are good for.
  """
  if source.layout == "raster":
    return ("topk", "topk_cov")
  absent = ("topk_cov",) if source.causal else ("topk_sink", "window_sink")
  return tuple(x for x in choices.LISTS + choices.MASKS if x not in absent)


def count(source: Source, densities: Sequence[float]) -> int:
  """How many results `study` yields."""
  more = 2 * len(SHARP) if _has_context(source) else 0
  return 1 + len(names(source)) * len(densities) + more
