"""The Pallas kernels of the GPU path: the walks of a state and its cotangent.

A program keeps the states of one head, for some columns of V, in registers and
reads the operands of one chunk after another. Columns of V do not meet each
other in the walk, so heads and columns make the grid.

The kernels are lowered by Triton. Pallas has deprecated that lowering since
JAX 0.11 in favour of Mosaic GPU, whose interpreter does not exist before JAX
0.12 and has no tensor cores: Triton's is the one whose very bodies can be
checked without a GPU on every version that is supported. Only this module
knows which it is. On Hopper the products become wgmma.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas import pieces, products, rules
from kernels_pallas.linear import chunk
from kernels_pallas.linear.gpu_plan import Plan

Columns = chunk.Columns


class Walk(NamedTuple):
  """What a walk reads, forward and backward; padded.

  Operands of products are sums of P parts, see `split`.

  Attributes:
    q: `[P, B, T, G, K]`; `[P, B, T, H, K]` for decay per channel, which it
      carries, and so k and p.
    k: likewise.
    p: likewise, or None where it is k.
    at: `[P, N, B, G, R, C, C]`.
    inverse: `[P, N, B, G, R, C, C]`, or None without the delta rule.
    rows: `[N, B, G, R, 2 M or 3 M, C]`, the row scales of q, k and p.
    decay: `[N, B, G, R, 1 or 3]`, the entries of D that are not zero, by
      rows; `[N, B, G, R, 1, K]` for decay per channel.
  """

  q: jax.Array
  k: jax.Array
  p: jax.Array | None
  at: jax.Array
  inverse: jax.Array | None
  rows: jax.Array
  decay: jax.Array


def forward(
  walk: Walk, v: jax.Array, state: Columns, plan: Plan, *, keep: bool
) -> tuple[jax.Array, Columns, Columns]:
  """Takes states through all chunks, see `chunk.step`.

  Args:
    walk: the chunks.
    v: `[B, T, H, V]`.
    state: M arrays `[B, H, K, V]`.
    plan: the plan.
    keep: whether the states that enter the chunks are wanted.

  Returns:
    o `[B, T, H, V]`, the final states, and M arrays `[N, B, H, K, V]` of v's
    dtype, or none.
  """
  many = len(state)
  outputs = "values", ("state",) * many, ("states",) * many if keep else ()
  name = "linear_attention_forward"
  return _call(_forward_kernel, walk, v, state, outputs, plan, name)


def backward(
  walk: Walk, do: jax.Array, dstate: Columns, plan: Plan
) -> tuple[Columns, Columns]:
  """Takes states' cotangents back through all chunks, see `chunk.step_vjp`.

  Args:
    walk: the chunks.
    do: `[B, T, H, V]`.
    dstate: M arrays `[B, H, K, V]`, of the final states.
    plan: the plan.

  Returns:
    The cotangents of the first states, and those of the states that leave the
    chunks, M arrays `[N, B, H, K, V]` of do's dtype.
  """
  many = len(dstate)
  outputs = ("state",) * many, ("states",) * many
  name = "linear_attention_backward"
  return _call(_backward_kernel, walk, do, dstate, outputs, plan, name)


def _specs(walk: Walk, plan: Plan) -> Walk:
  """The blocks of a program: all tokens of one head."""
  groups, repeat = walk.rows.shape[2:4]
  parts = walk.q.shape[:1]
  heads = groups * repeat

  def keys(x):
    share = heads // x.shape[3]
    return pl.BlockSpec(
      (*parts, None, x.shape[2], None, plan.key_size),
      lambda i, j: (0, i // heads, 0, i % heads // share, 0),
    )

  def chunks(x, front=()):
    count, *kept = x.shape[len(front)], *x.shape[len(front) + 4 :]
    return pl.BlockSpec(
      (*front, count, None, None, None, *kept),
      lambda i, j: (
        *(0 for _ in front),
        0,
        i // heads,
        i % heads // repeat,
        i % repeat,
        *(0 for _ in kept),
      ),
    )

  some = lambda x, make, *args: None if x is None else make(x, *args)
  return Walk(
    q=keys(walk.q),
    k=keys(walk.k),
    p=some(walk.p, keys),
    at=chunks(walk.at, parts),
    inverse=some(walk.inverse, chunks, parts),
    rows=chunks(walk.rows),
    decay=chunks(walk.decay),
  )


def _call(kernel, walk: Walk, values, states, outputs, plan: Plan, name: str):
  """Calls a kernel on `walk`, `values` and `states`.

  Args:
    kernel: takes the refs, then those of outputs.
    walk: what it reads.
    values: `[B, T, H, V]`.
    states: M arrays `[B, H, K, V]`.
    outputs: a pytree of "values", "state" and "states", one a chunk.
    plan: the plan.
    name: of the kernel.

  Returns:
    The outputs.
  """
  b, t, heads, _ = values.shape
  count = t // plan.chunk
  tile = (plan.key_size, plan.width)
  blocks = {
    "values": pl.BlockSpec(
      (None, t, None, plan.width), lambda i, j: (i // heads, 0, i % heads, j)
    ),
    "state": pl.BlockSpec(
      (None, None, *tile), lambda i, j: (i // heads, i % heads, 0, j)
    ),
    "states": pl.BlockSpec(
      (count, None, None, *tile), lambda i, j: (0, i // heads, i % heads, 0, j)
    ),
  }
  state = states[0]
  shapes = {
    "values": rules.out_shape(values.shape, values.dtype),
    "state": rules.out_shape(state.shape, state.dtype),
    # As the products that read them again have their other operands.
    "states": rules.out_shape((count, *state.shape), values.dtype),
  }
  read = lambda table: jax.tree.map(table.get, outputs)
  # JAX says so at each lowering; it is this module's business, see above.
  warnings.filterwarnings(
    "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
  )
  call = pl.pallas_call(
    functools.partial(kernel, plan=plan),
    grid=(b * heads, plan.value_size // plan.width),
    in_specs=(
      _specs(walk, plan),
      blocks["values"],
      (blocks["state"],) * len(states),
    ),
    out_specs=read(blocks),
    out_shape=read(shapes),
    compiler_params=pltriton.CompilerParams(num_warps=plan.warps, num_stages=2),
    interpret=plan.interpret,
    name=name,
  )
  return rules.kernel(call, walk, values, states, name="pallas_gpu")


class _Chunk:
  """One chunk of a `Walk`, read from memory where it is used.

  What is read earlier waits in registers, of which the states leave few; so
  do the products of the kernels come in the order that keeps fewest alive.
  """

  def __init__(self, blocks: Walk, n: jax.Array, states: int, plan: Plan):
    self._blocks, self._n, self._states = blocks, n, states
    self._parts, self._rows = plan.parts, plan.chunk
    self.tokens = pl.ds(n * plan.chunk, plan.chunk)
    self._read = {}

  def scale(self, of: str, m: int) -> jax.Array:
    """`[C, 1]`, what scales rows of q, k or p for state `m`."""
    row = "qkp".index(of) * self._states + m
    return self._blocks.rows[self._n, row][:, None]

  def decay(self, m: int, n: int) -> jax.Array:
    """D_mn, for m <= n: a scalar, or `[K, 1]`."""
    x = self._blocks.decay[self._n, m + n]
    return x[:, None] if x.ndim else x

  def dot(self, name: str, b: jax.Array, *, ta: bool = False) -> jax.Array:
    """A product of a field of the `Walk`, summed in float32 (or float64)."""
    if self._parts == 1:
      if name not in self._read:
        self._read[name] = self._part(name, 0)
      a = self._read[name]
      return products.dot(a, b.astype(a.dtype), ta=ta)

    def passes(j, carry):
      total, rest = carry
      head = pieces.head(rest)
      add = lambda i, total: (
        total
        + products.dot(self._part(name, i), head.astype(jnp.bfloat16), ta=ta)
      )
      total = jax.lax.fori_loop(0, self._parts - j, add, total)
      return total, rest - head

    # Loops and not their bodies many times, whose addresses fill registers.
    rows = getattr(self._blocks, name).shape[-1] if ta else self._rows
    total = jnp.zeros((rows, b.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, self._parts, passes, (total, b))[0]

  def _part(self, name: str, i: int | jax.Array) -> jax.Array:
    """q, k and p are `[C, K]`, at and inverse `[C, C]`."""
    ref = getattr(self._blocks, name)
    return ref[i, self.tokens if name in "qkp" else self._n]


def _forward_kernel(blocks: Walk, v, start, o, final, entered, *, plan: Plan):
  """`chunk.step` of one chunk after another."""

  def step(n, state):
    piece = _Chunk(blocks, n, len(state), plan)
    dot = piece.dot
    p = "k" if blocks.p is None else "p"
    e, out = v[piece.tokens].astype(state[0].dtype), 0.0
    for m, x in enumerate(state):
      if plan.delta:
        e = e - piece.scale("p", m) * dot(p, x)
      out = out + piece.scale("q", m) * dot("q", x)
      if entered:
        entered[m][n] = x.astype(entered[m].dtype)
    if plan.delta:
      e = dot("inverse", e)
    out = out + dot("at", e)
    o[piece.tokens] = out.astype(o.dtype)
    after = []
    for m in range(len(state)):
      new = piece.decay(m, m) * state[m]
      for n_ in range(m + 1, len(state)):
        new = new + piece.decay(m, n_) * state[n_]
      after.append(new + dot("k", piece.scale("k", m) * e, ta=True))
    return tuple(after)

  state = tuple(ref[...] for ref in start)
  state = jax.lax.fori_loop(0, blocks.rows.shape[0], step, state)
  for ref, x in zip(final, state, strict=True):
    ref[...] = x


def _backward_kernel(
  blocks: Walk, do_ref, dfinal, dstart, leaving, *, plan: Plan
):
  """The part of `chunk.step_vjp` that is serial: the states' cotangents."""
  count = blocks.rows.shape[0]

  def step(i, dstate):
    n = count - 1 - i
    piece = _Chunk(blocks, n, len(dstate), plan)
    dot = piece.dot
    p = "k" if blocks.p is None else "p"
    do = do_ref[piece.tokens]
    if plan.delta:
      z = dot("at", do, ta=True)
    for m, dx in enumerate(dstate):
      if plan.delta:
        z = z + piece.scale("k", m) * dot("k", dx)
      leaving[m][n] = dx.astype(leaving[m].dtype)
    if plan.delta:
      z = dot("inverse", z, ta=True)
    before = list(dstate)
    # From the last on: the first needs no cotangent but its own.
    for m in reversed(range(len(dstate))):
      new = piece.decay(m, m) * dstate[m]
      for n_ in range(m):
        new = new + piece.decay(n_, m) * dstate[n_]
      new = new + dot("q", piece.scale("q", m) * do, ta=True)
      if plan.delta:
        new = new + dot(p, -piece.scale("p", m) * z, ta=True)
      before[m] = new
    return tuple(before)

  dstate = tuple(ref[...] for ref in dfinal)
  dstate = jax.lax.fori_loop(0, count, step, dstate)
  for ref, dx in zip(dstart, dstate, strict=True):
    ref[...] = dx
