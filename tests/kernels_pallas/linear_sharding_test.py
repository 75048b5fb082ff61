"""Batches and heads split over a mesh: no device needs another's."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.kernels_pallas import linear_cases as cases

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("full_optimization"),
]


@pytest.mark.parametrize("name", ["gdn", "kda", "mdn"])
def test_batch_and_heads_are_split_without_communication(name):
  member = cases.MEMBERS[name]
  shape = cases.Shape(b=2, t=20, g=2, h=4, k=8, v=8)
  arrays = cases.narrow(cases.make(member, shape), "float32")
  cotangents = cases.narrow_cotangents(
    cases.cotangents(member, shape), "float32"
  )
  ids = np.stack([np.arange(20) // 7, np.arange(20) // 30]).astype(np.int32)
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
  put = lambda x, *spec: jax.device_put(
    x, NamedSharding(mesh, PartitionSpec(*spec))
  )
  tokens = lambda x: put(x, "data", None, "tensor")
  states = lambda tree: jax.tree.map(lambda x: put(x, "data", "tensor"), tree)
  split = {
    key: states(x) if key == "initial_state" else tokens(x)
    for key, x in arrays.items()
  }
  o, state = cotangents
  args = split, put(ids, "data"), (tokens(o), states(state))

  run = lambda *args: cases.values_and_grads(member.op, *args, chunk_size=16)
  jitted = jax.jit(run).lower(*args).compile()
  text = jitted.as_text()
  for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert word not in text, word
  table = cases.errors(
    jitted(*args), jax.tree.map(np.asarray, run(arrays, ids, cotangents))
  )
  # The same sums, in another order at most.
  assert max(table.values()) < 1e-5, table
