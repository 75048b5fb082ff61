"""Which matrices go through Newton-Schulz at once, and which are cut.

Matrices are shared out whole, so that no product is done twice. Where there
are fewer of them than devices, that leaves devices idle, and the largest one
sets the time. Then matrices of several shapes that share their short side m go
at once, one to a device, and the longest are cut along their long side into
strips for 2, 4, ... devices. These add up Gram matrices [m, m] (`strips`),
which may move more than the two exchanges of `placement` do, so that it is
done only where it spares enough products. What is left over when a number of
matrices is divided by that of the devices goes the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from optim.orthogonal import strips

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
  """Of the busiest device: FLOPs, numbers received."""

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
  predict: bool = True,
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
    predict: whether strips may predict Gram matrices (`strips.iterate`).

  Returns:
    Batches that hold every matrix once.
  """
  plain = _sum(
    _whole(i, 0, count, -(-count // devices), m, n, steps)
    for i, (count, m, n) in enumerate(shapes)
  )
  even = sum(count * _flops(m, n, steps) for count, m, n in shapes) / devices
  if whole or plain.flops <= _EVEN_ENOUGH * even:
    return plain.batches
  momentum = 2 * 4 * sum(math.prod(shape) for shape in shapes) / devices
  cost = lambda option: (
    option.flops
    + _FLOPS_PER_BYTE * max(itemsize * option.moved - momentum, 0.0)
  )
  together = functools.partial(
    _together, m=shapes[0][1], devices=devices, steps=steps, predict=predict
  )
  ways = _with_strips(shapes, devices, steps, together)
  return min([plain, *ways], key=cost).batches


def _with_strips(shapes, devices, steps, together) -> list[_Cost]:
  """Ways to divide what a multiple of the devices leaves over."""
  even, rest = [], []
  for i, (count, m, n) in enumerate(shapes):
    stop = count - count % devices
    if stop:
      even.append(_whole(i, 0, stop, stop // devices, m, n, steps))
    if stop < count:
      rest.append((i, stop, count, n))
  ways = together(rest)
  # Weighed as if all numbers counted, and as if none did.
  for weight in (0.0, 2 * _FLOPS_PER_BYTE):
    cost = lambda x, weight=weight: x.flops + weight * x.moved
    ways.append(_sum(min(together([x]), key=cost) for x in rest))
  return [_sum([*even, way]) for way in ways]


def _whole(group, start, stop, share, m, n, steps) -> _Cost:
  """`share` matrices for each device, from two exchanges."""
  batch = (Span(group, start, stop, 1),)
  return _Cost(share * _flops(m, n, steps), 2.0 * share * m * n, [batch])


def _sum(costs) -> _Cost:
  flops, moved, batches = zip(*costs, strict=True)
  return _Cost(sum(flops), sum(moved), [b for some in batches for b in some])


def _flops(m: int, n: int, steps: int) -> float:
  """Of a whole matrix."""
  return steps * (4.0 * m * m * n + 2.0 * m**3)


def _together(rest, *, m, devices, steps, predict) -> list[_Cost]:
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
    if sum((x.stop - x.start) * x.strips for x in batch) > devices:
      continue
    moved = 2.0 * m * width
    if most == 1:
      out.append(_Cost(_flops(m, width, steps), moved, [batch]))
    else:
      # Who shares a matrix exchanges sums once per doubling.
      sums = strips.exchanges(steps, predict) * (most.bit_length() - 1)
      moved += sums * strips.entries(m)
      flops = strips.flops(m, width, steps, predict)
      out.append(_Cost(flops, moved, [batch]))
  return out
