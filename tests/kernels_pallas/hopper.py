"""Compiling for an H100 that is not here.

Lowering needs no more than JAX. Compiling needs the CUDA wheels, whose
compiler needs no GPU: for it a kernel that asks for too much shared memory is
an error and, by a flag, also one whose registers spill to memory.
"""

from __future__ import annotations

import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

# Without a GPU the CUDA wheels find no driver, and would not register what
# compiles.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

NAME = "NVIDIA H100 80GB HBM3"
CORES = 132
# XLA's description of it, as far as compiling needs it.
H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{
    major: 9
    feature_extension: ACCELERATED_FEATURES
  }}
  core_count: {CORES}
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
device_description_str: "{NAME}"
"""


def lower(function, args, sharding=None, **how):
  """Lowers a function for an H100 that need not be here."""
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
  )
  device = AbstractDevice(NAME, CORES, "gpu")
  mesh = AbstractMesh((), (), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(function).trace(*args).lower(**how)


def place() -> SingleDeviceSharding:
  """An H100's place, for arguments to be lowered for it; else skips."""
  if not any(
    importlib.util.find_spec(f"jax_cuda{version}_plugin")
    for version in (12, 13)
  ):
    pytest.skip("needs the CUDA wheels: pip install 'thriftax[gpu]'")
  try:
    topology = topologies.get_topology_desc(
      platform="cuda",
      topology_name="h100",
      target_config=H100,
      topology="1x1x1",
    )
  except NotImplementedError as e:
    pytest.skip(f"the CUDA wheels need JAX_PLATFORMS=cpu without a GPU ({e})")
  return SingleDeviceSharding(topology.devices[0])


def compile_kernel(kernel, args, sharding):
  """Compiles a kernel alone; registers that spill are an error."""
  return lower(kernel, args, sharding).compile(
    {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
  )
