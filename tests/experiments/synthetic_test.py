"""Answers against slow readings of the rows; impossible sizes."""

import itertools

import numpy as np
import pytest

from experiments.linear import synthetic

RECALLS = [
  synthetic.Recall(seq_len=40, levels=(2, 5, 10), keys=12, values=9),
  synthetic.Recall(seq_len=48, levels=(1, 4), keys=4, values=3, rewrites=5),
  synthetic.Recall(seq_len=17, levels=(3,), keys=3, values=2, power=1.0),
]
GROUPS = [
  synthetic.Group(seq_len=20, levels=(1, 7, 20)),
  synthetic.Group(seq_len=12, levels=(12,), things=3),
  synthetic.Group(seq_len=9, levels=(4, 9), things=4),
]


def read_recall(task, row, level):
  """The answers of a row by position, as a reader with a dict finds them."""
  bound, answers = {}, {}
  context = 2 * level * task.rewrites
  for i, token in enumerate(row):
    if i < context and i % 2 == 0:
      bound[token] = row[i + 1]
    elif i >= context and token != synthetic.BLANK:
      answers[i] = bound[token]
  return answers


@pytest.mark.parametrize("task", RECALLS)
def test_recall_answers_are_the_last_bindings(task):
  for level in task.levels:
    batch = task.held_out(0, size=16, level=level)
    for tokens, targets, weights in zip(*batch, strict=True):
      answers = read_recall(task, tokens.tolist(), level)
      assert len(answers) == level
      got = {i: targets[i] for i in np.flatnonzero(weights)}
      assert got == answers
      assert not targets[weights == 0].any()
      assert set(weights.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("task", RECALLS)
def test_recall_binds_every_key_as_often_as_it_says(task):
  for level in task.levels:
    for row in task.held_out(1, size=8, level=level).tokens:
      context = row[: 2 * level * task.rewrites]
      keys, counts = np.unique(context[::2], return_counts=True)
      assert len(keys) == level and set(counts) == {task.rewrites}
      assert 1 <= keys.min() and keys.max() <= task.keys
      values = context[1::2]
      assert task.keys < values.min() and values.max() < task.vocab_size


def test_gaps_fall_as_a_power():
  """First slots are queried at the rates of a weighted draw.

  Drawing one of n slots has exactly the probability of its weight; 20,000
  draws put a frequency within 4 standard deviations of it.
  """
  n, draws = 10, 20_000
  task = synthetic.Recall(seq_len=2 + 2 * n, levels=(1,), keys=1, power=0.1)
  batch = task.held_out(0, size=draws, level=1)
  slots = (np.argmax(batch.weights, axis=1) - 2) // 2
  got = np.bincount(slots, minlength=n) / draws
  weight = np.arange(1.0, n + 1) ** -0.9
  wanted = weight / weight.sum()
  deviation = np.sqrt(wanted * (1 - wanted) / draws)
  assert np.all(np.abs(got - wanted) < 4 * deviation)


@pytest.mark.parametrize("task", GROUPS)
def test_group_answers_are_products(task):
  elements = list(itertools.permutations(range(task.things)))
  for level in task.levels:
    tokens, targets, weights = task.held_out(0, size=8, level=level)
    assert np.all(weights[:, :level] == 1) and not weights[:, level:].any()
    assert not tokens[:, level:].any()
    for row, answers in zip(tokens, targets, strict=True):
      things = list(range(task.things))
      for token, answer in zip(row[:level], answers, strict=False):
        things = [elements[token - 1][x] for x in things]
        assert elements[answer - 1] == tuple(things)


def test_parity_is_the_number_of_swaps():
  tokens, targets, _ = GROUPS[0].held_out(0, size=32, level=20)
  np.testing.assert_array_equal(targets - 1, np.cumsum(tokens - 1, axis=1) % 2)


@pytest.mark.parametrize("task", [*RECALLS, *GROUPS])
def test_batches_depend_on_seed_and_step_alone(task):
  first = task.batch(3, size=7, seed=1)
  for again, a in zip(task.batch(3, size=7, seed=1), first, strict=True):
    assert again.dtype == a.dtype
    np.testing.assert_array_equal(again, a)
    assert a.shape == (7, task.seq_len)
  assert [a.dtype for a in first] == [np.int32, np.int32, np.float32]
  for step, seed in ((4, 1), (3, 2)):
    other = task.batch(step, size=7, seed=seed)
    assert not np.array_equal(other.tokens, first.tokens)
  held = task.held_out(3, size=7, level=task.levels[0])
  assert not np.array_equal(held.tokens, first.tokens)


def test_a_batch_shares_its_rows_among_the_levels():
  batch = RECALLS[0].batch(0, size=8, seed=0)
  answers = batch.weights.sum(axis=1).tolist()
  assert sorted(answers) == [2, 2, 2, 5, 5, 5, 10, 10]


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: synthetic.Recall(39, (10,)), ["levels", "10", "1 to 9", "39"]),
    (lambda: synthetic.Recall(40, (6,), rewrites=3), ["levels", "1 to 5"]),
    (lambda: synthetic.Recall(400, (9,), keys=8), ["levels", "1 to 8"]),
    (lambda: synthetic.Recall(40, ()), ["levels", "at least one"]),
    (lambda: synthetic.Recall(40, (0,)), ["levels", "got 0"]),
    (lambda: synthetic.Recall(40, (2,), values=0), ["values", "at least 1"]),
    (lambda: synthetic.Recall(40, (2,), rewrites=0), ["rewrites", "got 0"]),
    (lambda: synthetic.Recall(40, (2,), power=0.0), ["power", "above 0"]),
    (lambda: synthetic.Group(8, (9,)), ["levels", "9", "1 to 8"]),
    (lambda: synthetic.Group(8, (4,), things=1), ["things", "2 to 5"]),
    (lambda: RECALLS[0].held_out(0, size=2, level=3), ["level", "got 3"]),
  ],
)
def test_impossible_sizes(make, words):
  with pytest.raises(ValueError) as e:
    make()
  for word in words:
    assert word in str(e.value)
