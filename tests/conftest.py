"""Eight simulated CPU devices for every test, and programs compiled quickly."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Most of the suite's time is compiling, of programs that run once. The
# processes that tests start do likewise: another optimization, other bits.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """Lets a module's programs go.

  Each holds memory mappings, of which Linux allows a process 65,530; XLA
  crashes beyond.
  """
  yield
  jax.clear_caches()


@pytest.fixture
def full_optimization():
  """For tests about compiled programs: what they hold, how they fare."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
