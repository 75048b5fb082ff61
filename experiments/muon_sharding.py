"""What Newton-Schulz costs each device when parameters are sharded.

  python -m experiments.muon_sharding --cases=60M-8,1B-8

Compiles `scale_by_muon` of a LLaMA's matrices for a mesh, twice: as it is, and
as the compiler divides it by itself ("naive": the same code, traced where it
cannot see the mesh). Counted from the compiled program, loops as often as they
run: FLOPs of products per device beside an even share of what one device would
do; bytes that a device receives beside its part of the momentum read and
written once; temporaries. Cases on 8 devices are compiled for simulated CPU
devices, whose collectives carry bfloat16 as float32; those named v5e for
a pod that is not here (libtpu, the `tpu` extra). Nothing is run. One JSON line
per run is appended to `experiments/records/muon_sharding.jsonl`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import optim
from experiments import errors
from jaxlib_ext import hlo, paths, records, sharding, specs, topology
from models import transformer
from optim.orthogonal import division


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and a mesh.

  Attributes:
    preset: a size of `transformer.llama`.
    mesh: sizes of its axes.
    topology: None for simulated CPU devices.
    overrides: fields of the model's config.
    experts: feed-forward networks of each layer, where they are a mixture.
  """

  preset: str
  mesh: Mapping[str, int]
  topology: str | None = None
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  experts: int = 0


_CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
_POD = {"fsdp": 32, "tensor": 8}

CASES = {
  "60M-8": Case("60M", _CUBE),
  "60M-8-fsdp": Case("60M", {"fsdp": 8}),
  "60M-8-tensor": Case("60M", {"fsdp": 2, "tensor": 4}),
  "60M-8-uneven": Case("60M", _CUBE, None, {"num_layers": 5}),
  "1B-8": Case("1B", {"data": 2, "fsdp": 4}),
  "350M-v5e": Case("350M", _POD, "v5e:16x16"),
  "5B-v5e": Case("7B", _POD, "v5e:16x16", {"num_layers": 24}),
  "7B-v5e-16": Case("7B", {"fsdp": 4, "tensor": 4}, "v5e:4x4"),
  "60M-8-moe": Case("60M", _CUBE, None, {"d_ff": 256}, experts=16),
  "14B-v5e-moe": Case("1B", _POD, "v5e:16x16", {"d_ff": 1408}, experts=64),
}
_STEPS = 5


def matrices(case: Case) -> dict[str, specs.ParamSpec]:
  """The model's parameters that Muon takes."""
  cfg = transformer.llama(case.preset, **case.overrides)
  tree = transformer.param_specs(cfg)
  labels = optim.label_params(specs.abstract(tree))
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=specs.is_spec)
  out = {
    paths.leaf_name(path): spec
    for (path, spec), label in zip(flat, jax.tree.leaves(labels), strict=True)
    if label == "matrix"
  }
  if not case.experts:
    return out
  return {
    name: _expert(spec, case.experts) if "mlp" in spec.axes else spec
    for name, spec in out.items()
  }


def _expert(spec: specs.ParamSpec, count: int) -> specs.ParamSpec:
  """As many of a layer's matrix, stacked behind the layers."""
  (layers, *shape), (axis, *axes) = spec.shape, spec.axes
  return dataclasses.replace(
    spec, shape=(layers, count, *shape), axes=(axis, None, *axes)
  )


def flops(shapes: list[tuple[int, ...]]) -> float:
  """Of five steps of the direct form for arrays [layers, ..., d_in, d_out]."""
  total = 0
  for *count, d_in, d_out in shapes:
    m, n = sorted((d_in, d_out))
    total += math.prod(count) * _STEPS * (4 * m * m * n + 2 * m**3)
  return float(total)


def compile_update(case: Case, naive: bool) -> jax.stages.Compiled:
  """One update of the momentum of float32 gradients, donated."""
  if case.topology is None:
    mesh = sharding.make_mesh(case.mesh)
  else:
    mesh = topology.make_mesh(case.topology, case.mesh)
  tree = matrices(case)
  where = sharding.shardings(tree, mesh)
  tx = optim.scale_by_muon(ns_form="direct")
  everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = optim.MuonState(where, everywhere)
  grads = {
    # A sharding in a type shows the mesh to whoever traces; one beside it
    # shows it to the compiler only.
    name: jax.ShapeDtypeStruct(
      spec.shape, jnp.float32, sharding=None if naive else where[name]
    )
    for name, spec in tree.items()
  }
  step = jax.jit(
    tx.update,
    in_shardings=(where, state),
    out_shardings=(where, state),
    donate_argnums=1,
  )
  count = jax.ShapeDtypeStruct((), jnp.int32)
  return step.lower(grads, optim.MuonState(grads, count)).compile()


