"""Orthogonal polar factors by odd matrix polynomials, batched.

A step maps X to a X + b (X Xᵀ) X + c (X Xᵀ)² X, that is each singular value
σ to p(σ) = a σ + b σ³ + c σ⁵; a schedule of such steps takes all of (0, 1]
near 1 while the singular vectors stay. Only the schedules differ.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlib_ext import meshes
from optim import numerics
from optim.orthogonal import division, gram, placement, schedules, strips

Coefficients = schedules.Coefficients

FORMS = ("direct", "gram")

# The schedules whose range has been found to survive Gram matrices that are
# not computed from x at every step.
_PROVEN_NAMES = ("keller", "polar_express", "dion")
_PROVEN_STEPS = 8

# With fewer, errors of a prediction are not brought back to 1.
_STEPS_TO_PREDICT = 5

# Elements of a stack that go through the polynomial at once: enough to keep
# an accelerator busy with small matrices, and a bound on live temporaries.
_CHUNK_ELEMENTS = 2**22


def _normalize(x: jax.Array, divisor: float, dtype: Any) -> jax.Array:
  """x / (divisor ‖x‖_F) per matrix, in `dtype`; zero where x is."""
  wide = jnp.promote_types(x.dtype, jnp.promote_types(dtype, jnp.float32))
  x = x.astype(wide)
  tiny = jnp.finfo(wide).tiny
  x, _ = numerics.in_range(x, (-2, -1))
  norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
  return (x / jnp.maximum(divisor * norm, tiny)).astype(dtype)


class _Products(NamedTuple):
  """How a polynomial is computed.

  Attributes:
    precision: of the direct form, as in `jax.lax.dot_general`.
    segments: of the Gram form, as for `gram.iterate`; None for the direct.
    predict: as for `strips.iterate`.
  """

  precision: Any
  segments: tuple[int, ...] | None
  predict: bool


def _products(
  shape: tuple[int, int],
  table: Any,
  coefficients: Coefficients,
  dtype: Any,
  precision: Any,
  form: str | None,
) -> _Products:
  """Chooses the form for matrices [m, n], m <= n, where none is given."""
  steps = table.shape[0]
  proven = isinstance(coefficients, str) and coefficients in _PROVEN_NAMES
  proven = proven and steps <= _PROVEN_STEPS
  if form is None:
    better = proven and gram.pays(*shape, steps, dtype, precision)
    form = "gram" if better else "direct"
  segments = gram.segments(steps, dtype) if form == "gram" else None
  return _Products(precision, segments, proven and steps >= _STEPS_TO_PREDICT)


def _iterate(
  x: jax.Array,
  table: jax.Array,
  products: _Products,
) -> jax.Array:
  """Applies the polynomials to x [..., m, n], m <= n, in x's dtype.

  Products accumulate in the table's dtype, and so do the sums of products.
  """
  if products.segments is not None:
    return gram.iterate(x, table, products.segments)
  batch = tuple(range(x.ndim - 2))

  def dot(p, q, contract):
    dims = (((p.ndim - 1,), (contract,)), (batch, batch))
    return jax.lax.dot_general(
      p,
      q,
      dims,
      precision=products.precision,
      preferred_element_type=table.dtype,
    )

  def step(x, abc):
    a, b, c = abc
    gram = dot(x, x, x.ndim - 1)
    low = gram.astype(x.dtype)
    factor = b * gram + c * dot(low, low, x.ndim - 2)
    y = a * x.astype(table.dtype) + dot(factor.astype(x.dtype), x, x.ndim - 2)
    return y.astype(x.dtype), None

  return jax.lax.scan(step, x, table)[0]


def _iterate_chunks(
  stack: jax.Array,
  table: jax.Array,
  *,
  products: _Products,
) -> jax.Array:
  """`_iterate` for [b, m, n], in chunks that bound the temporaries."""
  count, m, n = stack.shape
  chunk = max(1, _CHUNK_ELEMENTS // (m * n))
  if count <= chunk:
    return _iterate(stack, table, products)
  one = functools.partial(_iterate, table=table, products=products)
  return jax.lax.map(one, stack, batch_size=chunk)


class _Stack(NamedTuple):
  """Matrices of one shape: arrays [b_i, m, n], and what to do with them."""

  parts: list[jax.Array]
  partitions: list[placement.Partition]
  table: jax.Array
  products: _Products


def _iterate_stacks(
  stacks: Sequence[_Stack], mesh: jax.sharding.AbstractMesh, width: int
) -> list[list[jax.Array]]:
  """`_iterate` of each stack's parts as one, over the mesh."""
  together: dict[Any, list[int]] = {}
  for i, stack in enumerate(stacks):
    first = stack.parts[0]
    key = (first.shape[1], first.dtype, stack.products)
    together.setdefault(key, []).append(i)
  pieces: list[Any] = [[[] for _ in stack.parts] for stack in stacks]
  for (m, dtype, products), members in together.items():
    shapes = [
      (sum(x.shape[0] for x in parts), m, parts[0].shape[2])
      for parts in (stacks[i].parts for i in members)
    ]
    table = stacks[members[0]].table
    for batch in division.plan(
      shapes,
      mesh.size,
      steps=table.shape[0],
      itemsize=dtype.itemsize,
      whole=products.segments is not None,
      predict=products.predict,
    ):
      taken = [
        placement.take(stacks[members[x.group]].parts, x.start, x.stop)
        for x in batch
      ]
      fn, how = _iterate_chunks, {"products": products}
      if any(x.strips > 1 for x in batch):
        fn = strips.iterate
        how = {"precision": products.precision, "predict": products.predict}
      results = placement.spread(
        fn,
        [arrays for _, arrays in taken],
        [x.strips for x in batch],
        mesh,
        table,
        partitions=[
          [stacks[members[x.group]].partitions[i] for i in which]
          for x, (which, _) in zip(batch, taken, strict=True)
        ],
        width=width,
        **how,
      )
      for x, (which, _), ys in zip(batch, taken, results, strict=True):
        for i, y in zip(which, ys, strict=True):
          pieces[members[x.group]][i].append(y)
  return [
    [jnp.concatenate(ys) if len(ys) > 1 else ys[0] for ys in stack]
    for stack in pieces
  ]


