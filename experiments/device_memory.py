"""What devices have, what a run needs at least, what a compiled step holds."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import errors, reports
from jaxlib_ext import paths, sharding, specs

# Where control groups (version 2, version 1) put a container's limit.
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def planned(compiled: jax.stages.Compiled) -> int:
  """The bytes that the compiler plans for, on each device."""
  plan = compiled.memory_analysis()
  return (
    plan.argument_size_in_bytes
    + plan.output_size_in_bytes
    + plan.temp_size_in_bytes
    - plan.alias_size_in_bytes
  )


def peak(compiled: jax.stages.Compiled, device: jax.Device) -> int:
  """The most bytes held on a device so far; on CPUs, the plan."""
  stats = device.memory_stats() or {}
  return stats.get("peak_bytes_in_use") or planned(compiled)


def host_bytes() -> int:
  """The host's memory, or this container's share; 0 where nothing tells."""
  try:
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  except (AttributeError, OSError, ValueError):
    found = []
  for path in _LIMITS:
    try:
      text = pathlib.Path(path).read_text(encoding="ascii").strip()
    except OSError:
      continue
    if text.isdecimal():  # Else "max".
      found.append(int(text))
  return min(found, default=0)


def device_bytes(mesh: Mesh) -> int:
  """What each device of a mesh has; 0 where it does not tell.

  CPU devices share the host's memory, however many of them are simulated.
  """
  here = [
    d for d in mesh.devices.flat if d.process_index == jax.process_index()
  ]
  if not here:
    return 0
  if here[0].platform == "cpu":
    return host_bytes() // len(here)
  return (here[0].memory_stats() or {}).get("bytes_limit", 0)


def check(needed: Mapping[str, float], mesh: Mesh, note: str = "") -> None:
  """Refuses a run that cannot fit, before anything is compiled or allocated.

  Args:
    needed: what holds how many bytes on each device, at least.
    mesh: the devices.
    note: put behind the line.

  Raises:
    UserError: naming what is needed, what there is, and the remedy.
  """
  total, room = sum(map(math.ceil, needed.values())), device_bytes(mesh)
  if not room or total <= room:
    return
  parts = ", ".join(
    f"{name} {reports.bytes_text(size)}" for name, size in needed.items()
  )
  raise errors.UserError(
    f"memory: a device has {reports.bytes_text(room)}, the run needs at least "
    f"{reports.bytes_text(total)} ({parts}); choose a smaller model, batch or "
    f"optimizer.name, or more devices{note}"
  )


def check_model(
  tree: Any,
  mesh: Mesh,
  *,
  activations: int,
  copies: int = 1,
  most_bits: int = 64,
) -> None:
  """Compares parameters and activations with memory, from shapes alone.

  Args:
    tree: of `specs.ParamSpec`.
    mesh: the devices, which divide the parameters.
    activations: bytes of them that a step holds at least, on each device.
    copies: how often the parameters are held.
    most_bits: of one stored number, where it may be narrower than its dtype.

  Raises:
    UserError: they do not fit.
  """
  flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=specs.is_spec)[0]
  bits = {
    f"{paths.leaf_name(path)} {list(spec.shape)}": spec.size
    * min(most_bits, 8 * jnp.dtype(spec.dtype).itemsize)
    // sharding.parts(spec.axes, mesh)
    for path, spec in flat
  }
  check(
    {
      "parameters": copies * sum(bits.values()) // 8,
      "activations": activations,
    },
    mesh,
    f"; the largest parameter is {max(bits, key=bits.get)}",
  )
