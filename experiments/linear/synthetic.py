"""Tasks that measure a memory: batches as functions of the step number alone.

A row is a sequence of tokens and, for some of them, the answer that a model
should give there; the answers are never part of the row. How hard a row is,
its task's levels say.

  Recall  Key-value pairs, then queries of the keys: multi-query associative
          recall (Arora et al., "Zoology: Measuring and Improving Recall in
          Efficient Language Models", 2023, arXiv:2312.04927). The level is
          the number of keys. With rewrites above 1 each key is bound several
          times, in any order, and the last value counts: a memory must not
          only hold but replace.
  Group   The running product of a word's elements in a finite group (Merrill,
          Petty and Sabharwal, "The Illusion of State in State-Space Models",
          2024, arXiv:2404.08819): parity, or the permutations of three
          things. The level is the length of the word.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

# Behind the seed and the step, what a generator is seeded by: training rows
# and held-out rows come from different streams whatever the seed.
_TRAINING, _HELD_OUT = 0, 1

# Stands where there is nothing to read.
BLANK = 0


class Batch(NamedTuple):
  """Rows of a task.

  Attributes:
    tokens: int32 `[B, T]`.
    targets: int32 `[B, T]`, the answer at each position that has one.
    weights: float32 `[B, T]`, 1 where there is an answer, else 0.
  """

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray


def _check(name: str, ok: bool, got: object, allowed: str) -> None:
  if not ok:
    raise ValueError(f"{name}: got {got}; allowed: {allowed}")


def _check_levels(levels: tuple[int, ...], most: int, why: str) -> None:
  _check("levels", bool(levels), levels, "at least one")
  for level in levels:
    _check("levels", 1 <= level <= most, level, f"1 to {most}, {why}")


class _Task:
  """How rows become batches; `_rows` makes those of one level."""

  levels: tuple[int, ...]

  def batch(self, step: int, *, size: int, seed: int) -> Batch:
    """The training batch of a step, its rows shared among the levels.

    Args:
      step: how many batches come before.
      size: B; row i has the level i modulo the number of levels, so that
        batches of at least that size hold every level.
      seed: of the rows.
    """
    rng = np.random.default_rng([seed, step, _TRAINING])
    parts = []
    for i, level in enumerate(self.levels):
      count = len(range(i, size, len(self.levels)))
      parts.append(self._rows(rng, count, level))
    return Batch(*map(np.concatenate, zip(*parts, strict=True)))

  def held_out(self, step: int, *, size: int, level: int) -> Batch:
    """A batch of one level that no training batch shares its stream with."""
    _check("level", level in self.levels, level, f"one of {self.levels}")
    rng = np.random.default_rng([level, step, _HELD_OUT])
    return self._rows(rng, size, level)

  def _rows(self, rng: np.random.Generator, count: int, level: int) -> Batch:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Recall(_Task):
  """Associative recall of the value that each key was bound to last.

  A row is `2 * level * rewrites` tokens of context, a key and its value in
  turn, and behind them every key once, as a query. Queries stand at even
  offsets; blanks fill the rest. Where rewrites is 1, the place of a query is
  drawn without replacement with a probability that falls as a power of the
  offset, as in Zoology, so that some gaps are long and most are short.

  Attributes:
    seq_len: T.
    levels: numbers of keys in a row.
    keys: how many tokens are keys: 1 to `keys`.
    values: how many tokens are values, numbered behind the keys.
    rewrites: how often each key is bound.
    power: of the fall of the gaps' distribution, in (0, 1]; 1 is uniform.
  """

  seq_len: int
  levels: tuple[int, ...]
  keys: int = 64
  values: int = 64
  rewrites: int = 1
  power: float = 0.1

  def __post_init__(self):
    for name in ("seq_len", "keys", "values", "rewrites"):
      _check(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
    _check("power", 0 < self.power <= 1, self.power, "above 0, at most 1")
    _check_levels(self.levels, self.keys, "the number of keys")
    per_key = 2 * self.rewrites + 2
    _check_levels(
      self.levels,
      self.seq_len // per_key,
      f"as a key takes {per_key} of seq_len={self.seq_len} tokens",
    )

  @property
  def vocab_size(self) -> int:
    """The blank, the keys and the values."""
    return 1 + self.keys + self.values

  def _rows(self, rng: np.random.Generator, count: int, level: int) -> Batch:
    bindings = level * self.rewrites
    names = np.tile(np.arange(self.keys), (count, 1))
    names = 1 + rng.permuted(names, axis=1)[:, :level]
    which = np.tile(np.arange(bindings) % level, (count, 1))
    which = rng.permuted(which, axis=1)
    values = rng.integers(self.values, size=(count, bindings))
    values = values + 1 + self.keys
    shape = (count, self.seq_len)
    tokens = np.full(shape, BLANK, np.int32)
    tokens[:, 0 : 2 * bindings : 2] = np.take_along_axis(names, which, axis=1)
    tokens[:, 1 : 2 * bindings : 2] = values
    # Assignment keeps the last of equal indices: one binding after another.
    last = np.empty((count, level), np.int64)
    for i in range(bindings):
      last[np.arange(count), which[:, i]] = values[:, i]
    slots = (self.seq_len - 2 * bindings) // 2
    places = 2 * bindings + 2 * self._slots(rng, count, slots, level)
    np.put_along_axis(tokens, places, names, axis=1)
    targets = np.zeros(shape, np.int32)
    np.put_along_axis(targets, places, last, axis=1)
    weights = np.zeros(shape, np.float32)
    np.put_along_axis(weights, places, 1.0, axis=1)
    return Batch(tokens, targets, weights)

  def _slots(self, rng, count, slots, level) -> np.ndarray:
    """Distinct slots `[count, level]`, slot i with weight (i + 1)^(power - 1).

    The places of the largest log weights plus Gumbel noise are such a draw
    (Kool, van Hoof and Welling, 2019, arXiv:1903.06059).
    """
    log_weight = (self.power - 1) * np.log1p(np.arange(slots))
    noisy = log_weight + rng.gumbel(size=(count, slots))
    return np.argsort(-noisy, axis=1)[:, :level]


@dataclasses.dataclass(frozen=True)
class Group(_Task):
  """The product of all elements so far, at every position of a word.

  Tokens 1 and up are the group's elements, 1 the identity; blanks follow the
  word. Products are taken from the left: the newest element acts last.

  Attributes:
    seq_len: T.
    levels: lengths of words.
    things: elements are the permutations of so many things: 2 is parity, 3
      the smallest group that is not commutative.
  """

  seq_len: int
  levels: tuple[int, ...]
  things: int = 2

  def __post_init__(self):
    _check("seq_len", self.seq_len >= 1, self.seq_len, "at least 1")
    _check("things", 2 <= self.things <= 5, self.things, "2 to 5")
    _check_levels(self.levels, self.seq_len, "seq_len")

  @property
  def vocab_size(self) -> int:
    """The blank and the elements."""
    return 1 + len(self.elements)

  @property
  def elements(self) -> list[tuple[int, ...]]:
    """Permutations in lexical order, as the images of 0, 1, ..."""
    return list(itertools.permutations(range(self.things)))

  @property
  def table(self) -> np.ndarray:
    """`[i, j]`: the number of element j after element i, both from 0."""
    elements = self.elements
    return np.array([
      [elements.index(tuple(b[x] for x in a)) for b in elements]
      for a in elements
    ])  # fmt: skip

  def _rows(self, rng: np.random.Generator, count: int, level: int) -> Batch:
    shape = (count, self.seq_len)
    table = self.table
    word = rng.integers(len(table), size=(count, level))
    tokens, targets = np.zeros((2, *shape), np.int32)
    tokens[:, :level] = 1 + word
    product = np.zeros(count, np.int64)
    for i in range(level):
      product = table[product, word[:, i]]
      targets[:, i] = 1 + product
    weights = np.zeros(shape, np.float32)
    weights[:, :level] = 1.0
    return Batch(tokens, targets, weights)
