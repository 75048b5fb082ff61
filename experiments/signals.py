"""SIGINT and SIGTERM as a question that the loop asks between steps."""

from __future__ import annotations

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupt:
  """Turns the first SIGINT or SIGTERM into a flag; the second one kills."""

  def __init__(self):
    self._name = None
    self._previous = {}

  def __enter__(self) -> Interrupt:
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exc) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    self._name = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)

  def seen(self) -> str | None:
    """The signal's name once any process of the run has got one."""
    if jax.process_count() == 1:
      return self._name
    flags = multihost_utils.process_allgather(
      np.asarray(self._name is not None)
    )
    return (
      (self._name or "a signal to another process") if flags.any() else None
    )
