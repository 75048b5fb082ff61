"""A process that answers JSON requests, one per line.

Two frameworks in one process share its memory allocator and fight over
cores with idle but spinning threads, and two versions of one framework do not
fit into one process at all, so a benchmark asks each from outside. Only the
standard library is imported: the worker's interpreter may lack the rest.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any


class WorkerError(RuntimeError):
  """A worker's process ended; the message is the end of what it printed."""


class Worker:
  """A module that runs `serve` in a process of its own.

  Args:
    module: run by `python -m`.
    python: the interpreter that runs it.
    log: gets what it prints.
    **first: the request that makes its side.
  """

  def __init__(self, module: str, python: str, log: pathlib.Path, **first: Any):
    self._log = log
    with open(log, "w", encoding="utf-8") as file:
      self._process = subprocess.Popen(
        [python, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=file,
        text=True,
      )
    try:
      self.ask(**first)
    except WorkerError:
      self.close()
      raise

  def ask(self, **request: Any) -> Any:
    """The reply to one request.

    Raises:
      WorkerError: the process ended instead.
    """
    try:
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass
    reply = self._process.stdout.readline()
    if not reply:
      text = self._log.read_text(encoding="utf-8", errors="replace").strip()
      raise WorkerError(text.splitlines()[-1] if text else "it ended silently")
    return json.loads(reply)

  def close(self) -> None:
    """Ends the process."""
    for stream in (self._process.stdin, self._process.stdout):
      try:
        stream.close()
      except BrokenPipeError:
        pass
    self._process.wait()


def serve(
  make: Callable[..., Any],
  answer: Callable[[Any, Mapping[str, Any]], Any],
) -> None:
  """Serves requests until the input ends.

  Args:
    make: makes a side from the fields of the first request.
    answer: the reply to a request after it, given the side.
  """
  # Compilers print; the replies have a channel of their own.
  replies = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  side = make(**json.loads(sys.stdin.readline()))
  replies.write(json.dumps("ready") + "\n")
  for line in sys.stdin:
    replies.write(json.dumps(answer(side, json.loads(line))) + "\n")