def _iterate_here(stack: _Stack) -> list[jax.Array]:
  parts, _, table, products = stack
  if len(parts) == 1:
    return [_iterate_chunks(parts[0], table, products=products)]
  ys = _iterate_chunks(jnp.concatenate(parts), table, products=products)
  return jnp.split(ys, np.cumsum([part.shape[0] for part in parts])[:-1])


def _swap(x: jax.Array, swapped: bool) -> jax.Array:
  return jnp.swapaxes(x, -1, -2) if swapped else x


def _turn(
  partition: tuple[Any, ...] | None, swapped: bool
) -> placement.Partition:
  if partition is None:
    return None
  rows, columns = partition[-2:]
  return (columns, rows) if swapped else (rows, columns)


def newton_schulz_list(
  xs: Sequence[jax.Array],
  *,
  coefficients: Coefficients = "polar_express",
  steps: int | None = None,
  dtype: Any = jnp.bfloat16,
  precision: Any = None,
  form: str | None = None,
  back: Sequence[bool] | None = None,
  partitions: Sequence[placement.Partition] | None = None,
) -> list[jax.Array]:
  """`newton_schulz` of several arrays at once.

  Matrices of one shape, up to transposition, go through the polynomials as
  one stack, in chunks that bound the temporaries.

  Args:
    xs: real floating arrays [..., m, n], each of its own shape and dtype.
    coefficients: as for `newton_schulz`.
    steps: as for `newton_schulz`.
    dtype: as for `newton_schulz`.
    precision: as for `newton_schulz`.
    form: as for `newton_schulz`.
    back: for each array, whether its rows are divided over a mesh as other
      arrays' columns are, if it is square (`labels.leads_back`); None is none.
      A wrong guess costs an exchange.
    partitions: for each array, the mesh axes that divide its dimensions, at
      least the last two, or None where that is not known; in place of what
      the arrays' types say.

  Returns:
    One array per input and of its shape, in the dtype of the computation.

  Raises:
    ValueError: as for `newton_schulz`.
  """
  dtype = jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be a floating type, got {dtype}")
  if form not in (None, *FORMS):
    raise ValueError(f"form must be None or one of {FORMS}, got {form!r}")
  for x in xs:
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        "x must be a real floating array of two or more dimensions, got "
        f"{x.dtype}{list(x.shape)}"
      )
  run = functools.partial(
    _in_stacks,
    coefficients=coefficients,
    steps=steps,
    dtype=dtype,
    precision=precision,
    form=form,
    back=back,
    partitions=partitions or meshes.partitions(xs),
  )
  kept = [PartitionSpec(*meshes.spec(x)) for x in xs]
  return meshes.run_automatic(run, list(xs), out_specs=kept)