def measure(case: Case, naive: bool) -> dict[str, Any]:
  """Compiles and counts.

  Returns:
    Per device: "flops" and "ideal_flops"; "collective_bytes" received, by
    kind and "total_collective_bytes", and "momentum_bytes", twice the device's
    part of the float32 momentum; "collectives" carried out; "temp_bytes" and
    "argument_bytes".
  """
  compiled = compile_update(case, naive)
  count = hlo.costs(compiled.as_text())
  memory = compiled.memory_analysis()
  shapes = [spec.shape for spec in matrices(case).values()]
  parts = math.prod(size for name, size in case.mesh.items() if name != "data")
  elements = sum(map(math.prod, shapes))
  return {
    "flops": count.matmul_flops,
    "ideal_flops": flops(shapes) / math.prod(case.mesh.values()),
    "collective_bytes": count.collective_bytes,
    "total_collective_bytes": count.total_collective_bytes,
    "momentum_bytes": 2 * 4 * elements / parts,
    "collectives": count.collectives,
    "temp_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
  }


def plan(case: Case) -> list[list[dict[str, Any]]]:
  """How `optim.muon` divides the case's matrices."""
  counts: dict[tuple[int, int], int] = {}
  for *count, d_in, d_out in (spec.shape for spec in matrices(case).values()):
    side = tuple(sorted((d_in, d_out)))
    counts[side] = counts.get(side, 0) + math.prod(count)
  out = []
  for m in sorted({m for m, _ in counts}):
    shapes = [(count, *side) for side, count in counts.items() if side[0] == m]
    for batch in division.plan(
      shapes, math.prod(case.mesh.values()), steps=_STEPS, itemsize=2
    ):
      out.append(
        [
          {
            "matrices": x.stop - x.start,
            "shape": list(shapes[x.group][1:]),
            "strips": x.strips,
          }
          for x in batch
        ]
      )
  return out


HEADER = (
  f"{'case':14s}{'':7s}{'GFLOP':>9s}{'/ideal':>8s}{'received, MB':>14s}"
  f"{'/momentum':>11s}{'temporary, MB':>15s}  collectives"
)


def line(name: str, how: str, row: dict[str, Any]) -> str:
  """A row of the table."""
  received = row["total_collective_bytes"]
  kinds = ", ".join(
    f"{count:g} {kind}" for kind, count in row["collectives"].items()
  )
  return (
    f"{name:14s}{how:7s}{row['flops'] / 1e9:9.1f}"
    f"{row['flops'] / row['ideal_flops']:8.2f}{received / 1e6:14.2f}"
    f"{received / row['momentum_bytes']:11.2f}{row['temp_bytes'] / 1e6:15.1f}"
    f"  {kinds}"
  )


def main() -> None:
  """Prints the table and appends its record."""
  names = flags.FLAGS.cases
  unknown = sorted(set(names) - set(CASES))
  if unknown or not names:
    raise errors.UserError(f"--cases: got {unknown}, allowed: {list(CASES)}")
  if any(CASES[n].topology for n in names) and not topology.available():
    raise errors.UserError(
      "cases of a pod need libtpu: pip install 'thriftax[tpu]'"
    )
  jax.config.update("jax_num_cpu_devices", 8)
  print(HEADER)
  rows = []
  for name in names:
    for how in ("ours", "naive"):
      row = measure(CASES[name], how == "naive")
      print(line(name, how, row), flush=True)
      rows.append({"case": name, "how": how, **row})
  records.append(
    flags.FLAGS.record,
    {
      "cases": {name: dataclasses.asdict(CASES[name]) for name in names},
      "plans": {name: plan(CASES[name]) for name in names},
      "rows": rows,
      **records.provenance(),
    },
  )


def _define_flags() -> None:
  flags.DEFINE_list(
    "cases",
    [name for name, case in CASES.items() if case.topology is None],
    "Which cases to compile.",
  )
  flags.DEFINE_string(
    "record",
    "experiments/records/muon_sharding.jsonl",
    "The JSON Lines file that gets the record.",
  )


if __name__ == "__main__":
  errors.run_main("muon_sharding", main, _define_flags)
