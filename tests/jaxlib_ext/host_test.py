"""A step's temporaries are not faulted in again once memory is kept."""

import platform
import subprocess
import sys

import pytest

from jaxlib_ext import host

SCRIPT = """
import resource, sys
from jaxlib_ext import host
if sys.argv[1] == "keep":
  assert host.keep_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.exp(x[:, None] + x) @ jnp.stack([x] * 8, 1))
x = jnp.ones(4096)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = []
for _ in range(12):
  before = faults()
  f(x).block_until_ready()
  seen.append(faults() - before)
print(min(seen[4:]))  # the heap settles in the first calls
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc"
)
@pytest.mark.slow
def test_kept_memory_is_not_faulted_in_again():
  def faults(mode):
    done = subprocess.run(
      [sys.executable, "-c", SCRIPT, mode],
      capture_output=True,
      text=True,
      check=True,
    )
    return int(done.stdout)

  pages = 4096 * 4096 * 4 // 4096
  assert faults("default") > pages / 2
  assert faults("keep") < pages / 8


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_has_no_settings(error, monkeypatch):
  def other(name):
    raise error(name)

  monkeypatch.setattr(host.ctypes, "CDLL", other)
  assert host.keep_freed_memory() is False
