"""Computes the next batches while the device is busy with this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
  """An endless iterator over fn(start_step), fn(start_step + 1), ...

  A context manager: the thread runs inside the `with` block only. An
  exception of `fn` is raised by `next` in its place, and again after that.

  Args:
    fn: step number → batch; called by one thread, in order.
    start_step: the first step.
    depth: batches computed ahead, at least 1.
  """

  def __init__(self, fn: Callable[[int], T], start_step: int, depth: int = 2):
    if depth < 1:
      raise ValueError(f"depth: got {depth}, allowed: at least 1")
    self._fn, self._step = fn, start_step
    self._queue = queue.Queue()
    # Counts the free places; a bounded queue could not be woken at the end.
    self._free = threading.Semaphore(depth)
    self._stop = threading.Event()
    self._error = None
    self._thread = None

  def __enter__(self) -> Prefetcher[T]:
    self._thread = threading.Thread(
      target=self._work, name="prefetch", daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *exc) -> None:
    self._stop.set()
    self._free.release()
    self._thread.join()

  def __iter__(self) -> Prefetcher[T]:
    return self

  def __next__(self) -> T:
    if self._thread is None or self._stop.is_set():
      raise RuntimeError("Prefetcher: used outside its with block")
    if self._error is None:
      value, self._error = self._queue.get()
    if self._error is not None:
      raise self._error
    self._free.release()
    return value

  def _work(self) -> None:
    step = self._step
    while True:
      self._free.acquire()
      if self._stop.is_set():
        return
      try:
        value = self._fn(step)
      except BaseException as e:
        self._queue.put((None, e))
        return
      self._queue.put((value, None))
      step += 1
