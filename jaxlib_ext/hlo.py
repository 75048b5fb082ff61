"""What a compiled program does on each device, counted from its HLO text.

`cost_analysis` counts the body of a loop once. Here a loop's body counts as
often as the loop runs, and of a conditional's branches the dearest one.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxlib_ext import hlo_loops

_KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_WIDTHS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Costs:
  """Of one device's program, loops counted as often as they run.

  Attributes:
    matmul_flops: of all products of matrices, two per multiplication.
    collective_bytes: received from other devices, by kind of collective.
    collectives: how many are carried out, by kind.
  """

  matmul_flops: float
  collective_bytes: dict[str, float]
  collectives: dict[str, float]

  @property
  def total_collective_bytes(self) -> float:
    return sum(self.collective_bytes.values())


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line: its type, operation, operands, and what follows."""

  type: str
  opcode: str
  inside: str
  operands: list[str]
  rest: str
  root: bool = False


def costs(text: str) -> Costs:
  """Counts what a compiled program's HLO text (`as_text()`) does.

  Args:
    text: HLO after partitioning, of one device.

  Raises:
    ValueError: a loop whose number of rounds the text does not tell.
  """
  computations, entry = _parse(text)
  fused = _fused(computations)
  done: dict[str, collections.Counter] = {}
  channels: set[tuple[str, str]] = set()

  def own(name, instruction, table):
    out = _own(instruction, table, name)
    channel = _CHANNEL.search(instruction.rest)
    if channel and name in fused:
      # TPUs write an asynchronous collective as several fusions that share
      # its channel, each with the whole of it.
      piece = instruction.opcode, channel[1]
      if piece in channels:
        return {}
      channels.add(piece)
    return out

  def visit(name: str) -> collections.Counter:
    if name not in done:
      total = collections.Counter()
      table = computations[name]
      for instruction in table.values():
        total.update(own(name, instruction, table))
        total.update(_called(instruction, table, computations, visit))
      done[name] = total
    return done[name]

  total = visit(entry)
  part = lambda what: {k: total[what, k] for k in _KINDS if total[what, k]}
  return Costs(total["flops"], part("bytes"), part("count"))


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  computations, entry, table = {}, "", {}
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      table = computations.setdefault(head[1], {})
      entry = head[1] if line.startswith("ENTRY") else entry
      continue
    found = _INSTRUCTION.match(line)
    opcode = found and _OPCODE.search(" " + found[2])
    if opcode:
      body = " " + found[2]
      inside = _parenthesised(body[opcode.end() :])
      operands = re.findall(r"%([\w.\-]+)", inside)
      rest = body[opcode.end() + len(inside) :]
      table[found[1]] = _Instruction(
        body[: opcode.start()],
        opcode[1],
        inside,
        operands,
        rest,
        line.lstrip().startswith("ROOT "),
      )
  return computations, entry


def _parenthesised(text: str) -> str:
  """Up to the bracket that closes what was opened before `text`."""
  depth = 1
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return text[:i]
  return text


def _fused(computations: Any) -> set[str]:
  """Names of the computations that fusions call."""
  return {
    name
    for table in computations.values()
    for instruction in table.values()
    if instruction.opcode == "fusion"
    for name in hlo_loops.CALLED.findall(instruction.rest)
  }


def _called(instruction, table, computations, visit) -> collections.Counter:
  """Of the computations that an instruction runs."""
  rest, opcode = instruction.rest, instruction.opcode
  if opcode.endswith(("-done", "-update")):  # belong to what has started
    return collections.Counter()
  branches = _BRANCHES.search(rest)
  names = hlo_loops.CALLED.findall(rest)
  if branches:
    names = [name.strip().lstrip("%") for name in branches[1].split(",")]
  inner = [visit(name) for name in names if name in computations]
  if opcode == "conditional":
    return max(inner, key=lambda c: c["flops"], default=collections.Counter())
  total = collections.Counter()
  for counter in inner:
    total.update(counter)
  if opcode == "while" and any(total.values()):
    trips = hlo_loops.trips(instruction, table, computations)
    total = collections.Counter({k: trips * v for k, v in total.items()})
  return total


def _own(
  instruction: _Instruction, table: Mapping[str, _Instruction], scope: str
) -> dict[Any, float]:
  """FLOPs and bytes of an instruction of the computation `scope` itself."""
  opcode = instruction.opcode.removesuffix("-start")
  if opcode == "dot":
    return {"flops": _dot(instruction, table)}
  if opcode == "convolution":
    return {"flops": _convolution(instruction, table)}
  if opcode in _KINDS:
    if opcode == "all-reduce" and scope.startswith("all-reduce-scatter"):
      opcode = "reduce-scatter"  # A TPU's, a fusion of it and a slice.
    return {
      ("bytes", opcode): _received(instruction, opcode, table),
      ("count", opcode): 1,
    }
  return {}


def _shapes(text: str) -> list[tuple[str, list[int]]]:
  return [
    (kind, [int(size) for size in sizes.split(",") if size])
    for kind, sizes in _SHAPE.findall(text)
  ]


def _nbytes(text: str) -> float:
  total = 0.0
  for kind, sizes in _shapes(text):
    digits = re.search(r"\d+", kind)
    bits = _WIDTHS.get(kind, int(digits[0]) if digits else 0)
    total += math.prod(sizes) * bits / 8
  return total


def _dot(instruction, table) -> float:
  (_, out), *_ = _shapes(instruction.type)
  (_, left), *_ = _shapes(table[instruction.operands[0]].type)
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
  over = [int(axis) for axis in axes[1].split(",") if axis] if axes else []
  return 2.0 * math.prod(out) * math.prod(left[axis] for axis in over)


def _convolution(instruction, table) -> float:
  """TPUs write products so, with a batch as a dimension of space."""
  left, right, _ = re.search(
    r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest
  ).groups()
  (_, out), *_ = _shapes(instruction.type)
  (_, a), *_ = _shapes(table[instruction.operands[0]].type)
  (_, b), *_ = _shapes(table[instruction.operands[1]].type)
  result = re.search(r"->(\w+)", instruction.rest)[1]
  flops = 2.0 * b[right.index("i")]
  flops *= out[result.index("b")] * out[result.index("f")]
  window = re.search(r"window=\{([^}]*)\}", instruction.rest)
  fields = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
  for i in range(len(left) - 2):
    label = str(i)
    get = lambda key, default, i=i: (
      fields[key].split("x")[i] if key in fields else default
    )
    low = int(get("pad", "0_0").split("_")[0])
    stride, dilate = int(get("stride", "1")), int(get("lhs_dilate", "1"))
    spread = int(get("rhs_dilate", "1"))
    reach = (a[left.index(label)] - 1) * dilate
    places = (
      o * stride - low + k * spread
      for o in range(out[result.index(label)])
      for k in range(b[right.index(label)])
    )
    flops *= sum(0 <= at <= reach and at % dilate == 0 for at in places)
  return flops


def _group_size(rest: str) -> int:
  named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
  if named:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    return math.prod(int(sizes[n]) for n in re.findall(r"'([^']+)'", named[2]))
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
  if iota:
    return int(iota[2])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  return len(listed[1].split(",")) if listed else 1


def _received(instruction, kind, table) -> float:
  """Bytes that one device receives in a collective."""
  given = sum(_nbytes(table[name].type) for name in instruction.operands)
  if kind in ("collective-permute", "collective-broadcast"):
    return given
  size = _group_size(instruction.rest)
  if kind == "all-gather":
    return given * (size - 1)
  share = given * (size - 1) / size
  return 2 * share if kind == "all-reduce" else share
