"""Compiles for TPUs that are not here, and reports what the compiler says.

libtpu holds the whole TPU compiler and needs no chip: a function is lowered
with arguments placed on the devices of a described topology and compiled as
it would be there. Memory that does not fit and kernels that the compiler
refuses are errors here as there. Nothing is run, so this says nothing of
values or time.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
  SingleDeviceSharding,
)

# An instruction of the compiled text, its asynchronous start or itself, and
# the channel that all parts of one collective share.
_COLLECTIVE = re.compile(
  r"[\]})] (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all"
  r"|collective-permute|collective-broadcast)(?:-start)?\((.*)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_KERNEL = re.compile(
  r"%(\S+) = .*custom_call_target=\"tpu_custom_call\""
  r".*\"used_scoped_memory_configs\":\[([^\]]*)\]"
)


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler says of one chip's program.

  Attributes:
    topology: what it was compiled for.
    devices: how many chips the topology has.
    flops: of one chip. XLA counts the body of a loop (`lax.scan`) once, and
      of a Pallas kernel only the `cost_estimate` that it declares.
    bytes_accessed: to and from memory; counted likewise.
    peak_bytes: the compiler's estimate of the most memory held at once.
    argument_bytes: of the arguments.
    output_bytes: of the results.
    alias_bytes: of the results that lie in donated arguments.
    temp_bytes: of temporaries.
    collectives: how many of each kind are in the program, those in the body
      of a loop once. One that the compiler has split into asynchronous parts
      is one; a reduce-scatter that it writes as an all-reduce and a slice is
      an all-reduce.
    kernel_vmem: bytes of VMEM that each Pallas kernel uses, by the name of
      its instruction, which holds the kernel's.
    text: the compiled HLO if it was asked for, else None.
  """

  topology: str
  devices: int
  flops: float
  bytes_accessed: float
  peak_bytes: int
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  collectives: dict[str, int]
  kernel_vmem: dict[str, int]
  text: str | None = None


def available() -> bool:
  """Whether libtpu, the compiler, is installed."""
  return (
    "TPU_LIBRARY_PATH" in os.environ
    or importlib.util.find_spec("libtpu") is not None
  )


def devices(topology: str) -> list[Any]:
  """The devices of a topology, to build a mesh of.

  Args:
    topology: chip and layout, as "v5e:4x4", "v5p:2x2x1", "v6e:2x2".

  Raises:
    ImportError: without libtpu, saying what to install.
    ValueError: for a topology that libtpu does not know.
  """
  if not available():
    raise ImportError(
      "compiling for a TPU needs libtpu: pip install 'thriftax[tpu]'"
    )
  # Otherwise libtpu locks a file, and a second process dies of it.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if ":" not in topology:
    raise ValueError(_unknown(topology, "it has no colon"))
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    )
  except jax.errors.JaxRuntimeError as e:
    if "INVALID_ARGUMENT" not in str(e):
      raise
    raise ValueError(_unknown(topology, str(e))) from e
  return list(description.devices)


def _unknown(topology: str, why: str) -> str:
  return (
    f"topology must be a chip and a layout such as 'v5e:4x4', 'v5p:2x2x1' or "
    f"'v6e:2x2', got {topology!r} ({why})"
  )


def make_mesh(topology: str, axes: Mapping[str, int]) -> Mesh:
  """A mesh over the first devices of a topology, axes left to the compiler.

  Devices are taken in the order of their ids: neighbours on a mesh axis need
  not be neighbours on the chip's network.

  Args:
    topology: as for `devices`.
    axes: size of each mesh axis, in order.

  Raises:
    ImportError: see `devices`.
    ValueError: see `devices`; or for a mesh larger than the topology.
  """
  found = devices(topology)
  needed = math.prod(axes.values())
  if not 0 < needed <= len(found):
    raise ValueError(
      f"the mesh {dict(axes)} needs {needed} devices, {topology} has "
      f"{len(found)}"
    )
  return Mesh(
    np.array(found[:needed]).reshape(tuple(axes.values())),
    tuple(axes),
    axis_types=(AxisType.Auto,) * len(axes),
  )


