"""What is not finite stays with the queries that see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from tests import quick
from tests.kernels_pallas import attention_ops

QUICK = {"full", "mean"}


@pytest.mark.parametrize("op", quick.cases(attention_ops.CONFINED, QUICK))
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_other_documents_and_earlier_rows_do_not_change(op, implementation):
  arrays = attention_ops.arrays(batch=1)
  run = jax.jit(lambda *args: op(*args, implementation=implementation))
  want = np.asarray(run(*arrays.values()))
  for bad in (np.nan, np.inf, 3e38):
    for at in (3, 8):
      for which in "qkv":
        changed = {**arrays, which: arrays[which].copy()}
        changed[which][0, at] = bad
        got = np.asarray(run(*changed.values()))
        # The other document begins at position 9, within a block.
        np.testing.assert_array_equal(got[0, 9:], want[0, 9:])
        np.testing.assert_allclose(got[0, :at], want[0, :at], atol=1e-6)
        if not np.isfinite(bad):
          # Its own block is exact; others may be dropped.
          assert np.isnan(got[0, at]).any()


@pytest.mark.parametrize(
  "options",
  [
    dict(method="topk", density=0.3),
    dict(method="threshold", tau=1.0),
    dict(method="top_p", top_p=0.4),
    dict(method="topk", density=0.3, covariance_aware=True),
  ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_forced_blocks_are_listed_whatever_the_scores(options, bad):
  rng = np.random.default_rng(0)
  q = rng.normal(size=(1, 40, 2, 4)).astype(np.float32)
  for where in ("q", "k", "both"):
    a, b = q.copy(), q.copy()
    if where != "k":
      a[0, 3] = bad
    if where != "q":
      b[0, 3] = bad
    blocks = kernels_pallas.select_blocks(
      jnp.asarray(a), jnp.asarray(b), block_q=8, block_kv=8, causal=True,
      v=jnp.asarray(b), always=(0,), **options,
    )  # fmt: skip
    indices, counts = map(np.asarray, blocks[:2])
    for head in range(2):
      for row in range(5):
        listed = indices[0, head, row, : counts[0, head, row]]
        assert {0, row} <= set(listed.tolist()), (where, head, row, listed)
        assert listed.max() <= row
