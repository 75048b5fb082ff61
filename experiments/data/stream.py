"""Batches as a function of the step number alone.

Training windows of T + 1 tokens start T tokens apart, so every token but the
first is predicted once per epoch. Their order is a pseudo-random permutation
per epoch that is computed, not stored: a batch costs the same whatever the
size of the corpus, and a run resumes at any step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments import errors
from experiments.data import corpus as corpus_lib

_ROUNDS = 8
_MASK = (1 << 64) - 1


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
  """Applies a pseudo-random permutation of range(size), chosen by `key`.

  A Feistel network on the smallest even number of bits that holds `size`,
  repeated on a value until it falls into the range (cycle walking: Black and
  Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 3).

  Args:
    indices: `[...]`, each in range(size).
    size: at least 1.
    key: any integer.

  Returns:
    `[...]` int64.
  """
  half = max(1, ((size - 1).bit_length() + 1) // 2)
  keys = [_mix(key + r * 0x9E3779B97F4A7C15) for r in range(_ROUNDS)]
  out = np.asarray(indices).astype(np.uint64).ravel()
  walking = np.arange(out.size)
  while walking.size:
    out[walking] = _feistel(out[walking], half, keys)
    walking = walking[out[walking] >= size]
  return out.reshape(np.shape(indices)).astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
  bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
  left, right = x >> bits, x & mask
  for key in keys:
    left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
  return (left << bits) | right


def _mix(x: int) -> int:
  """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
  return int(_mix_array(np.asarray([x & _MASK], np.uint64))[0])


def _mix_array(x: np.ndarray) -> np.ndarray:
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


class Stream:
  """Training batches; batch `s` holds windows s·B to (s + 1)·B - 1.

  Every window comes once per epoch, and batches run across epochs. Tokens
  behind the last whole window are never used.

  Args:
    tokens: `[tokens]` training ids.
    batch_size: windows per step, over all processes.
    seq_len: T.
    seed: of the order.

  Raises:
    UserError: fewer tokens than one window.
  """

  def __init__(
    self,
    tokens: corpus_lib.Tokens,
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
  ):
    if len(tokens) < seq_len + 1:
      raise errors.UserError(
        f"data: one window of training.seq_len={seq_len} needs {seq_len + 1} "
        f"tokens, the training files have {len(tokens)}"
      )
    self.windows = (len(tokens) - 1) // seq_len
    self._tokens, self._batch, self._length = tokens, batch_size, seq_len
    self._seed = seed

  def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
    """The batch of a step, counted from 0: int32 `[rows, T + 1]`.

    Args:
      step: how many batches come before.
      rows: which rows of the whole batch to read: those of this process.
    """
    positions = step * self._batch + np.arange(self._batch)[rows]
    epochs, indices = np.divmod(positions, self.windows)
    order = np.empty_like(indices)
    for epoch in np.unique(epochs):
      of_epoch = epochs == epoch
      key = _mix(_mix(self._seed) + int(epoch) + 1)
      order[of_epoch] = permute(indices[of_epoch], self.windows, key)
    T = self._length
    return np.stack(
      [self._tokens[w * T : w * T + T + 1] for w in order.tolist()]
    ).astype(np.int32)


def eval_batches(
  tokens: corpus_lib.Tokens,
  *,
  batch_size: int,
  seq_len: int,
  max_batches: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields held-out windows, evenly spread and the same every time.

  With `max_batches=0` every token but the first has weight one exactly once.

  Args:
    tokens: `[tokens]` held-out ids, at least two.
    batch_size: rows of each batch; those missing have weight zero.
    seq_len: T.
    max_batches: at most so many; 0 is all.

  Yields:
    Tokens `[B, T + 1]` int32, and the weights `[B, T]` float32 (0 or 1) of
    the predictions of `tokens[:, 1:]`.

  Raises:
    UserError: fewer than two tokens.
  """
  if len(tokens) < 2:
    raise errors.UserError(
      f"data: evaluation needs 2 held-out tokens, there is {len(tokens)}; "
      "raise data.held_out"
    )
  total = -(-(len(tokens) - 1) // seq_len)
  count = min(total, max_batches * batch_size) if max_batches else total
  windows = np.arange(count) * total // count
  for first in range(0, count, batch_size):
    rows = np.zeros((batch_size, seq_len + 1), np.int32)
    weights = np.zeros((batch_size, seq_len), np.float32)
    for row, w in enumerate(windows[first : first + batch_size].tolist()):
      window = tokens[w * seq_len : (w + 1) * seq_len + 1]
      rows[row, : len(window)] = window
      weights[row, : len(window) - 1] = 1
    yield rows, weights