def _in_stacks(
  xs, *, coefficients, steps, dtype, precision, form, back, partitions
) -> list[jax.Array]:
  """`newton_schulz_list` of checked arguments, over automatic axes."""
  exact = isinstance(coefficients, str) and coefficients == "exact"
  if exact:
    precision = jax.lax.Precision.HIGHEST
  groups: dict[Any, list[int]] = {}
  out: list[Any] = [None] * len(xs)
  for i, x in enumerate(xs):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    compute = jnp.promote_types(wide, dtype) if exact else dtype
    if 0 in x.shape:
      out[i] = x.astype(compute)
    else:
      groups.setdefault((*sorted(x.shape[-2:]), compute), []).append(i)

  mesh = placement.mesh_of(xs)
  back = [False] * len(xs) if back is None or mesh is None else back
  swapped = [
    x.shape[-2] > x.shape[-1] or (flag and x.shape[-2] == x.shape[-1])
    for x, flag in zip(xs, back, strict=True)
  ]
  stacks, sources = [], []
  for (m, n, compute), members in groups.items():
    accumulator = jnp.promote_types(compute, jnp.float32)
    table, divisor = schedules.resolve(coefficients, steps, accumulator)
    parts = [
      _swap(_normalize(xs[i], divisor, compute), swapped[i]) for i in members
    ]
    stacks.append(
      _Stack(
        [part.reshape(-1, m, n) for part in parts],
        [_turn(partitions[i], swapped[i]) for i in members],
        jnp.asarray(table, accumulator),
        _products((m, n), table, coefficients, compute, precision, form),
      )
    )
    sources.append((members, parts))
  if mesh is None:
    results = [_iterate_here(stack) for stack in stacks]
  else:
    width = placement.common_side([x.shape for x in xs])
    results = _iterate_stacks(stacks, mesh, width)
  for (members, parts), ys in zip(sources, results, strict=True):
    for i, part, y in zip(members, parts, ys, strict=True):
      out[i] = _swap(y.reshape(part.shape), swapped[i])
  return out


def newton_schulz(
  x: jax.Array,
  *,
  coefficients: Coefficients = "polar_express",
  steps: int | None = None,
  dtype: Any = jnp.bfloat16,
  precision: Any = None,
  form: str | None = None,
) -> jax.Array:
  """Orthogonal polar factor U Vᵀ of x = U Σ Vᵀ, nearly.

  Each matrix is divided by its Frobenius norm (for "polar_express" and
  "exact" by 1.02 times that, the margin their schedules are built for) and
  goes through the polynomials of the schedule. Singular values from 0.01 of
  the norm on end up in [0.68, 1.13] ("keller"), [0.86, 1.14]
  ("polar_express") or [0.98, 1.03] ("dion"), apart from the rounding of
  `dtype`. A matrix of zeros gives zeros; the scale of x does not matter.

  Args:
    x: real floating array [..., m, n]; leading dimensions are a batch.
    coefficients: "keller" (Muon's triplet, five times), "polar_express" (the
      minimax schedule of arXiv 2505.16932 for the given number of steps),
      "dion" (five tuned triplets, the last one repeated for more steps),
      "exact" (to rounding, in at least float32 at the highest precision,
      whatever `dtype` and `precision`, for singular values from the rounding
      error of the norm on), or an array [steps, 3] of a, b, c, applied to
      x / ‖x‖_F.
    steps: the number of polynomials; None is 5 for a named schedule.
    dtype: floating type that matrices are multiplied in. The norm, the
      coefficients and all sums are in at least float32.
    precision: as in `jax.lax.dot_general`.
    form: "direct" multiplies x at every step; "gram" multiplies Gram matrices
      of the short side, in at least float32 at the highest precision, and x
      at few steps (`optim.orthogonal.gram`), with the same range. None is
      "gram" for a named schedule other than "exact" of at most 8 steps where
      that costs less, a float32 product counted as 15 bfloat16 ones: from an
      aspect ratio of 36 on, or of 1.5 where `precision` is the highest and
      `dtype` float32 or wider; else "direct".

  Returns:
    Array of x's shape and dtype.

  Raises:
    ValueError: x is not a real floating array of two or more dimensions;
      unknown coefficients or a wrong shape of them; steps below 1 or not fit
      for the coefficients; a dtype that is not floating; an unknown form.
  """
  (y,) = newton_schulz_list(
    [jnp.asarray(x)],
    coefficients=coefficients,
    steps=steps,
    dtype=dtype,
    precision=precision,
    form=form,
  )
  return y.astype(jnp.result_type(x))