def compile_for(
  fn: Callable[..., Any],
  *args: Any,
  topology: str = "v5e:4x4",
  mesh: Mesh | Mapping[str, int] | None = None,
  in_shardings: Any = None,
  text: bool = False,
  compiler_options: Mapping[str, Any] | None = None,
) -> Report:
  """Compiles `fn(*args)` for a TPU topology.

    compile_for(step, params, batch, topology="v5e:4x4",
                mesh={"fsdp": 8, "tensor": 2},
                in_shardings=(P("fsdp"), P("fsdp")))

  Args:
    fn: a function, or the result of `jax.jit` where arguments are donated or
      static or results are placed; it is traced under the mesh, so that
      `PartitionSpec`s in it mean the topology's devices.
    *args: pytrees of arrays or `ShapeDtypeStruct`s; no value is used.
    topology: as for `devices`.
    mesh: axes by name (see `make_mesh`), or a mesh of the topology's devices
      that was made before. None is one device.
    in_shardings: a tuple with one entry per argument, each a `PartitionSpec`,
      a `Sharding` on the topology's devices, None (replicated), or a pytree
      of them that is a prefix of the argument. None replicates all.
    text: whether to keep the compiled HLO.
    compiler_options: of XLA.

  Returns:
    A `Report`. XLA counts a loop's body once in its FLOPs and bytes.

  Raises:
    ImportError: see `devices`.
    ValueError: see `devices`; for an unknown mesh axis, or a dimension that
      its mesh axes do not divide, naming the argument.
    jax.errors.JaxRuntimeError: from the compiler, as when memory does not fit.
  """
  if not isinstance(mesh, Mesh):
    mesh = make_mesh(topology, {"device": 1} if mesh is None else mesh)
    chips = len(devices(topology))
  else:
    chips = mesh.size
  if in_shardings is None:
    in_shardings = (None,) * len(args)
  if not isinstance(in_shardings, tuple) or len(in_shardings) != len(args):
    raise ValueError(
      f"in_shardings must be a tuple with one entry for each of the "
      f"{len(args)} arguments, got {in_shardings!r}"
    )
  placed = tuple(
    _place(f"argument {i}", x, shardings, mesh)
    for i, (x, shardings) in enumerate(zip(args, in_shardings, strict=True))
  )
  jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
  with jax.set_mesh(mesh):
    lowered = jitted.lower(*placed)
  compiled = lowered.compile(
    None if compiler_options is None else dict(compiler_options)
  )
  return _report(compiled, topology, chips, text)


def _place(name: str, tree: Any, shardings: Any, mesh: Mesh) -> Any:
  """`tree` as `ShapeDtypeStruct`s with their shardings."""
  is_sharding = lambda x: x is None or isinstance(x, PartitionSpec | Sharding)

  def many(sharding, subtree):
    if not isinstance(sharding, Sharding):
      spec = PartitionSpec() if sharding is None else sharding
      sharding = _named(name, spec, mesh)

    def one(path, x):
      where = name + jax.tree_util.keystr(path)
      try:
        sharding.shard_shape(x.shape)
      except ValueError as e:
        raise ValueError(f"{where} of shape {x.shape}: {e}") from e
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, subtree)

  return jax.tree.map(many, shardings, tree, is_leaf=is_sharding)


def _named(name: str, spec: PartitionSpec, mesh: Mesh) -> Sharding:
  if mesh.size == 1 and not any(spec):
    return SingleDeviceSharding(mesh.devices.item())
  try:
    return NamedSharding(mesh, spec)
  except ValueError as e:
    raise ValueError(f"{name}: {spec} does not fit {dict(mesh.shape)}") from e


def _report(compiled: Any, topology: str, chips: int, text: bool) -> Report:
  costs = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  hlo = compiled.as_text()
  return Report(
    topology=topology,
    devices=chips,
    flops=float(costs.get("flops", 0.0)),
    bytes_accessed=float(costs.get("bytes accessed", 0.0)),
    peak_bytes=memory.peak_memory_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    collectives=count_collectives(hlo),
    kernel_vmem=_kernel_vmem(hlo),
    text=hlo if text else None,
  )


def count_collectives(hlo: str) -> dict[str, int]:
  """How many collectives of each kind are in compiled HLO text."""
  seen = collections.defaultdict(set)
  for number, line in enumerate(hlo.splitlines()):
    found = _COLLECTIVE.search(line)
    if found:
      channel = _CHANNEL.search(found[2])
      seen[found[1]].add(channel[1] if channel else f"line {number}")
  return {kind: len(which) for kind, which in sorted(seen.items())}


def _kernel_vmem(hlo: str) -> dict[str, int]:
  out = {}
  for line in hlo.splitlines():
    found = _KERNEL.search(line)
    if found:
      sizes = re.findall(r'"size":"(\d+)"', found[2])
      out[found[1]] = sum(map(int, sizes))
  return out
