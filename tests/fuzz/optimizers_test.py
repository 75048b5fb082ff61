"""Random trees of parameters: what holds of every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.fuzz import budget
from tests.optim import suite_test
from tests.optim.rows import ROWS

_SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)
_NAMES = st.sampled_from(
  ["q", "o", "bias", "scale", "embed", "lm_head", "conv1d", "a_log", "w1"]
)
_SIZES = st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e6])


@budget.examples(
  8,
  400,
  name=st.sampled_from(sorted(ROWS)),
  shapes=st.dictionaries(_NAMES, _SHAPES, min_size=1, max_size=3),
  size=_SIZES,
  stacked=st.booleans(),
  seed=st.integers(0, 2**16),
)
def test_two_steps(name, shapes, size, stacked, seed):
  """Types and structure are kept, and finite gradients give finite numbers."""
  row = ROWS[name]
  rng = np.random.default_rng(seed)
  tree = {
    key: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for key, shape in shapes.items()
  }
  if stacked:
    tree = {"layers": tree}
  params = row.prepare(tree)
  tx = row.factory(row.rate)
  state = tx.init(params)
  update = jax.jit(suite_test.update_of(tx, row))
  before = suite_test.avals((params, state))
  for i in range(2):
    grads = suite_test.gradients(row.view(params), seed + i)
    grads = jax.tree.map(lambda g: size * g, grads)
    updates, state = update(grads, state, params)
    params = row.apply(params, updates)
    assert suite_test.avals((params, state)) == before
  for x in jax.tree.leaves((row.view(params), state)):
    assert np.all(np.isfinite(np.asarray(x, np.float64)))
