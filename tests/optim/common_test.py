"""What optax's own tables ask of an optimizer beyond `suite_test`."""

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
