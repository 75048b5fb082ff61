"""A step's temporaries are not faulted in again once memory is kept."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from experiments import host_memory
if sys.argv[1] == "keep":
  assert host_memory.keep_freed()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.exp(x[:, None] + x) @ jnp.stack([x] * 8, 1))
x = jnp.ones(4096)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  f(x).block_until_ready()
before = faults()
for _ in range(4):
  f(x).block_until_ready()
print((faults() - before) // 4)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc"
)
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
