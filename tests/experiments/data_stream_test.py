"""Batches: every window once, from the step number alone, for any split."""

import numpy as np
import pytest

from experiments import data, errors
from experiments.data import stream

TOKENS = np.arange(1000, dtype=np.uint16)


def make(**kwargs) -> data.Stream:
  kwargs = {"batch_size": 4, "seq_len": 10, "seed": 3, **kwargs}
  return data.Stream(TOKENS, **kwargs)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 65537])
@pytest.mark.parametrize("key", [0, 1, -5, 1 << 70])
def test_permutation_is_a_bijection(size, key):
  out = stream.permute(np.arange(size), size, key)
  np.testing.assert_array_equal(np.sort(out), np.arange(size))


def slow_permute(index: int, size: int, key: int) -> int:
  """The definition for one index, in Python's own integers."""
  full = (1 << 64) - 1

  def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full
    return x ^ (x >> 31)

  half = 1
  while 4**half < size:
    half += 1
  while True:
    left, right = divmod(index, 2**half)
    for r in range(8):
      k = mix((key + r * 0x9E3779B97F4A7C15) & full)
      left, right = right, left ^ (mix(right ^ k) % 2**half)
    index = left * 2**half + right
    if index < size:
      return index


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_permutation_against_the_definition(size):
  expected = [slow_permute(i, size, 77) for i in range(size)]
  assert stream.permute(np.arange(size), size, 77).tolist() == expected


def test_permutation_of_very_many_windows_costs_a_batch():
  size = 10**12
  indices = size - 1 - np.arange(512)
  out = stream.permute(indices, size, 5)
  assert len(set(out.tolist())) == 512
  assert out.min() >= 0 and out.max() < size
  # 512 uniform draws leave the middle of the range's mean with a standard
  # deviation of 0.29 / sqrt(512) = 0.013 of the range.
  assert abs(out.mean() / size - 0.5) < 0.06


def test_permutation_is_uniform():
  """Chi-squared of where each of 7 indices goes, over 2000 keys."""
  counts = np.zeros((7, 7))
  for key in range(2000):
    counts[np.arange(7), stream.permute(np.arange(7), 7, key)] += 1
  chi2 = ((counts - 2000 / 7) ** 2 / (2000 / 7)).sum()
  # 36 degrees of freedom: the 99.99% quantile is 77.
  assert chi2 < 77


def test_batch_shape_and_windows():
  out = make().batch(0)
  assert out.shape == (4, 11) and out.dtype == np.int32
  for row in out:
    assert row[0] % 10 == 0
    np.testing.assert_array_equal(row, row[0] + np.arange(11))


def starts(source: data.Stream, steps: range) -> list[int]:
  return [int(row[0]) // 10 for s in steps for row in source.batch(s)]


@pytest.mark.parametrize("batch_size", [1, 4, 99, 250])
def test_every_window_once_per_epoch(batch_size):
  """99 windows: batches of 4 and 250 run across epochs."""
  source = make(batch_size=batch_size)
  assert source.windows == 99
  order = starts(source, range(-(-3 * 99 // batch_size)))
  epochs = [order[e * 99 : (e + 1) * 99] for e in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(99))
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert epochs[0] != list(range(99))


def test_seeds_differ():
  orders = [starts(make(seed=s), range(24)) for s in range(4)]
  assert len({tuple(o) for o in orders}) == 4


def test_the_order_does_not_depend_on_the_batch_size():
  assert starts(make(batch_size=2), range(20)) == starts(
    make(batch_size=8), range(5)
  )


def test_resuming_anywhere_gives_the_same_batches():
  source = make()
  history = [source.batch(s) for s in range(60)]
  for step in (59, 0, 31):
    np.testing.assert_array_equal(make().batch(step), history[step])
    np.testing.assert_array_equal(source.batch(step), history[step])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
def test_processes_share_the_batch(count):
  source = make(batch_size=12)
  size = 12 // count
  for step in (0, 8, 1000):
    parts = [
      source.batch(step, slice(i * size, (i + 1) * size)) for i in range(count)
    ]
    assert all(len(p) == size for p in parts)
    np.testing.assert_array_equal(np.concatenate(parts), source.batch(step))


def test_the_smallest_corpus():
  np.testing.assert_array_equal(
    data.Stream(TOKENS[:11], batch_size=2, seq_len=10).batch(5),
    np.stack([np.arange(11)] * 2),
  )


def test_too_few_tokens():
  with pytest.raises(errors.UserError, match="needs 1001 tokens.* have 1000"):
    data.Stream(TOKENS, batch_size=1, seq_len=1000)


@pytest.mark.parametrize("size", [2, 10, 11, 12, 41, 95, 1000])
def test_evaluation_predicts_every_token_once(size):
  seen = np.zeros(size, int)
  for tokens, weights in data.eval_batches(
    TOKENS[:size], batch_size=4, seq_len=10
  ):
    assert tokens.shape == (4, 11) and tokens.dtype == np.int32
    assert weights.shape == (4, 10) and weights.dtype == np.float32
    assert set(np.unique(weights)) <= {0, 1}
    np.add.at(seen, tokens[:, 1:][weights == 1], 1)
    wrong = (tokens[:, 1:] != tokens[:, :-1] + 1) & (weights == 1)
    assert not wrong.any()
  np.testing.assert_array_equal(seen, [0] + [1] * (size - 1))


def test_fewer_evaluation_batches_are_spread_and_fixed():
  def evaluate():
    return list(
      data.eval_batches(TOKENS, batch_size=5, seq_len=10, max_batches=2)
    )

  first, second = evaluate(), evaluate()
  assert len(first) == 2
  windows = [int(row[0]) // 10 for tokens, _ in first for row in tokens]
  # 100 windows, the last one of 9 predictions.
  assert windows == list(range(0, 100, 10))
  for (a, wa), (b, wb) in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(wa, wb)


def test_evaluation_needs_two_tokens():
  with pytest.raises(errors.UserError, match="needs 2 held-out tokens"):
    next(data.eval_batches(TOKENS[:1], batch_size=1, seq_len=10))
