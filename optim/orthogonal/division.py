"""Which matrices go through Newton-Schulz at once, and which are cut.

Matrices are shared out whole, so that no product is done twice. Where there
are fewer of them than devices, that leaves devices idle, and the largest one
sets the time. Then matrices of several shapes that share their short side m go
at once, one to a device, and the longest are cut along their long side into
strips for 2, 4, ... devices. These add up their Gram matrices [m, m] in every
step, which may move more than the two exchanges of `placement` do, so that it
is done only where it spares enough products. What is left over when a number
of matrices is divided by that of the devices goes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Strips must spare a device so many FLOPs for every byte that they make it
# receive: about the ratio of a TPU's or GPU's peak in bfloat16 to the
# bandwidth of its links to the neighbours (v5e: 197e12 / 0.1e12).
_FLOPS_PER_BYTE = 2000

# How much more than an even share of the work is not worth strips.
_EVEN_ENOUGH = 1.1


class Span(NamedTuple):
  """Some matrices of one shape.

  Attributes:
    group: index of the shape.
    start: the first of them.
    stop: the one after the last.
    strips: how many devices share one matrix.
  """

  group: int
  start: int
  stop: int
  strips: int


# Spans that go through the chain at once.
Batch = tuple[Span, ...]


class _Cost(NamedTuple):
  """Of one step and the busiest device: FLOPs, bytes received for strips."""

  flops: float
  moved: float
  batches: list[Batch]


def plan(
  shapes: Sequence[tuple[int, int, int]],
  devices: int,
  *,
  steps: int,
  itemsize: int,
  whole: bool = False,
) -> list[Batch]:
  """Chooses what goes at once, and what is cut into strips.

  Whole matrices, shape by shape, if that is about an even share for all.
  Otherwise what a multiple of the devices leaves over may be cut: as long as
  a device receives no more than its part of a float32 momentum, read and
  written once, for as few FLOPs as possible; beyond that only where
  `_FLOPS_PER_BYTE` are spared.

  Args:
    shapes: (count, m, n) of each group of matrices, with the same m <= n.
    devices: how many share the work.
    steps: of the polynomial.
    itemsize: bytes of an entry that is exchanged.
    whole: whether to cut none.

  Returns:
    Batches that hold every matrix once.
  """
  plain = _sum(
    _Cost(-(-count // devices) * _flops(m, n), 0.0, [(Span(i, 0, count, 1),)])
    for i, (count, m, n) in enumerate(shapes)
  )
  even = sum(count * _flops(m, n) for count, m, n in shapes) / devices
  if whole or plain.flops <= _EVEN_ENOUGH * even:
    return plain.batches
  elements = sum(math.prod(shape) for shape in shapes)
  spare = max(8 - 2 * itemsize, 0) * elements / devices / steps
  cost = lambda option: (
    option.flops + _FLOPS_PER_BYTE * max(option.moved - spare, 0.0)
  )
  return min([plain, *_with_strips(shapes, devices)], key=cost).batches


def _with_strips(shapes, devices) -> list[_Cost]:
  """Ways to divide what a multiple of the devices leaves over."""
  even, rest = [], []
  for i, (count, m, n) in enumerate(shapes):
    stop = count - count % devices
    if stop:
      flops = stop // devices * _flops(m, n)
      even.append(_Cost(flops, 0.0, [(Span(i, 0, stop, 1),)]))
    if stop < count:
      rest.append((i, stop, count, n))
  m = shapes[0][1]
  ways = _together(rest, m, devices)
  # Weighed as if all bytes counted, and as if none did.
  for weight in (0.0, _FLOPS_PER_BYTE):
    cost = lambda x, weight=weight: x.flops + weight * x.moved
    ways.append(_sum(min(_together([x], m, devices), key=cost) for x in rest))
  return [_sum([*even, way]) for way in ways]


def _sum(costs) -> _Cost:
  flops, moved, batches = zip(*costs, strict=True)
  return _Cost(sum(flops), sum(moved), [b for some in batches for b in some])


def _flops(m: int, n: int) -> float:
  """Of one step for one strip; the products [m, m] are done by each."""
  return 4.0 * m * m * n + 2.0 * m**3


def _together(rest, m, devices) -> list[_Cost]:
  """Ways to give each device at most one strip."""
  widths = {
    -(-n // 2**k) for *_, n in rest for k in range(devices.bit_length())
  }
  out = []
  for width in sorted(widths):
    batch = tuple(
      Span(i, start, stop, 2 ** (-(-n // width) - 1).bit_length())
      for i, start, stop, n in rest
    )
    most = max(span.strips for span in batch)
    if sum((x.stop - x.start) * x.strips for x in batch) <= devices:
      # Who shares a matrix exchanges sums in float32, once per doubling.
      moved = 4.0 * m * m * (most.bit_length() - 1)
      out.append(_Cost(_flops(m, width), moved, [batch]))
  return out
