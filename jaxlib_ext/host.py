"""Settings of the host's C library that CPU steps gain from.

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

  Pays on a CPU, where a step's temporaries are megabytes and its time is
  milliseconds to seconds: the gradient of `kernels_pallas`' chunked
  `momentum_delta_rule` at T = 2,048, H = 4, K = V = 64 took 106 ms without
  and 55 ms with it (medians of processes on a busy machine of two cores; 60
  and 46 ms at best). It does nothing for an accelerator's memory.

  The process keeps its peak of host memory until it ends, of everything and
  not only of JAX; here 500 MiB instead of 460. Effective for threads that
  have not allocated yet: call it first in a main, before JAX starts its own.
  It holds for the process and cannot be taken back.

  Returns:
    Whether the C library took the settings. False where it is not glibc
    (macOS, Windows, musl), and nothing is changed there.
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
