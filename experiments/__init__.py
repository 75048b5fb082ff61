"""absl mains that train, measure and compare; nothing imports this package."""

import os
import sys

# What shells give for a process that Ctrl-C has ended.
INTERRUPTED = 130


def _one_line(kind, error, traceback):
  """Reports Ctrl-C in one line, while a main's imports take their seconds."""
  if not issubclass(kind, KeyboardInterrupt):
    sys.__excepthook__(kind, error, traceback)
    return
  name = sys.orig_argv[sys.orig_argv.index("-m") + 1].rpartition(".")[2]
  print(f"{name}: interrupted", file=sys.stderr, flush=True)
  os._exit(INTERRUPTED)


# So long as `python -m` looks for the main; `errors.run_main` takes over.
if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
  sys.excepthook = _one_line
