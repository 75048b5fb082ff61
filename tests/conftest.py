"""Eight simulated CPU devices for every test, and programs compiled quickly."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Most of the suite's time is compiling, of programs that run once. The
# processes that tests start do likewise: another optimization, other bits.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
if jax.__version_info__[:2] == (0, 10):
  # Fusions through LLVM alone, without MLIR: less than half the time again.
  # JAX 0.12 has no such choice: the quick part there goes through MLIR.
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
  )


def pytest_collection_modifyitems(config, items):
  """Leaves the large budgets of `tests.fuzz` out unless they are asked for."""
  if "fuzz" in config.option.markexpr:
    return
  large = [item for item in items if item.get_closest_marker("fuzz")]
  config.hook.pytest_deselected(items=large)
  items[:] = [item for item in items if not item.get_closest_marker("fuzz")]


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """Lets a module's programs go, and has it leave the switch as it was.

  Each program holds memory mappings, of which Linux allows a process 65,530;
  XLA crashes beyond.
  """
  yield
  jax.clear_caches()
  assert jax.config.read("jax_disable_most_optimizations")


@pytest.fixture
def full_optimization():
  """For tests about compiled programs: what they hold, how they fare."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
