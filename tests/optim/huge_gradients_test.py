"""One huge finite gradient leaves every method finite and moving."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim
from tests.optim import suite_test
from tests.optim.rows import ROWS

SIZES = (1e10, 2e19, 1e25, 1e30, 3e38)


def with_entry(grads, value):
  return jax.tree.map(lambda g: g.at[0, 2, 3].set(value), grads)


@pytest.mark.parametrize(
  "name", [name for name, row in ROWS.items() if not row.needs_value]
)
def test_one_huge_gradient(name):
  row = ROWS[name]
  tree = {"layers": {"kernel": suite_test.normal(0, 2, 8, 16)}}
  params = row.prepare(tree)
  tx = row.factory(row.rate)
  update = jax.jit(suite_test.update_of(tx, row))
  ordinary = suite_test.gradients(row.view(params))
  for size in SIZES:
    now, state = params, tx.init(params)
    for i in range(4):
      grads = ordinary
      if i == 1:
        grads = with_entry(ordinary, -size)
      updates, state = update(grads, state, now)
      before, now = row.view(now), row.apply(now, updates)
      for x in jax.tree.leaves((row.view(now), state)):
        assert np.all(np.isfinite(np.asarray(x, np.float32))), (size, i)
      if row.quantized and i > 1:
        continue  # A small step may not move a code.
      # The direction survives even while Adam-like moments make it small.
      out = jax.tree.leaves(updates)[0]
      moved = out if not row.quantized else before["layers"]["kernel"]
      assert np.any(np.asarray(moved, np.float32) != 0), (size, i)
  # What is not finite is not hidden.
  bad = jax.tree.map(lambda g: g.at[0].set(jnp.inf), ordinary)
  updates, state = update(bad, tx.init(params), params)
  after = jax.tree.leaves((row.view(row.apply(params, updates)), state))
  assert not all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in after)


@pytest.mark.parametrize(
  "factory",
  [
    functools.partial(optim.galore, rank=4),
    functools.partial(optim.fira, rank=4, growth_limit=None),
    functools.partial(optim.apollo, rank=4, growth_limit=None),
    functools.partial(optim.apollo_mini, growth_limit=None),
    functools.partial(optim.spam, reset_every=0, threshold=0.0),
  ],
)
def test_ordinary_steps_after_the_memory(factory):
  # b2^n 2^96 is below a hundredth of an ordinary square after
  # (96 ln 2 + ln 100) / ln(1 / 0.9) = 675 steps, as the docstrings say.
  tx = factory(0.1, b1=0.5, b2=0.9, eps=1e-8)
  params = {"layers": {"kernel": suite_test.normal(0, 1, 8, 6)}}
  grads = suite_test.gradients(params)

  @jax.jit
  def run(value):
    _, state = tx.update(with_entry(grads, value), tx.init(params), params)
    step = lambda state, _: tx.update(grads, state, params)[::-1]
    _, updates = jax.lax.scan(step, state, length=700)
    return updates["layers"]["kernel"]

  got, want = run(3e38), run(grads["layers"]["kernel"][0, 2, 3])
  sizes = [
    np.linalg.norm(np.reshape(x, (700, -1)), axis=1) for x in (got, want)
  ]
  assert np.all(sizes[0] > 0)
  # A basis may be of the huge gradient until the next refresh.
  assert 0.5 < sizes[0][-1] / sizes[1][-1] < 2
