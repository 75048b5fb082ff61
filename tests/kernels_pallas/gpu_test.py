"""The values of the GPU kernels of linear attention.

Interpreted, values and gradients are held to the token recurrence in float64,
in float64 where a mistake cannot hide in rounding, and in float32 and bfloat16
in the very arithmetic of the kernels: all of their products are of bfloat16,
which the interpreter rounds to as a GPU does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels_pallas import linear_cases as cases
from tests.kernels_pallas.linear_test import segment_ids

OPTIONS = dict(implementation="pallas_gpu", interpret=True)
# Two chunks and a ragged tail; two value heads on each of two key heads; K and
# V that are padded, V in two programs.
SHAPE = cases.Shape(b=2, t=40, g=2, h=4, k=24, v=40)
SIZE = 16

SEGMENTS = (
  segment_ids(SHAPE.t + 9, shape=SHAPE),
  segment_ids(3, 5, SIZE - 3, SIZE, 2 * SIZE - 1, shape=SHAPE),
)


def compare(name, arrays, ids, dtype, bounds, shape=SHAPE, size=SIZE):
  return cases.compare(
    name, arrays, ids, dtype, bounds, shape, chunk_size=size, **OPTIONS
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.MEMBERS)
def test_members(name):
  arrays = cases.make(cases.MEMBERS[name], SHAPE)
  for ids in SEGMENTS:
    compare(name, arrays, ids, "float64", cases.F64)


def test_float32():
  """Whose operands are three parts of bfloat16, none of which may be lost."""
  arrays = cases.make(cases.MEMBERS["kda"], SHAPE, seed=1)
  # Two parts, 16 bits, would miss the first.
  bounds = dict(forward=2e-6, gradient=1e-5)
  (o, state), _ = compare("kda", arrays, SEGMENTS[1], "float32", bounds)
  assert {x.dtype for x in jax.tree.leaves((o, state))} == {
    jnp.dtype("float32")
  }


@pytest.mark.parametrize("name", ["kda", "mdn"])
def test_bfloat16(name):
  arrays = cases.make(cases.MEMBERS[name], SHAPE, seed=2)
  (o, state), gradients = compare(
    name, arrays, SEGMENTS[1], "bfloat16", cases.BF16
  )
  assert o.dtype == gradients["q"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("t", cases.LENGTHS)
def test_lengths_without_segments(t):
  name, sizes = cases.LENGTHS[t]
  shape = cases.Shape(b=1, t=t, **sizes)
  arrays = cases.make(cases.MEMBERS[name], shape, seed=t)
  compare(name, arrays, None, "float64", cases.F64, shape, size=64)


def test_float32_of_keys_that_repeat():
  """Where the inverse is largest, and what it multiplies must be exact."""
  shape = cases.Shape(b=1, t=70, g=1, h=2, k=16, v=16)
  arrays = cases.make(cases.MEMBERS["mdn"], shape, seed=6, keys="same")
  # As the layer couples them, alpha + beta <= 1.
  arrays["beta"] = np.full_like(arrays["beta"], 0.9)
  arrays["log_decay"] = np.full_like(arrays["beta"], np.log(0.1))
  compare("mdn", arrays, None, "float32", cases.F32, shape, size=64)


@pytest.mark.gpu
@pytest.mark.usefixtures("full_optimization")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", cases.MEMBERS)
def test_on_a_device(name, dtype):
  if jax.default_backend() != "gpu":
    pytest.skip("needs a GPU, JAX sees none")
  shape = cases.Shape(t=150, k=128, v=192)
  bounds = cases.F32 if dtype == "float32" else cases.BF16
  arrays = cases.make(cases.MEMBERS[name], shape, seed=7)
  cases.compare(
    name,
    arrays,
    segment_ids(5, 40, 71, 140, shape=shape),
    dtype,
    bounds,
    shape,
    chunk_size=64,
    implementation="pallas_gpu",
  )
