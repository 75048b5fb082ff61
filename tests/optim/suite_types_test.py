"""What every optimizer must do with types: meshes, sizes and dtypes.

optax's rule (`optax/_src/sharding_test.py`): under a mesh with explicit axes,
and for any dtypes, the state's types are the same after an update, and equal
within `jax.jit` and outside.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlib_ext import labels, quantization
from tests import quick
from tests.optim import suite_test as suite
from tests.optim.rows import ROWS

# Which mesh axes divide layers, rows and columns. Two layers and x of size 2:
# y = 3 divides nothing here, so that all of it is replicated.
LAYOUTS = {
  "rows": (None, "x", None),
  "columns": (None, None, "x"),
  "both": (None, "y", "x"),
  "layers": ("x", None, "y"),
  "rows_twice": (None, ("x", "y"), None),
}
QUICK = ("muon", "galore", "apollo", "frugal", "dion2", "spam_sparse", "qzo")
CASES = {
  f"{name}-{layout}": (row, LAYOUTS[layout])
  for name, row in ROWS.items()
  for layout in LAYOUTS
}
layouts = pytest.mark.parametrize(
  ("row", "layout"), quick.cases(CASES, [f"{name}-both" for name in QUICK])
)
rows = pytest.mark.parametrize("row", quick.cases(ROWS, QUICK))


def tree():
  """A stack, a matrix that no axis divides, embedding, head and vectors."""
  return {
    "layers": {"up": suite.normal(1, 2, 8, 16), "bias": suite.normal(2, 2, 8)},
    "odd": suite.normal(3, 5, 3),
    "embed": {"table": suite.normal(4, 16, 8)},
    "lm_head": suite.normal(5, 8, 16),
    "gain": suite.normal(6, 8),
  }


def make_mesh(kinds=(AxisType.Explicit,) * 2):
  return jax.make_mesh((2, 4), ("x", "y"), axis_types=kinds)


def put(params, mesh, layout):
  """Divides leaves as far as their sizes allow."""

  def one(x):
    entries = [None] * x.ndim if x.ndim < 2 else list(layout[-x.ndim :])
    for i, (size, entry) in enumerate(zip(x.shape, entries, strict=True)):
      names = (entry,) if isinstance(entry, str) else entry or ()
      if size % np.prod([mesh.shape[name] for name in names], dtype=int):
        entries[i] = None
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*entries)))

  return jax.tree.map(one, params)


def types(tree):
  return jax.tree.map(jax.typeof, tree)


def param_types(params):
  """One type per parameter: of a quantized one that of its codes."""
  return jax.tree.map(
    lambda x: jax.typeof(getattr(x, "codes", x)),
    params,
    is_leaf=labels.is_param,
  )


def run(tx, row, params, grads):
  """Two updates in a loop, whose carry must keep its types."""

  def step(carry, grads):
    params, state = carry
    updates, state = suite.update_of(tx, row)(grads, state, params)
    assert param_types(updates) == param_types(params)
    return (row.apply(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


def two_gradients(params):
  one = suite.gradients(params)
  return jax.tree.map(lambda x: jnp.stack([x, -0.5 * x]), one)


def divided_run(tx, row, mesh, layout):
  params = put(tree(), mesh, layout)
  grads = jax.tree.map(
    lambda g, p: jax.device_put(
      g, NamedSharding(mesh, PartitionSpec(None, *p.sharding.spec))
    ),
    two_gradients(tree()),
    params,
  )
  with jax.set_mesh(mesh):
    params = jax.jit(row.prepare)(params)
    got, state = jax.jit(functools.partial(run, tx, row))(params, grads)
    assert types(got) == types(params)
    assert types(state) == types(jax.jit(tx.init)(params))
  return got, state


@functools.cache
def undivided(row):
  tx = row.factory(row.rate)
  params = row.prepare(tree())
  return jax.jit(functools.partial(run, tx, row))(params, two_gradients(tree()))


@layouts
def test_explicit_mesh(row, layout):
  got, state = divided_run(row.factory(row.rate), row, make_mesh(), layout)
  want, want_state = undivided(row)
  assert jax.tree.structure(state) == jax.tree.structure(want_state)
  suite.close(row.view(got), row.view(want), row)


@rows
@pytest.mark.parametrize("explicit", [0, 1])
def test_mesh_of_explicit_and_automatic_axes(row, explicit):
  kinds = [AxisType.Auto] * 2
  kinds[explicit] = AxisType.Explicit
  mesh = make_mesh(tuple(kinds))
  got, _ = divided_run(row.factory(row.rate), row, mesh, LAYOUTS["both"])
  suite.close(row.view(got), row.view(undivided(row)[0]), row)


@rows
def test_types_outside_jit(row):
  mesh = make_mesh()
  tx = row.factory(row.rate)
  with jax.set_mesh(mesh):
    params = row.prepare(put(tree(), mesh, LAYOUTS["both"]))
    state = tx.init(params)
    grads = put(suite.gradients(tree()), mesh, LAYOUTS["both"])
    updates, after = suite.update_of(tx, row)(grads, state, params)
    assert types(state) == types(jax.jit(tx.init)(params))
    assert types(after) == types(state)
    assert param_types(updates) == param_types(params)


# Between other leaves and before them, as matrices, heads and vectors.
EMPTY = {
  "a": (0, 4),
  "b": (2, 0, 3),
  "layers": {"down": (0, 4, 4), "norm": {"scale": (3, 0)}},
  "head": (4, 0),
  "none": (0,),
}


def with_empty(params):
  empty = jax.tree.map(jnp.zeros, EMPTY, is_leaf=lambda x: isinstance(x, tuple))
  return {**empty, **params, "layers": {**empty["layers"], **params["layers"]}}


@rows
def test_leaves_without_entries(row):
  tx = row.factory(row.rate)
  full = tree()
  whole = with_empty(full)
  # What is there has the same gradients with and without them.
  grads = suite.gradients(full)
  params = row.prepare(whole)
  state = tx.init(params)
  update = jax.jit(suite.update_of(tx, row))
  for _ in range(2):
    updates, state = update(with_empty(grads), state, params)
    assert param_types(updates) == param_types(params)
    params = row.apply(params, updates)
  want = row.prepare(full)
  state = tx.init(want)
  for _ in range(2):
    updates, state = update(grads, state, want)
    want = row.apply(want, updates)
  got, want = row.view(params), row.view(want)
  for path, leaf in jax.tree_util.tree_leaves_with_path(want):
    found = functools.reduce(lambda t, key: t[key.key], path, got)
    np.testing.assert_array_equal(found, leaf, err_msg=str(path))


DTYPES = {
  "float64": ("float64", "float64"),
  "wider": ("float32", "float64"),
  "wider_than_bfloat16": ("bfloat16", "float32"),
  "narrower": ("float32", "bfloat16"),
  "narrower_than_float64": ("float64", "float32"),
}
DTYPE_CASES = {
  f"{name}-{kind}": (row, *DTYPES[kind])
  for name, row in ROWS.items()
  for kind in DTYPES
}


@pytest.mark.parametrize(
  ("row", "held", "given"),
  quick.cases(DTYPE_CASES, ["q_galore-float64", "fira-wider", "eco-wider"]),
)
def test_dtypes_of_parameters_and_gradients(row, held, given):
  with jax.enable_x64(True):
    params = row.prepare(jax.tree.map(lambda x: x.astype(held), tree()))
    tx = row.factory(row.rate)

    def step(carry, grads):
      params, state = carry
      updates, state = suite.update_of(tx, row)(grads, state, params)
      if not row.needs_value and not row.quantized:
        assert suite.avals(updates) == suite.avals(grads)
      return (row.apply(params, updates), state), None

    grads = jax.tree.map(lambda x: x.astype(given), two_gradients(tree()))
    start = (params, tx.init(params))
    end = jax.jit(lambda *args: jax.lax.scan(step, *args)[0])(start, grads)
    assert suite.avals(end) == suite.avals(start)
    for x in jax.tree.leaves(row.view(end[0])):
      assert np.all(np.isfinite(np.asarray(x, np.float64)))


MASK = {
  "layers": True,
  "odd": True,
  "embed": False,
  "lm_head": True,
  "gain": False,
}


@pytest.mark.parametrize(
  "wrap",
  [
    lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(0.1)),
    lambda make: optax.MultiSteps(make(0.1), 2),
    lambda make: optax.masked(make(0.1), MASK),
    lambda make: optax.inject_hyperparams(make, ("rank",))(0.1),
  ],
  ids=["chain", "multi_steps", "masked", "inject_hyperparams"],
)
def test_wrappers_on_an_explicit_mesh(wrap):
  row = ROWS["galore"]
  tx = wrap(row.factory)
  got, _ = divided_run(tx, row, make_mesh(), LAYOUTS["both"])
  start = (tree(), two_gradients(tree()))
  want, _ = jax.jit(functools.partial(run, tx, row))(*start)
  suite.close(got, want, row)


@pytest.mark.parametrize("fmt", ["int8", "int4:4", "mxfp4", "nvfp4"])
def test_quantization_on_an_explicit_mesh(fmt):
  x = suite.normal(0, 64, 8)
  quantize = functools.partial(quantization.quantize, fmt=fmt)
  want = quantize(x, key=jax.random.key(1))
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    for spec in (("x", "y"), (("x", "y"), None)):
      where = NamedSharding(mesh, PartitionSpec(*spec))
      divided = jax.device_put(x, where)
      got = jax.jit(lambda x: quantize(x, key=jax.random.key(1)))(divided)
      assert jax.typeof(got.codes).sharding.spec == where.spec
      assert types(got.dequantize()) == types(divided)
      for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(
          np.asarray(a, np.float32), np.asarray(b, np.float32)
        )


@pytest.mark.parametrize("fmt", ["int8", "int4:4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (0, 4, 4), (2, 0, 3)])
def test_quantization_of_no_entries(shape, fmt):
  q = quantization.quantize(jnp.zeros(shape), fmt)
  assert q.dequantize().shape == q.shape == shape


def test_elementwise_inside_shard_map():
  mesh = make_mesh()
  row = ROWS["spam"]
  tx = row.factory(row.rate)
  params = {"bias": suite.normal(0, 16)}
  grads = two_gradients(params)
  want, _ = jax.jit(functools.partial(run, tx, row))(params, grads)
  specs = PartitionSpec("x"), PartitionSpec(None, "x")
  places = [NamedSharding(mesh, spec) for spec in specs]
  got = jax.shard_map(
    lambda *args: run(tx, row, *args)[0],
    mesh=mesh,
    in_specs=specs,
    out_specs=specs[0],
  )(*jax.device_put((params, grads), tuple(places)))
  suite.close(got, want, row)
