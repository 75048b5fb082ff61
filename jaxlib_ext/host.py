"""Keeps freed host memory, so that a CPU training step need not fault it in.

XLA:CPU allocates the temporaries of every step anew. glibc serves so large a
request by `mmap` and returns it by `munmap`: each step then has the kernel
map and zero every page again, a fifth to a third of a small model's step.
"""

from __future__ import annotations

import ctypes

# malloc.h: parameters of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
  """Has glibc's malloc serve all requests from one heap that never shrinks.

  Effective for threads that have not allocated yet: call it first in a main.
  The process keeps its peak of memory.

  Returns:
    Whether the C library took the settings; other C libraries have none.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  settings = (
    # Arenas of other threads hold at most 64 MiB; beyond that they mmap.
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, -1),  # Never.
  )
  return all([mallopt(name, value) == 1 for name, value in settings])
