"""Values and gradients of the linear attention family.

Every implementation is held to the token recurrence in float64. Errors are
relative to the largest entry of each output and gradient.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import MomentumState
from kernels_pallas.linear import xla
from tests import quick
from tests.kernels_pallas import linear_cases as cases

# Options of the public functions, by name. A new implementation is a row.
IMPLEMENTATIONS = {"xla": dict(implementation="xla")}
# Each also in this arithmetic, where it can.
FLOAT64 = {"xla"}

CHUNK = 64
SHAPE = cases.Shape(t=2 * CHUNK + 22)

NAMES = {name: name for name in cases.MEMBERS}
members = pytest.mark.parametrize("name", NAMES)
implementations = pytest.mark.parametrize(
  "options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS
)
wide = pytest.mark.parametrize(
  "options", [IMPLEMENTATIONS[x] for x in sorted(FLOAT64)], ids=sorted(FLOAT64)
)


def segment_ids(*starts, shape=SHAPE):
  """Ids of segments that start at `starts`; the second row's 3 later."""
  tokens = np.arange(shape.t)
  row = sum((tokens >= s).astype(np.int32) for s in starts)
  late = sum((tokens >= s + 3).astype(np.int32) for s in starts)
  # Neither starting at 0 nor without gaps.
  return np.stack([7 + 2 * row, 5 + late]).astype(np.int32)


SEGMENTS = {
  "none": segment_ids(SHAPE.t + 9),
  "inside": segment_ids(5, 40, 71, 140),
  "borders": segment_ids(CHUNK - 3, CHUNK, 2 * CHUNK - 3, 2 * CHUNK),
  "every": segment_ids(*range(SHAPE.t)),
}


def compare(name, arrays, ids, dtype, bounds, shape=SHAPE, **options):
  """`cases.compare` at this file's shape and chunk."""
  options = dict(chunk_size=CHUNK) | options
  return cases.compare(name, arrays, ids, dtype, bounds, shape, **options)


@pytest.mark.slow
@members
@wide
def test_float64(name, options):
  arrays = cases.make(cases.MEMBERS[name], SHAPE)
  for ids in SEGMENTS.values():
    compare(name, arrays, ids, "float64", cases.F64, **options)


@pytest.mark.parametrize("name", quick.cases(NAMES, {"kda", "linear", "mdn"}))
def test_systems_made_chunk_by_chunk(name, monkeypatch):
  """As on CPU beyond the sizes of the other tests, in less memory."""
  monkeypatch.setattr(cases, "_jitted", cases.jitted)
  member = cases.MEMBERS[name]
  arrays = cases.make(member, SHAPE)
  given = cases.cotangents(member, SHAPE)

  def memory():
    run = cases.jitted(member.op, (("implementation", "xla"),))
    lowered = run.lower(arrays, SEGMENTS["inside"], given)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  at_once = memory()
  monkeypatch.setattr(xla, "_AT_ONCE", 0)
  assert memory() < at_once
  for ids in (SEGMENTS["inside"], SEGMENTS["borders"]):
    compare(name, arrays, ids, "float64", cases.F64, implementation="xla")


@pytest.mark.parametrize(
  "name", quick.cases(NAMES, {"gdn", "gla", "kda", "mdn"})
)
@implementations
def test_float32(name, options):
  arrays = cases.make(cases.MEMBERS[name], SHAPE, seed=1)
  for ids in SEGMENTS.values():
    o, state = compare(name, arrays, ids, "float32", cases.F32, **options)[0]
    assert {x.dtype for x in jax.tree.leaves((o, state))} == {
      jnp.dtype("float32")
    }


