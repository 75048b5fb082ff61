"""How the GPU kernels of linear attention cut a problem into programs.

A program walks one head's states through the chunks, for some columns of V,
with the states in registers and the operands of two chunks in shared memory.
What limits it is registers, 255 per thread for states, products and addresses,
and the 227 KiB of shared memory. The sizes here were chosen so that, compiled
for Hopper, no register spills to memory and, for K up to 128 without an erase
key, two programs share one multiprocessor: one computes while the other waits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import padding
from kernels_pallas.linear import layout, problem

# Tokens of a chunk, at most: what the matrix units of Hopper take at a time.
# Chunks change rounding and speed, not meaning.
_MAX_CHUNK = 64
# Triton multiplies no matrices with a side below this.
_MIN_SIDE = 16
_MAX_KEY_SIZE = 256
# Columns of V, at most. More would read operands less often, but leave no
# room for a second program.
_MAX_WIDTH = 32
# Numbers of the states that a program holds.
_MAX_STATE = 8192


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static part of a call.

  Attributes:
    chunk: C.
    key_size: K, padded.
    value_size: V, padded.
    width: columns of V of a program.
    delta: whether values are corrected by what the state predicts.
    scale: of q.
    wide: whether q, k and v are float32 (or float64, interpreted).
    operand: dtype of the operands of the kernels' products.
    parts: how many of them a float32 is.
    warps: of 32 threads, that share a program's states.
    interpret: whether the kernels are interpreted.
  """

  chunk: int
  key_size: int
  value_size: int
  width: int
  delta: bool
  scale: float
  wide: bool
  operand: jax.typing.DTypeLike
  parts: int
  warps: int
  interpret: bool

  @property
  def precision(self) -> jax.lax.PrecisionLike:
    """Of products in XLA: 16-bit operands need no more digits than tf32."""
    return "highest" if self.wide else "default"


def make(inputs: problem.Inputs, options: problem.Options) -> Plan:
  """The plan of a problem.

  Args:
    inputs: the arrays; only shapes and dtypes are used.
    options: the static part; chunks that are too long are cut.

  Returns:
    The `Plan`.

  Raises:
    NotImplementedError: for K above 256, and for float64 that is not
      interpreted.
  """
  key_size = inputs.q.shape[-1]
  if key_size > _MAX_KEY_SIZE:
    raise NotImplementedError(
      f"q and k must have K of at most {_MAX_KEY_SIZE} for the GPU kernels, "
      f"got K = {key_size}"
    )
  if inputs.state[0].dtype == jnp.float64 and not options.interpret:
    raise NotImplementedError(
      "arrays must be float32 or bfloat16 for the GPU kernels (float64 only "
      f"with interpret), got v in {inputs.v.dtype} and a state in "
      f"{inputs.state[0].dtype}"
    )
  key_size = max(_MIN_SIDE, pl.next_power_of_2(key_size))
  value_size = inputs.v.shape[-1]
  width = min(
    _MAX_WIDTH,
    _MAX_STATE // (key_size * len(inputs.state)),
    max(_MIN_SIDE, pl.next_power_of_2(value_size)),
  )
  single = inputs.v.dtype == jnp.float32
  longest = _MAX_CHUNK
  erases = inputs.p is not None or inputs.log_decay.ndim == 4
  if key_size == _MAX_KEY_SIZE and options.delta and erases and not single:
    # Two chunks of q, k and p at a time would not fit into shared memory.
    longest //= 2
  size = min(options.chunk_size, longest)
  return Plan(
    chunk=size,
    key_size=key_size,
    value_size=-(-value_size // width) * width,
    width=width,
    delta=options.delta,
    scale=options.scale,
    wide=inputs.v.dtype.itemsize > 2,
    operand=jnp.bfloat16 if single else inputs.v.dtype,
    parts=3 if single else 1,
    # Parts, and operands of the smaller matrix instructions, take registers
    # from the states.
    warps=4 if size == _MAX_CHUNK and not single else 8,
    interpret=options.interpret,
  )


def pad(inputs: problem.Inputs, plan: Plan) -> problem.Inputs:
  """Pads T, K and V with exact zeros."""
  inputs = layout.pad(inputs, plan.chunk)

  def widen(x, *sizes):
    return None if x is None else padding.last_axes(x, *sizes)

  log_decay = inputs.log_decay
  if log_decay.ndim == 4:
    log_decay = widen(log_decay, plan.key_size)
  return inputs._replace(
    q=widen(inputs.q, plan.key_size),
    k=widen(inputs.k, plan.key_size),
    p=widen(inputs.p, plan.key_size),
    v=widen(inputs.v, plan.value_size),
    log_decay=log_decay,
    state=tuple(widen(x, plan.key_size, plan.value_size) for x in inputs.state),
  )
