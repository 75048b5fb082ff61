"""What optax's own tables ask of an optimizer beyond `suite_test`.

They are those of its aliases and of `optax.contrib`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from tests import quick
from tests.optim import suite_test
from tests.optim.rows import ROWS

rows = pytest.mark.parametrize("row", quick.cases(ROWS, suite_test.QUICK))


@rows
def test_unknown_arguments_schedules_and_conditions(row):
  """A constant schedule is its number; states are stable in `lax.cond`."""
  params = row.prepare(suite_test.mixed_tree())
  grads = suite_test.gradients(row.view(params))

  def value(params):
    leaves = jax.tree.leaves(row.view(params))
    return sum(jnp.sum(x, dtype=jnp.float32) for x in leaves)

  extra_args = {"value_fn": value} if row.needs_value else {}
  after = []
  for rate in (row.rate, optax.constant_schedule(row.rate)):
    tx = row.factory(rate)

    @jax.jit
    def step(due, state, params, tx=tx):
      def take(state):
        updates, state = tx.update(
          grads, state, params, unexpected=1, **extra_args
        )
        return row.apply(params, updates), state

      return jax.lax.cond(due, take, lambda state: (params, state), state)

    state = tx.init(params)
    same, kept = step(False, state, params)
    suite_test.close(row.view(same), row.view(params), row, scale=0)
    assert suite_test.avals(kept) == suite_test.avals(state)
    after.append(row.view(step(True, state, params)[0]))
  suite_test.close(*after, row)


@rows
def test_rosenbrock(row):
  """A curved valley of two numbers, a vector to every method."""
  if not row.everywhere or row.needs_value:
    pytest.skip("random directions: the largest curvature, 802, sets the rate")

  def loss(params):
    a, b = params["x"]
    return 100 * (b - a**2) ** 2 + (1 - a) ** 2

  params = row.prepare({"x": jnp.array([-1.0, 1.0])})
  tx = row.factory(optax.cosine_decay_schedule(row.rate, 2000))

  def step(_, carry):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(row.view(params)), state, params)
    return row.apply(params, updates), state

  run = jax.jit(lambda carry: jax.lax.fori_loop(0, 2000, step, carry))
  params, _ = run((params, tx.init(params)))
  assert loss(row.view(params)) < 0.01 * 4


@rows
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_updates_and_states(row, dtype):
  """Also of a tree that has no matrix; only types are computed."""
  if row.quantized and dtype != "float32":
    pytest.skip("it holds codes")
  with jax.enable_x64(dtype == "float64"):
    for params in (
      {"x": jnp.ones(3, dtype)},
      {"w": jnp.ones((3, 4), dtype), "b": jnp.ones(4, dtype)},
    ):
      params = row.prepare(params)
      tx = row.factory(row.rate)

      def two(params, tx=tx):
        grads = jax.tree.map(jnp.ones_like, row.view(params))
        state = tx.init(params)
        update = suite_test.update_of(tx, row)
        updates, after = update(grads, state, params)
        return state, after, row.apply(params, updates)

      state, after, new = jax.eval_shape(two, params)
      assert suite_test.avals(after) == suite_test.avals(state)
      assert suite_test.avals(new) == suite_test.avals(params)


@rows
def test_states_under_inject_hyperparams(row):
  params = row.prepare(suite_test.mixed_tree())
  tx = row.factory(row.rate)
  inject = optax.inject_hyperparams(row.factory, row.static_args)
  injected = inject(learning_rate=row.rate)
  grads = suite_test.gradients(row.view(params))
  run = lambda tx: jax.jit(suite_test.update_of(tx, row))(
    grads, tx.init(params), params
  )[1]
  got, want = run(injected).inner_state, run(tx)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert suite_test.avals(got) == suite_test.avals(want)
