"""Pieces of a sequence side by side, on one device and over a mesh axis."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.kernels_pallas import linear_cases as cases

pytestmark = pytest.mark.slow

# As of the chunks themselves, see linear_test.
F32 = dict(forward=1e-5, gradient=1e-4)
F64 = dict(forward=1e-12, gradient=1e-12)
BF16 = dict(forward=5e-3, gradient=1e-2, norm="rms")
SHAPE = cases.Shape(b=2, t=96, g=1, h=2, k=8, v=12)


def ids(*starts):
  """Both rows' ids; the second row's segments start three tokens later."""
  tokens = np.arange(SHAPE.t)
  row = lambda late: sum((tokens >= s + late).astype(np.int32) for s in starts)
  return np.stack([row(0), row(3)])


# A border of four pieces of 24, and of eight of 12, is at 24.
SEGMENTS = {"none": None, "some": ids(5, 24, 60), "every": ids(*range(96))}


def problem(name, dtype):
  member = cases.MEMBERS[name]
  arrays = cases.narrow(cases.make(member, SHAPE), dtype)
  cotangents = cases.narrow_cotangents(cases.cotangents(member, SHAPE), dtype)
  return member.op, arrays, cotangents


@pytest.mark.parametrize(
  "name,segments",
  [("ssd", "some"), ("gla", "none"), ("gdn", "every"), ("kda", "some")]
  + [("mdn_erase", x) for x in SEGMENTS],
)
def test_splits(name, segments):
  with jax.enable_x64(True):
    op, arrays, cotangents = problem(name, "float64")
    args = arrays, SEGMENTS[segments], cotangents
    got = cases.values_and_grads(op, *args, chunk_size=16, num_splits=4)
  cases.check(got, cases.truth(op, *args), **F64)


@pytest.mark.parametrize("count", [2, 3, 96])
def test_any_number_of_splits(count):
  op, arrays, cotangents = problem("mdn", "float32")
  args = arrays, SEGMENTS["some"], cotangents
  got = cases.values_and_grads(op, *args, chunk_size=16, num_splits=count)
  cases.check(got, cases.truth(op, *args), **F32)


def test_splits_of_bfloat16():
  op, arrays, cotangents = problem("gdn", "bfloat16")
  args = arrays, SEGMENTS["some"], cotangents
  got = cases.values_and_grads(op, *args, chunk_size=16, num_splits=4)
  cases.check(got, cases.truth(op, *args), **BF16)
  assert got[0][0].dtype == jnp.bfloat16


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize(
  "name,segments",
  [("gdn", "some"), ("kda", "every"), ("mdn", "none"), ("mdn", "some")],
)
def test_context_parallelism(name, segments, check_vma):
  with jax.enable_x64(True):
    op, arrays, cotangents = problem(name, "float64")
    segment_ids, lengths = SEGMENTS[segments], None
    if check_vma and segment_ids is not None:  # In 64 bits, and padding.
      segment_ids = segment_ids.astype(np.int64) << 32
      lengths = np.array([70, 96])
    mesh = jax.make_mesh((8,), ("context",), (AxisType.Auto,))
    tokens, whole = PartitionSpec(None, "context"), PartitionSpec()
    spec = {key: whole if key == "initial_state" else tokens for key in arrays}

    @functools.partial(
      jax.shard_map,
      mesh=mesh,
      in_specs=(spec, None if segment_ids is None else tokens),
      out_specs=(tokens, whole),
      check_vma=check_vma,
    )
    def run(arrays, segment_ids):
      return cases.call(
        op,
        arrays,
        segment_ids=segment_ids,
        lengths=lengths,
        chunk_size=16,
        context_axis="context",
      )

    @jax.jit
    def values_and_grads(arrays, segment_ids, cotangents):
      out, pullback = jax.vjp(lambda x: run(x, segment_ids), arrays)
      return out, pullback(cotangents)[0]

    got = values_and_grads(arrays, segment_ids, cotangents)
    want = cases.values_and_grads(
      functools.partial(op, lengths=lengths),
      arrays,
      segment_ids,
      cotangents,
      implementation="reference",
    )
  cases.check(got, jax.tree.map(np.asarray, want), **F64)
