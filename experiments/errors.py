"""How the mains report a mistake of the user's: one line, exit code 2."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

from absl import app, flags, logging

import experiments
from jaxlib_ext import checkpoint, reading


class UserError(ValueError):
  """A mistake of the user's: printed as one line, exit code 2."""


_REPORTED = (UserError, checkpoint.CheckpointError, reading.ReadError, OSError)


def run_main(
  name: str, main: Callable[[], None], define_flags: Callable[[], None]
) -> None:
  """Runs an absl main; bad flags, bad input and a full disk end in one line.

  So does Ctrl-C outside of a loop that knows what to save, with the exit code
  that shells have for it, 130.

  Args:
    name: of the program, put before the line.
    main: the program.
    define_flags: defines its flags. Flags are the process's, and a test may
      import several mains.
  """
  define_flags()
  _hush_the_writer()

  def fail(error: Exception) -> None:
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(2)

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(list(argv))
    except flags.Error as e:
      fail(e)

  def checked(argv: Sequence[str]) -> None:
    try:
      if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}")
      main()
    except _REPORTED as e:
      fail(e)
    except KeyboardInterrupt:
      # A second one need not wait for threads to end.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      print(f"{name}: interrupted", file=sys.stderr)
      sys.exit(experiments.INTERRUPTED)

  app.run(checked, flags_parser=parse)


def _hush_the_writer() -> None:
  """Leaves the report of a failed checkpoint to `run_main`.

  Orbax's threads hand their exceptions to the main thread. The tracebacks
  that they log and print as well, and those of callbacks that come after
  their event loop was closed, would bury the line; so would Python's warning
  of a write that was never begun.
  """
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  logging.set_verbosity(logging.FATAL)
  threading.excepthook = lambda args: logging.debug("thread: %s", args)

  def excepthook(kind, error, traceback):
    if str(error) != "Event loop is closed":
      sys.__excepthook__(kind, error, traceback)

  sys.excepthook = excepthook