@implementations
@pytest.mark.parametrize("name", ["gdn", "kda", "mdn_erase"])
def test_bfloat16(name, options):
  arrays = cases.make(cases.MEMBERS[name], SHAPE, seed=2)
  (o, state), gradients = compare(
    name, arrays, SEGMENTS["inside"], "bfloat16", cases.BF16, **options
  )
  assert o.dtype == gradients["q"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


# Lengths around a chunk, with H / G of 1, 2 and 3 and sizes of no multiple.
LENGTHS = {
  1: dict(g=2, h=2, k=16, v=16),
  15: dict(g=1, h=3, k=7, v=33),
  63: dict(g=1, h=2, k=20, v=8),
  64: dict(g=2, h=2, k=33, v=7),
  65: dict(g=1, h=3, k=1, v=1),
}


@pytest.mark.slow
@implementations
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("name", ["kda", "mdn"])
def test_lengths_without_segments(name, t, options):
  shape = cases.Shape(b=1, t=t, **LENGTHS[t])
  arrays = cases.make(cases.MEMBERS[name], shape, seed=t)
  compare(name, arrays, None, "float32", cases.F32, shape, **options)


@implementations
@pytest.mark.slow
def test_a_thousand_tokens(options):
  shape = cases.Shape(b=1, t=1000, g=1, h=2)
  for name in ("gdn", "kda", "mdn"):
    arrays = cases.make(cases.MEMBERS[name], shape, seed=3)
    compare(name, arrays, None, "float32", cases.F32, shape, **options)


GATES = {
  "weak": lambda rng, shape: np.full(shape, -1e-4),
  "one": lambda rng, shape: np.full(shape, -1.0),
  "strong": lambda rng, shape: np.full(shape, -20.0),
  "mixed": lambda rng, shape: rng.choice(
    [-1e-4, -1.0, -20.0, -1e4, -np.inf], shape
  ),
}


@implementations
def test_momentum_under_extreme_gates(options):
  rng = np.random.default_rng(4)
  arrays = cases.make(cases.MEMBERS["mdn"], SHAPE, seed=4)
  for decay, momentum in itertools.product(GATES, GATES):
    for name, kind in (("log_decay", decay), ("log_momentum", momentum)):
      arrays[name] = GATES[kind](rng, arrays[name].shape)
    arrays["beta"] = np.ones_like(arrays["beta"])
    arrays["eta"] = rng.uniform(1, 2, arrays["eta"].shape)
    compare("mdn", arrays, SEGMENTS["none"], "float32", cases.F32, **options)


@implementations
@pytest.mark.parametrize("name", ["gdn", "kda", "gla", "comba"])
def test_first_order_under_extreme_gates(name, options):
  rng = np.random.default_rng(5)
  arrays = cases.make(cases.MEMBERS[name], SHAPE, seed=5)
  # Growth, which is allowed, among strong decay.
  grow = lambda rng, shape: rng.choice([0.02, -0.03, -20.0], shape)
  for make in (*GATES.values(), grow):
    arrays["log_decay"] = make(rng, arrays["log_decay"].shape)
    compare(name, arrays, SEGMENTS["none"], "float32", cases.F32, **options)


@implementations
@pytest.mark.parametrize("name", ["deltanet", "gdn", "kda"])
@pytest.mark.parametrize("keys", ["same", "zero"])
def test_keys_that_repeat_or_vanish(name, keys, options):
  """Without decay a power series of L would lose every digit here."""
  arrays = cases.make(cases.MEMBERS[name], SHAPE, seed=6, keys=keys)
  if name != "deltanet":
    arrays["log_decay"] = np.zeros_like(arrays["log_decay"])
  for weight in (1.0, 1.9):
    arrays["beta"] = np.full_like(arrays["beta"], weight)
    compare(name, arrays, SEGMENTS["inside"], "float32", cases.F32, **options)


@implementations
@pytest.mark.parametrize("keys", ["same", "zero"])
def test_momentum_on_keys_that_repeat_or_vanish(keys, options):
  """With the coupling that the layer has, alpha + beta <= 1."""
  arrays = cases.make(cases.MEMBERS["mdn"], SHAPE, seed=6, keys=keys)
  arrays["eta"] = np.full_like(arrays["eta"], 2.0)
  for beta, momentum in itertools.product((0.1, 0.5, 0.9), (-1e-4, -0.5)):
    arrays["beta"] = np.full_like(arrays["beta"], beta)
    arrays["log_decay"] = np.full_like(arrays["beta"], np.log1p(-beta))
    arrays["log_momentum"] = np.full_like(arrays["beta"], momentum)
    compare("mdn", arrays, SEGMENTS["none"], "float32", cases.F32, **options)


@implementations
@pytest.mark.parametrize("size", [16, 64])
def test_momentum_on_one_key_with_neither_decay(size, options):
  """The worst case of chunks, which the layer's coupling excludes.

  Neither S nor N forgets, so what a chunk of C tokens would do without its
  own corrections grows as C^2, in the sums over C tokens that they cancel.
  """
  member = cases.MEMBERS["mdn"]
  arrays = cases.make(member, SHAPE, seed=6, keys="same")
  for gate, value in dict(
    log_decay=0.0, log_momentum=-1e-4, beta=1.0, eta=1.9
  ).items():
    arrays[gate] = np.full_like(arrays[gate], value)
  bound = 8 * size**3 * 2.0**-24
  bounds = dict(forward=bound, gradient=bound)
  options = dict(options, chunk_size=size)
  compare("mdn", arrays, SEGMENTS["none"], "float32", bounds, **options)


@implementations
def test_momentum_forgotten_at_once_is_the_gated_delta_rule(options):
  arrays = cases.make(cases.MEMBERS["mdn"], SHAPE, seed=7)
  arrays["log_momentum"] = np.full_like(arrays["log_momentum"], -100.0)
  s, n = arrays["initial_state"]
  arrays["initial_state"] = MomentumState(s, np.zeros_like(n))
  (o, state), _ = compare(
    "mdn", arrays, SEGMENTS["inside"], "float32", cases.F32, **options
  )
  first = {x: arrays[x] for x in ("q", "k", "v", "log_decay")}
  first.update(beta=arrays["beta"] * arrays["eta"], initial_state=s)
  (want, want_state), _ = compare(
    "gdn", first, SEGMENTS["inside"], "float32", cases.F32, **options
  )
  table = cases.errors((o, state.s), (want, want_state))
  assert max(table.values()) < cases.F32["forward"], table


@implementations
@pytest.mark.parametrize("name", ["kda", "mdn"])
def test_chunk_sizes_agree(name, options):
  shape = cases.Shape(b=1, t=65, g=1, h=2, k=8, v=8)
  arrays = cases.narrow(
    cases.make(cases.MEMBERS[name], shape, seed=8), "float32"
  )
  run = lambda **how: forward(name, **how)(arrays)
  want = run(implementation="reference")
  for size in (16, 32, 128, 256):
    table = cases.errors(run(chunk_size=size, **options), want)
    assert max(table.values()) < cases.F32["forward"], (size, table)


def forward(name, **options):
  """A jitted call without gradients."""
  return jax.jit(
    lambda arrays, ids=None: cases.call(
      cases.MEMBERS[name].op, arrays, segment_ids=ids, **options
    ),
  )


@implementations
def test_packed_sequences_do_not_see_each_other(options):
  """A pack gives what its sequences give alone."""
  member = cases.MEMBERS["mdn_erase"]
  shape = cases.Shape(b=1, t=40, g=1, h=2)
  arrays = cases.narrow(cases.make(member, shape, seed=9), "float32")
  ids = jnp.where(jnp.arange(shape.t) < 18, 0, 1)[None]
  run = forward("mdn_erase", chunk_size=16, **options)
  o, state = run(arrays, ids)
  initial = arrays.pop("initial_state")
  first = {name: x[:, :18] for name, x in arrays.items()}
  second = {name: x[:, 18:] for name, x in arrays.items()}
  zero = jax.tree.map(jnp.zeros_like, initial)
  o_1, _ = run(dict(first, initial_state=initial))
  o_2, state_2 = run(dict(second, initial_state=zero))
  table = cases.errors((o[:, :18], o[:, 18:], state), (o_1, o_2, state_2))
  assert max(table.values()) < cases.F32["forward"], table


@implementations
def test_vmap(options):
  shape = cases.Shape(b=1, t=20, g=1, h=2)
  member = cases.MEMBERS["gdn"]
  several = [
    cases.narrow(cases.make(member, shape, seed=i), "float32") for i in range(3)
  ]
  ids = jnp.stack([jnp.arange(20)[None] // n for n in (4, 7, 30)])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)

  def loss(arrays, ids):
    o, state = cases.call(
      member.op, arrays, segment_ids=ids, chunk_size=16, **options
    )
    return jnp.sum(jnp.sin(o)) + jnp.sum(state**2)

  got = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked, ids)
  f = jax.jit(jax.value_and_grad(loss))
  want = [f(arrays, one) for arrays, one in zip(several, ids, strict=True)]
  want = jax.tree.map(lambda *x: jnp.stack(x), *want)
  table = cases.errors(got, want)
  assert max(table.values()) < cases.F32["gradient"], table
