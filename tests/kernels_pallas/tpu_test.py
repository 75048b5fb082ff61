"""The TPU kernels of linear attention, interpreted.

Values and gradients are held to the token recurrence in float64, in float64
where a mistake cannot hide in rounding. Interpretation clamps what is out of
bounds, so each kernel also runs once in the interpreter that models memory,
which starts from NaN, refuses what is out of bounds and looks for races.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import products
from kernels_pallas.linear import problem, tpu, tpu_plan
from tests import quick
from tests.kernels_pallas import linear_cases as cases

OPTIONS = dict(implementation="pallas_tpu", interpret=True)
# Two chunks and a ragged tail; two value heads on each of two key heads, those
# of one in a grid step; K and V that are padded.
SHAPE = cases.Shape(b=2, t=40, g=2, h=4, k=24, v=40)
SIZE = 16


def segments(*starts, shape=SHAPE):
  """Ids of segments that start at `starts`, in the second row 3 later."""
  tokens = np.arange(shape.t)
  rows = [sum(tokens >= s + late for s in starts) for late in (0, 3)]
  return np.stack(rows[: shape.b]).astype(np.int32)


SEGMENTS = (
  segments(SHAPE.t + 9),
  segments(3, 5, SIZE - 3, SIZE, 2 * SIZE - 1),
)


@pytest.fixture(autouse=True)
def two_heads(monkeypatch):
  """In a grid step at most: a kernel's compilation grows with them."""
  monkeypatch.setattr(tpu_plan, "_MAX_HEADS", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.MEMBERS)
def test_members(name):
  arrays = cases.make(cases.MEMBERS[name], SHAPE)
  for ids in SEGMENTS:
    cases.compare(
      name,
      arrays,
      ids,
      "float64",
      cases.F64,
      SHAPE,
      chunk_size=SIZE,
      **OPTIONS,
    )


def test_float32_and_grid_steps_that_share_a_key_head():
  shape = dataclasses.replace(SHAPE, b=1, g=1)
  arrays = cases.make(cases.MEMBERS["mdn"], shape, seed=1)
  (o, state), _ = cases.compare(
    "mdn",
    arrays,
    segments(3, 17, shape=shape),
    "float32",
    cases.F32,
    shape,
    chunk_size=SIZE,
    **OPTIONS,
  )
  assert {x.dtype for x in jax.tree.leaves((o, state))} == {
    jnp.dtype("float32")
  }


@pytest.mark.slow
@pytest.mark.parametrize("t", cases.LENGTHS)
def test_lengths_without_segments(t):
  name, sizes = cases.LENGTHS[t]
  shape = cases.Shape(b=1, t=t, **sizes)
  arrays = cases.make(cases.MEMBERS[name], shape, seed=t)
  cases.compare(
    name, arrays, None, "float64", cases.F64, shape, chunk_size=64, **OPTIONS
  )


def _as_a_matrix_unit(original):
  """`products.dot` with float32 rounded as a TPU rounds it by default."""

  def dot(a, b, *, precision="highest", **how):
    if precision == "default":
      a, b = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b))
    return original(a, b, precision="highest", **how)

  return dot


