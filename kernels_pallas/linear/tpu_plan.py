"""How a problem is cut into the grid steps of the TPU kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import tpu_core
from kernels_pallas.linear import problem

# More heads than this fill no further gaps and only lengthen the kernel.
_MAX_HEADS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static part of a call.

  Attributes:
    batch: B.
    chunks: N, after padding T.
    chunk: C.
    groups: G.
    heads: value heads of a grid step.
    keys: key heads of a grid step.
    blocks: grid steps that cover all heads.
    splits: grid steps that cover V.
    key_size: K, padded.
    value_size: V, padded.
    states: M.
    channels: whether the decay is per channel.
    delta: whether values are corrected by what the state predicts.
    erase: whether there are erase keys of their own.
    scale: of q.
    narrow: dtype of q, k, p and v.
    wide: dtype of gates and states.
    interpret: whether and how the kernels are interpreted.
  """

  batch: int
  chunks: int
  chunk: int
  groups: int
  heads: int
  keys: int
  blocks: int
  splits: int
  key_size: int
  value_size: int
  states: int
  channels: bool
  delta: bool
  erase: bool
  scale: float
  narrow: np.dtype
  wide: np.dtype
  interpret: bool | Any

  @property
  def value_width(self) -> int:
    """Columns of V of a grid step."""
    return self.value_size // self.splits

  @property
  def parts(self) -> int:
    """Grid steps that read one key head."""
    return self.blocks * self.keys // self.groups

  @property
  def precision(self) -> str:
    """Of the products of q, k, p, v, errors and states.

    bfloat16 operands are multiplied as they are; three passes more would
    restore digits that they do not have.
    """
    return "default" if self.narrow == jnp.bfloat16 else "highest"

  def key_block(self, h: jax.Array) -> jax.Array:
    """The block of key heads that block `h` of value heads reads."""
    # lax.div: the floor of `//` asks a Mosaic compilation for its chip.
    return jax.lax.div(h, h.dtype.type(self.parts))


def make(inputs: problem.Inputs, options: problem.Options) -> Plan:
  """Chooses a plan.

  Args:
    inputs: not yet padded.
    options: the static part of the problem.

  Returns:
    The plan with the fewest splits of V, and then the most heads in a step.

  Raises:
    NotImplementedError: where no plan fits.
  """
  b, t, groups, key_size = inputs.q.shape
  h, value_size = inputs.v.shape[2:]
  wide = inputs.state[0].dtype
  if wide == jnp.float64 and not options.interpret:
    raise NotImplementedError(
      "arrays must be float32 or bfloat16 for the TPU kernels (float64 only "
      f"with interpret), got a state in {wide}"
    )
  base = Plan(
    batch=b,
    chunks=-(-t // options.chunk_size),
    chunk=options.chunk_size,
    groups=groups,
    heads=1,
    keys=1,
    blocks=h,
    splits=1,
    key_size=key_size,
    value_size=value_size,
    states=len(inputs.state),
    channels=inputs.log_decay.ndim == 4,
    delta=options.delta,
    erase=inputs.p is not None,
    scale=options.scale,
    narrow=inputs.v.dtype,
    wide=wide,
    interpret=options.interpret,
  )
  # Half a tile of lanes is legal where heads come in pairs and K and V are
  # small, which halves what is padded.
  for lanes in (tpu_core.LANES // 2, tpu_core.LANES):
    up = lambda n, lanes=lanes: -(-n // lanes) * lanes
    padded = dataclasses.replace(
      base, key_size=up(key_size), value_size=up(value_size)
    )
    for plan in _plans(padded, h):
      if _legal(plan, h) and vmem_bytes(plan) <= tpu_core.VMEM_BUDGET:
        return plan
  raise NotImplementedError(
    f"states of K = {key_size} by V = {value_size} with chunks of "
    f"{options.chunk_size} tokens do not fit VMEM"
  )


def _plans(base: Plan, h: int):
  """All plans, the preferred first."""
  repeat = h // base.groups
  for splits in range(1, base.value_size // tpu_core.LANES + 1):
    if base.value_size % (splits * tpu_core.LANES) and splits > 1:
      continue
    most = _MAX_HEADS if splits == 1 else 1
    for heads in range(min(most, h), 0, -1):
      if h % heads or (heads % repeat and repeat % heads):
        continue
      yield dataclasses.replace(
        base,
        heads=heads,
        keys=max(1, heads // repeat),
        blocks=h // heads,
        splits=splits,
      )


def _legal(plan: Plan, h: int) -> bool:
  """Whether every block's lanes are whole tiles or the whole array."""
  whole = plan.heads == h
  return (
    (
      plan.keys * plan.key_size % tpu_core.LANES == 0
      or plan.keys == plan.groups
    )
    and (plan.heads * plan.value_width % tpu_core.LANES == 0 or whole)
    and (
      not plan.channels
      or plan.heads * plan.key_size % tpu_core.LANES == 0
      or whole
    )
  )


def vmem_bytes(plan: Plan) -> int:
  """Roughly what the backward kernel, the larger, keeps in VMEM.

  Blocks are exact, and double buffered. What a head has in flight is fitted,
  from above, to what the compiler used: it depends on the order in which the
  compiler puts the heads' operations.

  Args:
    plan: the plan.

  Returns:
    Bytes.
  """
  narrow = plan.narrow.itemsize
  size, width = plan.chunk, plan.value_width
  keys = size * plan.keys * plan.key_size
  values = size * plan.heads * width
  states = plan.states * plan.heads * plan.key_size * width
  count = 3 if plan.erase else 2
  # q, k, p and their cotangents; v, do and dv; entering states and both
  # cotangents; gates, a tile of rows, and their cotangents.
  blocks = keys * count * (narrow + 4) + values * 3 * narrow + states * 3 * 4
  if plan.channels:
    blocks += size * plan.heads * plan.key_size * 2 * 4
  square = size * max(size, tpu_core.LANES)
  blocks += 2 * 16 * max(size, tpu_core.LANES) * 4
  flight = 12 * plan.states * square + 8 * size * (plan.key_size + width)
  flight += 2 * plan.states * plan.key_size * width
  # Float32 is multiplied in pieces, which are kept too.
  flight *= 1 if narrow == 2 else 2
  if plan.channels:
    # The levels of `vector`, whose factors the backward pass keeps.
    levels = size.bit_length() - 1
    flight += levels * (26 * size * plan.key_size + 12 * square)
  return 2 * blocks + 4 * states + 4 * plan.heads * flight
