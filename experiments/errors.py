"""How the mains report a mistake of the user's: one line, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from jaxlib_ext import checkpoint


class UserError(ValueError):
  """A mistake of the user's: printed as one line, exit code 2."""


def run_main(
  name: str, main: Callable[[], None], define_flags: Callable[[], None]
) -> None:
  """Runs an absl main; bad flags, bad input and a full disk end in one line.

  Args:
    name: of the program, put before the line.
    main: the program.
    define_flags: defines its flags. Flags are the process's, and a test may
      import several mains.
  """
  define_flags()
  logging.set_verbosity(logging.ERROR)

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
    except (UserError, checkpoint.CheckpointError, OSError) as e:
      fail(e)

  app.run(checked, flags_parser=parse)
