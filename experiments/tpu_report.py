"""What the TPU kernels of linear attention ask of chips that are not here.

  python -m experiments.tpu_report --chips=v5e,v6e

Compiles every case for every chip with libtpu (the `tpu` extra), and prints,
for each kernel, the VMEM that was planned and that the compiler used, and the
FLOPs and bytes per token and value head, counted exactly, beside the fewest
that the chunk form needs. From both follow the nanoseconds per token and head
that the chip's peaks would allow: a bound, nothing ran. A product in full
float32 precision counts as the six of bfloat16 that the chip makes of it, and
in the floor as one. One JSON line per run is appended to
`experiments/records/tpu_report.jsonl`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import errors
from experiments.linear import floors
from jaxlib_ext import records, topology
from kernels_pallas.linear import problem, tpu, tpu_plan


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip by its vendor's peaks.

  Attributes:
    topology: the smallest that libtpu compiles for.
    flops: bfloat16, per second.
    bandwidth: bytes per second of HBM.
  """

  topology: str
  flops: float
  bandwidth: float


CHIPS = {
  "v5e": Chip("v5e:2x2", 197e12, 0.82e12),
  "v5p": Chip("v5p:2x2x1", 459e12, 2.77e12),
  "v6e": Chip("v6e:2x2", 918e12, 1.64e12),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """An op and its sizes, T = 4096 tokens of bfloat16 in chunks of 64.

  Attributes:
    op: "mdn", "gdn", "kda" or "linear" (with a scalar decay).
    heads: H, all with their own keys.
    key: K.
    value: V.
  """

  op: str
  heads: int
  key: int
  value: int


CASES = {
  "mdn-400M": Case("mdn", 6, 128, 256),
  "mdn-1.3B": Case("mdn", 6, 256, 512),
  "mdn-d128": Case("mdn", 8, 128, 128),
  "gdn-d128": Case("gdn", 8, 128, 128),
  "kda-d128": Case("kda", 8, 128, 128),
  "linear-d128": Case("linear", 8, 128, 128),
}
LENGTH, CHUNK = 4096, 64
# A row of the report, the call that it is compiled in, a word of its name.
KERNELS = (
  ("forward", "forward", "forward"),
  ("saving", "gradient", "forward"),
  ("backward", "gradient", "backward"),
)


def abstract_inputs(case: Case) -> problem.Inputs:
  """The case's arrays, as shapes."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
  key = array(jnp.bfloat16, LENGTH, case.heads, case.key)
  gate = array(jnp.float32, LENGTH, case.heads)
  channels = array(jnp.float32, LENGTH, case.heads, case.key)
  second = case.op == "mdn"
  state = array(jnp.float32, case.heads, case.key, case.value)
  return problem.Inputs(
    q=key,
    k=key,
    p=None,
    v=array(jnp.bfloat16, LENGTH, case.heads, case.value),
    log_decay=channels if case.op == "kda" else gate,
    log_momentum=gate if second else None,
    beta=None if case.op == "linear" else gate,
    eta=gate if second else None,
    state=(state,) * (2 if second else 1),
    segments=None,
  )


def floor_bytes(case: Case, backward: bool) -> float:
  """The fewest bytes per token and head, each array moved once.

  Forward q, k, v and the gates are read and o is written. Backward these, the
  cotangent of o and the states that entered the chunks are read, and as many
  cotangents are written.
  """
  states = 2 if case.op == "mdn" else 1
  gates = 4 * {"mdn": 4, "gdn": 2, "kda": case.key + 1, "linear": 1}[case.op]
  vectors = 2 * (2 * case.key + case.value)
  if not backward:
    return vectors + 2 * case.value + gates
  entered = 4 * states * case.key * case.value / CHUNK
  return 2 * (vectors + gates) + 2 * case.value + entered


def measure(case: Case, chip: Chip) -> list[dict[str, Any]]:
  """Compiles a case for a chip.

  Returns:
    For each kernel, forward (alone, as in inference), forward that saves the
    states for a gradient, and backward: VMEM, FLOPs and bytes.
  """
  inputs = abstract_inputs(case)
  options = problem.Options(
    scale=case.key**-0.5,
    delta=case.op != "linear",
    chunk_size=CHUNK,
    interpret=False,
  )
  plan = tpu_plan.make(inputs, options)
  forward = lambda inputs: tpu.run(inputs, options)

  def gradient(inputs, do, dstate):
    outputs, pullback = jax.vjp(forward, inputs)
    return outputs, pullback((do, dstate))

  calls = {
    "forward": (forward, inputs),
    "gradient": (gradient, inputs, inputs.v, inputs.state),
  }
  used, costs = {}, {}
  for name, call in calls.items():
    report = topology.compile_for(*call, topology=chip.topology)
    used[name], costs[name] = report.kernel_vmem, _costs(*call)
  return [
    {
      "kernel": kernel,
      "vmem_planned": tpu_plan.vmem_bytes(plan),
      "vmem_used": _find(used[call], word),
      "heads_per_step": plan.heads,
      "splits": plan.splits,
      **_work(case, chip, _find(costs[call], word), word == "backward"),
    }
    for kernel, call, word in KERNELS
  ]


def _find(by_name: dict[str, Any], word: str) -> Any:
  (found,) = (x for name, x in by_name.items() if word in name)
  return found


def _costs(f: Callable[..., Any], *args: Any) -> dict[str, Any]:
  """The cost estimates of the kernels in a function, by name."""
  out = {}

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "pallas_call":
        out[eqn.params["name"]] = eqn.params["cost_estimate"]
        continue
      for x in eqn.params.values():
        inner = getattr(x, "jaxpr", x)
        if hasattr(inner, "eqns"):
          visit(inner)

  visit(jax.make_jaxpr(f)(*args).jaxpr)
  return out


def _work(
  case: Case, chip: Chip, cost: Any, backward: bool
) -> dict[str, float]:
  """Per token and head: FLOPs, bytes, their floors, and what they allow."""
  tokens = LENGTH * case.heads
  flops, moved = cost.flops / tokens, cost.bytes_accessed / tokens
  floor = floors.backward if backward else floors.forward
  floor_flops = floor(case.op, CHUNK, case.key, case.value)
  bound = lambda flops, size: (
    1e9 * max(flops / chip.flops, size / chip.bandwidth)
  )
  return {
    "flops": flops,
    "floor_flops": floor_flops,
    "bytes": moved,
    "floor_bytes": floor_bytes(case, backward),
    "bound_ns": bound(flops, moved),
    "floor_ns": bound(floor_flops, floor_bytes(case, backward)),
  }


def line(name: str, chip: str, row: dict[str, Any]) -> str:
  """A row of the table."""
  mib = lambda key: f"{row[key] / 2**20:6.1f}"
  pair = lambda key, unit: (
    f"{row[key] / unit:9.0f}{row['floor_' + key] / unit:7.0f}"
  )
  return (
    f"{name:12s}{chip:5s}{row['kernel']:9s}{row['heads_per_step']:4d}"
    f"{row['splits']:6d}{mib('vmem_planned')}{mib('vmem_used')}"
    f"{pair('flops', 1e3)}{pair('bytes', 1)}"
    f"{row['bound_ns']:9.2f}{row['floor_ns']:7.2f}"
  )


HEADER = f"""\
{"":26s}heads V cut   VMEM, MiB    kFLOP  floor    bytes  floor    at least, ns
{"":37s}plan  used                                   floor"""


def main() -> None:
  """Prints the table and appends its record."""
  values = flags.FLAGS
  if not topology.available():
    raise errors.UserError("libtpu is needed: pip install 'thriftax[tpu]'")
  for flag, known in (("chips", CHIPS), ("cases", CASES)):
    unknown = sorted(set(getattr(values, flag)) - set(known))
    if unknown or not getattr(values, flag):
      raise errors.UserError(f"--{flag}: got {unknown}, allowed: {list(known)}")
  print(HEADER)
  rows = []
  for name in values.cases:
    for chip in values.chips:
      for row in measure(CASES[name], CHIPS[chip]):
        print(line(name, chip, row), flush=True)
        rows.append({"case": name, "chip": chip, **row})
  records.append(
    values.record,
    {
      "length": LENGTH,
      "chunk": CHUNK,
      "cases": {name: dataclasses.asdict(CASES[name]) for name in values.cases},
      "chips": {name: dataclasses.asdict(CHIPS[name]) for name in values.chips},
      "libtpu": importlib.metadata.version("libtpu"),
      "rows": rows,
      **records.provenance(),
    },
  )


def _define_flags() -> None:
  flags.DEFINE_list("chips", list(CHIPS), "Which chips to compile for.")
  flags.DEFINE_list("cases", list(CASES), "Which cases to compile.")
  flags.DEFINE_string(
    "record",
    "experiments/records/tpu_report.jsonl",
    "The JSON Lines file that gets the record.",
  )


if __name__ == "__main__":
  errors.run_main("tpu_report", main, _define_flags)
