"""What a compiled step holds on a device."""

from __future__ import annotations

import jax


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
