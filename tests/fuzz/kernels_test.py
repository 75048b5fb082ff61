"""Random shapes, gates and lists: every op against its reference."""

import dataclasses

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

from tests.fuzz import budget
from tests.kernels_pallas import linear_cases, sparse_cases


@st.composite
def _linear(draw):
  groups = draw(st.integers(1, 3))
  shape = linear_cases.Shape(
    b=draw(st.integers(1, 2)),
    t=draw(st.integers(1, 70)),
    g=groups,
    h=groups * draw(st.integers(1, 2)),
    k=draw(st.integers(1, 20)),
    v=draw(st.integers(1, 20)),
  )
  return (
    draw(st.sampled_from(sorted(linear_cases.MEMBERS))),
    shape,
    draw(st.sampled_from(["random", "same", "zero"])),
    draw(st.sampled_from([1.0, 1e-3, 30.0])),
    draw(st.sampled_from([None, 16, 32])),
    draw(st.integers(0, 3)),
    draw(st.integers(0, 2**16)),
  )


@budget.examples(6, 300, problem=_linear())
def test_linear_attention(problem):
  """Values and gradients in float64, at ordinary and at extreme gates."""
  name, shape, keys, decay, chunk_size, segments, seed = problem
  member = linear_cases.MEMBERS[name]
  arrays = linear_cases.make(member, shape, seed=seed, keys=keys)
  for gate in ("log_decay", "log_momentum"):
    if gate in arrays:
      arrays[gate] = arrays[gate] * decay
  ids = None
  if segments:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, segments, (shape.b, shape.t)), axis=1)
  # Momentum that does not fade grows with T, and its gradient with it.
  loose = 1e4 if member.second_order and decay < 1 else 1e2
  linear_cases.compare(
    name,
    arrays,
    ids,
    "float64",
    {key: loose * bound for key, bound in linear_cases.F64.items()},
    shape,
    implementation="xla",
    chunk_size=chunk_size,
  )


@st.composite
def _sparse(draw):
  groups, causal = draw(st.integers(1, 2)), draw(st.booleans())
  t = draw(st.integers(1, 70))
  blocks = st.sampled_from([4, 8, 16])
  # Causal queries are in whole blocks of keys, or the other way around.
  block_q, block_kv = draw(blocks), draw(blocks)
  same = causal or draw(st.booleans())
  return sparse_cases.Case(
    b=draw(st.integers(1, 2)),
    t=t,
    s=t if same else draw(st.integers(1, 70)),
    h=groups * draw(st.integers(1, 2)),
    g=groups,
    k=draw(st.integers(1, 12)),
    v=draw(st.integers(1, 12)),
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    segments=draw(st.integers(0, 3)) if same else 0,
    sinks=draw(st.booleans()),
  )


@budget.examples(
  6, 300, case=_sparse(), tail=st.sampled_from(sparse_cases.TAILS)
)
def test_block_lists(case, tail):
  """Values against sums by hand, and gradients against the reference."""
  hypothesis.assume(tail != "mean_global" or not case.segments)
  sparse_cases.check_float64(case, tail, implementation="xla")
  small = dataclasses.replace(case, b=1, h=case.g)
  with jax.enable_x64(True):
    args = sparse_cases.make(small)
    got = sparse_cases.run(args, tail, "xla")
  out, lse = sparse_cases.by_hand(args, tail)
  sparse_cases.check(
    {"out": got["out"], "lse": got["lse"]},
    {"out": out, "lse": lse},
    **sparse_cases.F64,
  )
