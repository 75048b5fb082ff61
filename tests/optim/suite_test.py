"""What every optimizer must do.

A new one joins by a row in `tests.optim.rows`. Compiling takes most of the
time here, so the compiler is told not to optimise and random numbers are
NumPy's.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlib_ext import labels, sharding
from tests import quick
from tests.optim.rows import ROWS

# One of each kind of assembly and of state is enough for a second interpreter.
QUICK = {
  "muon",
  "column_normalized_sgd",
  "galore",
  "spam_sparse",
  "mezo",
  "eco",
}
rows = pytest.mark.parametrize("row", quick.cases(ROWS, QUICK))


def normal(seed, *shape):
  sample = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(sample, jnp.float32)


def mixed_tree(dtype=jnp.float32):
  tree = {
    "embed": {"table": normal(0, 16, 8)},
    "layers": {
      "up": normal(1, 2, 8, 16),
      "down": normal(2, 2, 16, 8),
      "norm": {"scale": 1 + 0.1 * normal(3, 2, 8)},
      "bias": normal(4, 2, 8),
    },
    "lm_head": normal(5, 8, 16),
    "gain": normal(6),
  }
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def gradients(params, seed=10):
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten(
    [normal(seed + i, *x.shape).astype(x.dtype) for i, x in enumerate(leaves)]
  )


def avals(tree):
  return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def close(got, want, row, scale=1.0):
  """Within a few roundings of the largest entry of each leaf."""

  def check(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    bound = 32 * row.rounding * scale * max(np.abs(b).max(initial=0), 1e-30)
    np.testing.assert_allclose(a, b, rtol=0, atol=bound)

  jax.tree.map(check, got, want)


def update_of(tx, row):
  """`tx.update` of gradients, or of a linear loss that has these."""

  def update(grads, state, params):
    if not row.needs_value:
      return tx.update(grads, state, params)

    def value(params):
      pairs = zip(*map(jax.tree.leaves, (row.view(params), grads)), strict=True)
      return sum(jnp.sum(p * g, dtype=jnp.float32) for p, g in pairs)

    return tx.update(grads, state, params, value_fn=value)

  return update


def steps(tx, row, params, count=2):
  """Applies `count` updates of differing gradients, jitted."""
  state = tx.init(params)
  update = jax.jit(update_of(tx, row))
  for i in range(count):
    updates, state = update(gradients(row.view(params), i), state, params)
    params = row.apply(params, updates)
  return params, state


def _matrix_target():
  goal = normal(7, 6, 10)
  return {"w": jnp.zeros((6, 10))}, lambda p: jnp.sum((p["w"] - goal) ** 2)


def _regression_target():
  x, weights = normal(8, 32, 6), normal(9, 6, 4)
  return (
    {"w": jnp.zeros((6, 4)), "b": jnp.ones((4,))},
    lambda p: jnp.mean((x @ p["w"] + p["b"] - x @ weights) ** 2),
  )


def _mixed_target():
  goal = mixed_tree()
  return (
    jax.tree.map(lambda x: x + 1, goal),
    lambda p: sum(
      jnp.sum((a - b) ** 2)
      for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(goal), strict=True)
    ),
  )


@rows
@pytest.mark.parametrize(
  "target", [_matrix_target, _regression_target, _mixed_target]
)
def test_converges(row, target):
  if not row.everywhere:
    pytest.skip("the goal is out of its reach; its own tests have one that is")
  start, loss = target()
  params = row.prepare(start)
  tx = row.factory(optax.cosine_decay_schedule(row.rate, 300))

  def step(_, carry):
    params, state = carry
    if row.needs_value:
      value = lambda p: loss(row.view(p))
      updates, state = tx.update(params, state, params, value_fn=value)
    else:
      grads = jax.grad(loss)(row.view(params))
      updates, state = tx.update(grads, state, params)
    return row.apply(params, updates), state

  run = jax.jit(lambda carry: jax.lax.fori_loop(0, 300, step, carry))
  params, _ = run((params, tx.init(params)))
  assert loss(row.view(params)) < row.remaining * loss(start)


@rows
def test_zero_and_tiny_gradients(row):
  params = row.prepare(mixed_tree())
  tx = row.factory(row.rate)
  update = jax.jit(update_of(tx, row))
  for size in (0.0, 1e-30):
    grads = jax.tree.map(lambda g, s=size: g * s, gradients(row.view(params)))
    updates, state = update(grads, tx.init(params), params)
    after = row.apply(params, updates)
    for x in jax.tree.leaves((row.view(after), state)):
      assert np.all(np.isfinite(np.asarray(x, np.float32)))
    if size == 0:
      close(row.view(after), row.view(params), row, scale=0)


@rows
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_seen(row, bad):
  if row.needs_value:
    pytest.skip("a loss has no place: all updates show it")
  params = row.prepare(mixed_tree())
  tx = row.factory(row.rate)
  state, grads = tx.init(params), gradients(row.view(params))
  update = jax.jit(update_of(tx, row))
  # At the first step and at a later one, in either layer.
  for layer in range(2):
    place = layer if row.sparse else (layer, 1, 2)
    up = grads["layers"]["up"].at[place].set(bad)
    layers = {**grads["layers"], "up": up}
    updates, _ = update({**grads, "layers": layers}, state, params)
    new = row.view(row.apply(params, updates))
    assert not np.all(np.isfinite(new["layers"]["up"][layer]))
    np.testing.assert_array_equal(np.isfinite(new["lm_head"]), True)
    _, state = update(grads, state, params)


@rows
def test_no_gradient_without_an_epsilon(row):
  names = inspect.signature(row.factory).parameters
  eps = {k: 0.0 for k in ("eps", "vector_eps") if k in names}
  if not eps:
    pytest.skip("it has no epsilon")
  params = row.prepare(mixed_tree())
  tx = row.factory(row.rate, **eps)
  zeros = jax.tree.map(jnp.zeros_like, row.view(params))
  state = tx.init(params)
  updates, _ = jax.jit(update_of(tx, row))(zeros, state, params)
  close(row.view(row.apply(params, updates)), row.view(params), row, scale=0)


@rows
def test_odd_shapes(row):
  shapes = [(1, 7), (7, 1), (1, 1), (3, 5, 2), (2, 3, 4, 5), (13, 3)]
  tree = {f"w{i}": normal(i, *shape) for i, shape in enumerate(shapes)}
  params = row.prepare({**tree, "b": normal(len(shapes), 7)})
  after, _ = steps(row.factory(row.rate), row, params)
  assert avals(after) == avals(params)
  for x in jax.tree.leaves(row.view(after)):
    assert np.all(np.isfinite(x))


@rows
def test_dtypes_are_kept_and_nothing_recompiles(row):
  for dtype in row.dtypes:
    params = row.prepare(mixed_tree(dtype))
    tx = row.factory(row.rate)
    state = tx.init(params)
    traces = 0

    @jax.jit
    def step(params, state, tx=tx):
      nonlocal traces
      traces += 1
      grads = gradients(row.view(params))
      updates, state = update_of(tx, row)(grads, state, params)
      return row.apply(params, updates), state

    before = avals((params, state))
    for _ in range(2):
      params, state = step(params, state)
      assert avals((params, state)) == before
    assert traces == 1


def _sharded(tree):
  """Divides the last two axes of each leaf over a 2 × 4 mesh."""
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

  def put(x):
    if x.ndim < 2 or x.shape[-2] % 2 or x.shape[-1] % 4:
      spec = PartitionSpec()
    else:
      spec = PartitionSpec(*(None,) * (x.ndim - 2), "a", "b")
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(put, tree)


def _layout(tx, params):
  """Shardings of the parameters' arrays and of the state's."""
  per_param = jax.tree.map(
    lambda p: jax.tree.leaves(p)[0].sharding, params, is_leaf=labels.is_param
  )
  return (
    jax.tree.map(lambda x: x.sharding, params),
    sharding.state_shardings(tx, params, per_param),
  )


@rows
def test_sharded_equals_unsharded(row):
  params = row.prepare(mixed_tree())
  tx = row.factory(row.rate)
  split = _sharded(params)
  layout = _layout(tx, split)
  state = jax.jit(tx.init, out_shardings=layout[1])(split)

  @functools.partial(jax.jit, out_shardings=layout)
  def step(params, state, grads):
    updates, state = update_of(tx, row)(grads, state, params)
    return row.apply(params, updates), state

  got = split
  for i in range(2):
    got, state = step(got, state, _sharded(gradients(row.view(params), i)))
  want, want_state = steps(tx, row, params)
  assert jax.tree.structure(state) == jax.tree.structure(want_state)
  assert avals((got, state)) == avals((want, want_state))
  close(row.view(got), row.view(want), row)


@rows
def test_an_update_keeps_the_states_types_and_shardings(row):
  params = _sharded(row.prepare(mixed_tree()))
  tx = row.factory(row.rate)
  where = _layout(tx, params)[1]
  state = jax.jit(tx.init, out_shardings=where)(params)
  grads = _sharded(gradients(row.view(params)))
  _, after = jax.jit(update_of(tx, row))(grads, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert avals(after) == avals(state)
  for old, new in zip(*map(jax.tree.leaves, (state, after)), strict=True):
    # Where a small array that steers others ends up is the compiler's choice.
    assert old.ndim < 2 or old.sharding.is_equivalent_to(new.sharding, old.ndim)


@rows
def test_inside_chain_and_inject_hyperparams(row):
  params = row.prepare(mixed_tree())
  want, _ = steps(row.factory(row.rate), row, params)
  chained = optax.chain(optax.clip_by_global_norm(1e9), row.factory(row.rate))
  close(row.view(steps(chained, row, params)[0]), row.view(want), row)
  inject = optax.inject_hyperparams(row.factory, row.static_args)
  injected = inject(learning_rate=row.rate)
  got, state = steps(injected, row, params)
  close(row.view(got), row.view(want), row)
  assert state.hyperparams["learning_rate"] == np.float32(row.rate)


@rows
def test_inside_multi_steps(row):
  if row.quantized:
    pytest.skip("MultiSteps accumulates in the parameters' own number format")
  params = row.prepare(mixed_tree())
  tx = row.factory(row.rate)
  grads = gradients(row.view(params))
  updates, _ = jax.jit(update_of(tx, row))(grads, tx.init(params), params)
  want = row.apply(params, updates)
  multi = optax.MultiSteps(row.factory(row.rate), every_k_schedule=2)
  state, got = multi.init(params), params
  update = jax.jit(update_of(multi, row))
  # MultiSteps averages gradients; of losses it hands on the last.
  for factor in (1.0, 1.0) if row.needs_value else (0.5, 1.5):
    g = jax.tree.map(lambda x, f=factor: f * x, grads)
    updates, state = update(g, state, got)
    got = row.apply(got, updates)
  close(row.view(got), row.view(want), row)


@rows
def test_inside_masked(row):
  if row.needs_value:
    pytest.skip("a slope along all leaves; its own tests mask some")
  params = row.prepare(mixed_tree())
  keep = {"embed": False, "layers": True, "lm_head": False, "gain": True}
  grads = gradients(row.view(params))
  masked = optax.masked(row.factory(row.rate), keep)
  plain = row.factory(row.rate)
  got, _ = jax.jit(masked.update)(grads, masked.init(params), params)
  want, _ = jax.jit(plain.update)(grads, plain.init(params), params)
  close(got["embed"], grads["embed"], row, scale=0)
  close(got["layers"], want["layers"], row)
