"""Linear attention divided over Explicit meshes and in `jax.shard_map`.

The table is members by what is divided: values and gradients of the undivided
call, no communication, and outputs divided as their inputs are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kernels_pallas
from tests import quick
from tests.kernels_pallas import linear_cases as cases

SHAPE = cases.Shape(b=2, t=20, g=2, h=4, k=8, v=8)
IDS = np.stack([np.arange(20) // 7, np.arange(20) // 30]).astype(np.int32)
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
# Sums in another order at most.
BOUND = 1e-5


def explicit():
  return jax.make_mesh((2, 2), ("data", "tensor"))


def problem(name):
  member = cases.MEMBERS[name]
  arrays = cases.narrow(cases.make(member, SHAPE), "float32")
  given = cases.narrow_cotangents(cases.cotangents(member, SHAPE), "float32")
  return member, arrays, given


def specs(arrays, batch, heads):
  tokens, states = P(batch, None, heads), P(batch, heads)
  by_name = {x: states if x == "initial_state" else tokens for x in arrays}
  return by_name, P(batch), (tokens, states)


def worst(got, want):
  return max(cases.errors(got, jax.tree.map(np.asarray, want)).values())


DIVIDED = {
  "batch": ("data", None),
  "heads": (None, "tensor"),
  "both": ("data", "tensor"),
}
TABLE = {
  f"{name}-{part}-{implementation}": (name, part, implementation)
  for name in cases.MEMBERS
  for part in DIVIDED
  for implementation in ("xla", "reference")
  if implementation == "xla" or part == "both"
}


@pytest.mark.parametrize(
  "name, part, implementation",
  quick.cases(TABLE, {"kda-both-xla", "mdn-heads-xla"}),
)
def test_an_explicit_mesh(name, part, implementation):
  member, arrays, given = problem(name)
  run = cases.jitted(member.op, (("implementation", implementation),))
  want = run(arrays, IDS, given)
  mesh = explicit()
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  by_name, ids, (tokens, states) = specs(arrays, *DIVIDED[part])
  args = (
    {
      key: jax.tree.map(lambda x, key=key: put(x, by_name[key]), x)
      for key, x in arrays.items()
    },
    put(IDS, ids),
    (
      put(given[0], tokens),
      jax.tree.map(lambda x: put(x, states), given[1]),
    ),
  )
  compiled = run.lower(*args).compile()
  for word in COLLECTIVES:
    assert word not in compiled.as_text(), word
  got = run(*args)
  assert worst(got, want) < BOUND
  assert jax.typeof(got[0][0]) == jax.typeof(args[2][0])
  for x, dx in zip(*map(jax.tree.leaves, (args[0], got[1])), strict=True):
    assert jax.typeof(x) == jax.typeof(dx)


IN_SHARD_MAP = {
  "kda-xla": ("kda", dict()),
  "mdn-reference": ("mdn", dict(implementation="reference")),
  "gla-xla": ("gla", dict()),
  "gdn-pallas_tpu": (
    "gdn",
    dict(implementation="pallas_tpu", interpret=True, chunk_size=16),
  ),
}


@pytest.mark.parametrize(
  "name, options", quick.cases(IN_SHARD_MAP, {"kda-xla", "mdn-reference"})
)
def test_shard_map_with_its_default_check(name, options):
  member, arrays, given = problem(name)
  run = cases.jitted(member.op, tuple(options.items()))
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
  by_name, ids, out = specs(arrays, "data", "tensor")
  divided = jax.shard_map(
    run, mesh=mesh, in_specs=(by_name, ids, out), out_specs=(out, by_name)
  )
  args = arrays, IDS, given
  assert worst(jax.jit(divided)(*args), run(*args)) < BOUND


def test_what_an_explicit_mesh_may_divide():
  mesh = explicit()
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  x, gate = jnp.ones((2, 8, 4, 8)), jnp.full((2, 8, 4), 0.5)
  op = jax.jit(
    lambda q, v, beta: kernels_pallas.gated_delta_rule(q, q, v, None, beta)[0]
  )
  want = op(x, x, gate)
  # What one array leaves whole, and one key head for all parts of H.
  got = op(x, put(x, "data", None, "tensor"), gate)
  assert worst(got, want) < BOUND
  assert jax.typeof(got).sharding.spec == P("data", None, "tensor", None)
  one = x[:, :, :1]
  got = op(one, put(x, None, None, "tensor"), gate)
  assert worst(got, op(one, x, gate)) < BOUND
  with pytest.raises(ValueError, match="^q .*along T .*context_axis"):
    op(put(x, None, "data"), x, gate)
  with pytest.raises(ValueError, match="^v is divided along B .*but q over"):
    op(put(x, "data"), put(x, "tensor"), gate)
  three = jnp.ones((2, 8, 3, 8))
  six, gates = jnp.ones((2, 8, 6, 8)), jnp.ones((2, 8, 6))
  with pytest.raises(ValueError, match="so G = 3 must divide"):
    op(three, put(six, None, None, "tensor"), gates)


def test_a_step_on_an_explicit_mesh():
  member, arrays, _ = problem("mdn")
  state = arrays.pop("initial_state")
  token = {key: x[:, 0] for key, x in arrays.items()}
  want = member.step(state, **token)
  put = lambda x: jax.device_put(
    x, NamedSharding(explicit(), P("data", "tensor"))
  )
  got = jax.jit(member.step)(
    jax.tree.map(put, state), **jax.tree.map(put, token)
  )
  assert worst(got, want) < BOUND
