"""Eight simulated CPU devices for every test, set before JAX starts.

The processes that tests start share what they compile: a run that is killed
and started again, several times, compiles the same program each time. JAX has
read its environment by the time these are set, so the tests' own process
compiles everything itself.
"""

import os
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

_CACHE = tempfile.TemporaryDirectory(prefix="thriftax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


# Most of the suite's time is compiling, of programs that run once.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def full_optimization():
  """For tests about compiled programs: what they hold, how they fare."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
