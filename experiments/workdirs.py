"""The directory of a run: whose it is, and who may write there now."""

from __future__ import annotations

import fcntl
import os
import pathlib
import stat
import sys
import weakref
from collections.abc import Sequence

from experiments import errors
from jaxlib_ext import reading

LOCK = "run.lock"
# What a run makes before it is known to be possible; nothing that lies there
# outlives the start that made it.
START = "run.start"
_STARTED = ("tokenizer.json", "tokenizer.json.part")


def check(
  workdir: pathlib.Path, files: Sequence[str], directories: Sequence[str]
) -> bool:
  """Refuses a directory in which a run would touch what is not its own.

  Nothing is written. The directory itself may be a symbolic link; what a run
  writes in it may not be.

  Args:
    workdir: need not exist.
    files: names of the files that a run writes there, config.json first.
    directories: names of its directories.

  Returns:
    Whether a run has begun there: whether it holds config.json.

  Raises:
    UserError: names what is in the way.
  """
  if "\0" in str(workdir):
    raise errors.UserError(f"--workdir: got {str(workdir)!r}: it has a NUL")
  if os.path.lexists(workdir) and not workdir.is_dir():
    raise errors.UserError(f"--workdir: {workdir} is not a directory")
  parts = [f"{name}.part" for name in files]
  for names, allowed, text in (
    ((*files, *parts, LOCK), stat.S_ISREG, "a regular file"),
    ((*directories, START), stat.S_ISDIR, "a directory"),
  ):
    for name in names:
      if not os.path.lexists(workdir / name):
        continue
      status = (workdir / name).lstat()
      if not allowed(status.st_mode):
        raise errors.UserError(
          f"--workdir: {workdir / name}: got {reading.kind_of(status)}; "
          f"allowed: {text}; move it away or choose another --workdir"
        )
  begun = os.path.lexists(workdir / files[0])
  for name in () if begun else (*files, *parts, *directories):
    if os.path.lexists(workdir / name):
      raise errors.UserError(
        f"--workdir: {workdir} holds {name} but no config.json, so it is not "
        "this run's, which would replace it; choose another --workdir or move "
        f"{name} away"
      )
  return begun


class Lock:
  """The right to write in a directory, of one process at a time.

  An advisory lock of the kernel's on `run.lock`, which stays empty: it ends
  with the process, however that ends, and the file without a process means
  nothing. On NFS it holds between machines only where the mount has locks
  (not with `nolock` or `local_lock`); where the file system has none, a line
  says so and the run goes on.

  Args:
    workdir: that exists.

  Raises:
    UserError: another process holds it.
  """

  def __init__(self, workdir: pathlib.Path):
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    handle = os.open(workdir / LOCK, flags | os.O_CLOEXEC, 0o666)
    # A run that is dropped without having been trained lets go as well.
    self._release = weakref.finalize(self, os.close, handle)
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      self._release()
      raise errors.UserError(
        f"--workdir: another process is running in {workdir} (it holds "
        f"{LOCK}); wait for its end or choose another --workdir"
      ) from e
    except OSError as e:
      print(
        f"{workdir / LOCK} cannot be locked ({e.strerror}): see to it that no "
        "other run writes there",
        file=sys.stderr,
      )

  def __enter__(self) -> Lock:
    return self

  def __exit__(self, *exc) -> None:
    self._release()


def discard_start(workdir: pathlib.Path) -> None:
  """Removes what a start that did not succeed has made.

  Raises:
    UserError: there is something that no start makes.
  """
  start = workdir / START
  if not start.exists():
    return
  for name in _STARTED:
    (start / name).unlink(missing_ok=True)
  left = sorted(p.name for p in start.iterdir())
  if left:
    raise errors.UserError(
      f"--workdir: {start} holds {left[0]}, which no run makes; move it away"
    )
  start.rmdir()


def keep_start(workdir: pathlib.Path) -> None:
  """Moves what a successful start has made to its place."""
  made = workdir / START / _STARTED[0]
  if made.exists():
    os.replace(made, workdir / made.name)
  discard_start(workdir)
