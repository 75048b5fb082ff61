"""The number of rounds of a loop in HLO text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)"
  r"=%?([\w.\-]+)"
)
_TRIPS = re.compile(r"known_trip_count\D*(\d+)")
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}

# A computation: its instructions by name.
Table = Mapping[str, Any]


def trips(loop: Any, table: Table, computations: Mapping[str, Table]) -> int:
  """Returns how often a loop runs.

  It is the compiler's note where there is one; else it follows from the
  condition (an element of the carry compared with a constant), from the
  carry's first value and from what the body adds to it. Where these two are
  not constants, they count as 0 and 1, as `jax.lax.scan` has them.

  Args:
    loop: the `while` instruction.
    table: the computation that it is in.
    computations: all of them, by name.

  Raises:
    ValueError: the text does not tell.
  """
  noted = _TRIPS.search(loop.rest)
  if noted:
    return int(noted[1])
  named = lambda key: re.search(key + r"=%?([\w.\-]+)", loop.rest)[1]
  part = lambda key: computations[named(key)]
  found = _compared(part("condition"), computations)
  if found is None:
    raise ValueError(f"a loop of unknown length: while{loop.rest[:200]}")
  (index, offset), order, bound = found
  first = _element(table.get(loop.operands[0]), index)
  first = _scalar(first, table, computations)
  body = part("body")
  last = _scalar(_element(body[_root(body)], index), body, computations)
  first = first if isinstance(first, int) else 0
  same = isinstance(last, tuple) and last[0] == index and last[1]
  step = last[1] if same else 1
  distance = (bound - offset - first) * (1 if step > 0 else -1)
  distance += order in ("LE", "GE")
  return max(0, -(-distance // abs(step)))


def _compared(condition, computations):
  """`((index, offset), order, bound)` of a condition, or None."""
  name, scope, parameters = _root(condition), condition, None
  while scope[name].opcode in ("fusion", "call"):
    name, scope, parameters = _enter(
      scope[name], scope, computations, parameters
    )
  test = scope[name]
  if test.opcode != "compare":
    return None
  order = re.search(r"direction=(\w+)", test.rest)[1]
  left, right = (
    _scalar(x, scope, computations, parameters) for x in test.operands
  )
  if isinstance(left, int):
    left, right, order = right, left, _MIRRORED.get(order, order)
  if not isinstance(left, tuple) or not isinstance(right, int):
    return None
  return (left, order, right) if order != "EQ" else None


def _root(table: Table) -> str:
  """The name of the instruction that makes a computation's result."""
  return next(name for name, x in table.items() if x.root)


def _enter(x, scope, computations, parameters):
  """The result's name within what a fusion or call runs, and its operands."""
  inner = computations[CALLED.search(x.rest)[1]]
  given = [_scalar(y, scope, computations, parameters) for y in x.operands]
  return _root(inner), inner, given


def _element(x: Any, index: int) -> str | None:
  """The name of an element of a tuple."""
  return x.operands[index] if x is not None and x.opcode == "tuple" else None


def _scalar(name, scope, computations, parameters=None):
  """A whole number, or `(index, offset)` of an element of the loop's carry.

  Args:
    name: of an instruction, or None.
    scope: the computation that it is in.
    computations: all of them.
    parameters: what that one's parameters are; None where the only one is the
      carry.

  Returns:
    None for anything else.
  """
  x = scope.get(name)
  if x is None:
    return None
  again = lambda name: _scalar(name, scope, computations, parameters)
  if x.opcode == "constant":
    return int(x.inside) if re.fullmatch(r"-?\d+", x.inside) else None
  if x.opcode == "parameter":
    return None if parameters is None else parameters[int(x.inside)]
  if x.opcode == "get-tuple-element":
    index = int(re.search(r"index=(\d+)", x.rest)[1])
    source = scope.get(x.operands[0])
    carry = source is not None and source.opcode == "parameter"
    if carry and parameters is None:
      return index, 0
    return again(_element(source, index))
  if x.opcode in ("copy", "bitcast", "convert", "reshape"):
    return again(x.operands[0])
  if x.opcode in ("add", "subtract"):
    return _sum(*map(again, x.operands), 1 if x.opcode == "add" else -1)
  if x.opcode in ("fusion", "call"):
    name, inner, given = _enter(x, scope, computations, parameters)
    return _scalar(name, inner, computations, given)
  return None


def _sum(a, b, sign):
  """`a + sign * b` of what `_scalar` gives."""
  if isinstance(b, tuple) and sign == 1:
    a, b = b, a
  if not isinstance(b, int):
    return None
  if isinstance(a, tuple):
    return a[0], a[1] + sign * b
  return a + sign * b if isinstance(a, int) else None