@pytest.mark.parametrize("name", ["kda", "mdn"])
def test_bfloat16(name, monkeypatch):
  """A TPU multiplies float32 in bfloat16 unless told otherwise; a CPU not."""
  monkeypatch.setattr(products, "dot", _as_a_matrix_unit(products.dot))
  arrays = cases.make(cases.MEMBERS[name], SHAPE, seed=2)
  (o, state), gradients = cases.compare(
    name,
    arrays,
    SEGMENTS[1],
    "bfloat16",
    cases.BF16,
    SHAPE,
    chunk_size=SIZE,
    **OPTIONS,
  )
  assert o.dtype == gradients["q"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_values_split_over_grid_steps(monkeypatch):
  """As where the states of a whole head do not fit."""
  shape = cases.Shape(b=1, t=20, g=1, h=2, k=16, v=200)
  small = lambda plan, *_: 0 if plan.splits == 2 else 2**40
  monkeypatch.setattr(tpu_plan, "vmem_bytes", small)
  cases.compare(
    "mdn_erase",
    cases.make(cases.MEMBERS["mdn_erase"], shape, seed=4),
    segments(18, shape=shape),
    "float64",
    cases.F64,
    shape,
    chunk_size=SIZE,
    **OPTIONS,
  )


_modelled = functools.partial(
  pltpu.InterpretParams, detect_races=True, random_seed=0
)


def run(name, arrays, ids, interpret):
  """The kernels below the public functions."""
  member = cases.MEMBERS[name]
  inputs = problem.make_inputs(
    arrays["q"],
    arrays["k"],
    arrays.get("erase_key"),
    arrays["v"],
    {"log_decay": None} | {gate: arrays[gate] for gate in member.gates},
    state=arrays["initial_state"],
    segment_ids=ids,
    channels="allowed",
    fields=("s", "n") if member.second_order else (),
  )
  options = problem.Options(
    scale=arrays["q"].shape[-1] ** -0.5,
    delta="beta" in member.gates,
    chunk_size=SIZE,
    interpret=interpret,
  )
  return tpu.run(inputs, options)


def race(f, capfd):
  """Whether the interpreter reports a race: by release, prints or raises."""
  try:
    out = jax.block_until_ready(f())
  except Exception as e:
    pltpu.reset_tpu_interpret_mode_state()
    if "RACE DETECTED" not in str(e):
      raise
    return None, True
  return out, "RACE DETECTED" in capfd.readouterr().out


# A second core costs three times the first, and blocks are alike for all.
MODELLED = {"ssd-2": ("ssd", 2), "mdn-1": ("mdn", 1), "kda-1": ("kda", 1)}


@pytest.mark.parametrize("name, cores", quick.cases(MODELLED, {"mdn-1"}))
def test_memory_and_races(name, cores, capfd, monkeypatch):
  """On two cores, each has one of the value heads of a key head."""
  monkeypatch.setattr(tpu_plan, "_MAX_HEADS", 1)
  shape = cases.Shape(b=1, t=20, g=1, h=2, k=8, v=8)
  member = cases.MEMBERS[name]
  arrays = cases.narrow(cases.make(member, shape), "float32")
  cotangents = cases.narrow_cotangents(
    cases.cotangents(member, shape), "float32"
  )
  ids = segments(4, 18, shape=shape)

  do, dstate = cotangents
  interpret = _modelled(num_cores_or_threads=cores)

  @jax.jit
  def values(arrays):
    f = lambda arrays: run(name, arrays, ids, interpret)
    outputs, pullback = jax.vjp(f, arrays)
    return outputs, pullback((do, tuple(jax.tree.leaves(dstate))))[0]

  got, found = race(lambda: values(arrays), capfd)
  assert not found
  cases.check(got, cases.truth(member.op, arrays, ids, cotangents), **cases.F32)


def test_a_race_would_be_found(capfd):
  """Two cores that write one block."""

  def kernel(out):
    out[...] = jnp.zeros_like(out)

  call = pl.pallas_call(
    kernel,
    grid=(1, 2),
    out_specs=pl.BlockSpec((8, 128), lambda i, j: (0, 0)),
    out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel")
    ),
    interpret=_modelled(num_cores_or_threads=2),
  )
  _, found = race(jax.jit(call), capfd)
  assert found


def test_refusals():
  op = cases.MEMBERS["linear"].op
  array = lambda dtype, size: jax.ShapeDtypeStruct((1, 8, 1, size), dtype)
  with jax.enable_x64(True):
    q = array("float64", 8)
    with pytest.raises(NotImplementedError, match="float64"):
      jax.eval_shape(lambda q: op(q, q, q, implementation="pallas_tpu"), q)
  q = array("float32", 2**17)
  with pytest.raises(NotImplementedError, match="K = 131072 by V = 131072"):
    jax.eval_shape(lambda q: op(q, q, q, **OPTIONS), q)
