"""The prefetcher: order, depth, errors, and no thread left behind."""

import threading
import time

import pytest

from experiments import data


def prefetch_threads() -> int:
  return sum(t.name == "prefetch" for t in threading.enumerate())


def wait_until(condition) -> bool:
  deadline = time.monotonic() + 10
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.002)
  return condition()


def test_order():
  with data.Prefetcher(lambda step: step * step, 3) as batches:
    assert [next(batches) for _ in range(50)] == [s * s for s in range(3, 53)]
  assert prefetch_threads() == 0


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth(depth):
  called = []
  with data.Prefetcher(called.append, 0, depth=depth) as batches:
    assert wait_until(lambda: len(called) == depth)
    time.sleep(0.05)
    assert called == list(range(depth))
    next(batches)
    assert wait_until(lambda: len(called) == depth + 1)


def test_an_exception_comes_in_its_place_and_stays():
  def fn(step):
    if step == 2:
      raise KeyError("broken")
    return step

  with data.Prefetcher(fn, 0) as batches:
    assert [next(batches), next(batches)] == [0, 1]
    for _ in range(2):
      with pytest.raises(KeyError, match="broken"):
        next(batches)
  assert prefetch_threads() == 0


def test_an_early_exit_leaves_no_thread():
  with pytest.raises(ZeroDivisionError):
    with data.Prefetcher(lambda step: step, 0) as batches:
      next(batches)
      raise ZeroDivisionError
  assert prefetch_threads() == 0
  with data.Prefetcher(lambda step: step, 0):
    pass
  assert prefetch_threads() == 0


def test_the_batch_in_progress_ends_before_the_block_does():
  done = []

  def slow(step):
    time.sleep(0.1)
    done.append(step)

  with data.Prefetcher(slow, 0):
    pass
  assert len(done) <= 1
  count = len(done)
  time.sleep(0.15)
  assert len(done) == count


def test_misuse():
  batches = data.Prefetcher(lambda step: step, 0)
  with pytest.raises(RuntimeError, match="with block"):
    next(batches)
  with batches:
    next(batches)
  with pytest.raises(RuntimeError, match="with block"):
    next(batches)
  with pytest.raises(ValueError, match="depth: got 0"):
    data.Prefetcher(lambda step: step, 0, depth=0)
