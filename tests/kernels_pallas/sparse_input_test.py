"""Bad arguments of block-sparse attention raise, and name themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from tests.kernels_pallas import sparse_cases as cases

CASE = cases.Case(t=48, s=48)


def lists(indices, counts):
  """The same list everywhere."""
  shape = (CASE.b, CASE.h, CASE.num_q)
  indices = jnp.broadcast_to(jnp.asarray(indices), (*shape, len(indices)))
  return kernels_pallas.BlockIndices(indices, jnp.full(shape, counts))


def call(**options):
  args = cases.make(CASE, dtype=np.float32)
  args.pop("sinks")
  return kernels_pallas.block_sparse_attention(**(args | options))


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(blocks=lists([0, 0], 2)), "must not repeat a block.*0 twice"),
    (dict(blocks=lists([0, 3], 2)), "from 0 to NK - 1 = 2, got 3"),
    (dict(blocks=lists([-1], 1)), "got -1"),
    (dict(blocks=lists([0, 1], 0)), "counts must be from 1 to M = 2, got 0"),
    (dict(blocks=lists([0, 1], 3)), "got 3"),
    (dict(blocks=lists([0, 1, 2, 0], 1)), "1 to NK = 3 blocks, got M = 4"),
    (dict(block_q=32), r"blocks.indices must have the shape .* = \[2, 4, 2\]"),
    (dict(block_q=0), "block_q must be an int of at least 1, got 0"),
    (dict(block_kv=1.5), "block_kv"),
    (dict(tail="median"), "tail must be one of .*'median'"),
    (dict(causal=True, q=jnp.ones((2, 40, 4, 12))), "T = 40 and S = 48"),
    (dict(segment_ids=jnp.zeros((2, 3), int)), "segment_ids must have the"),
    (
      dict(segment_ids=jnp.zeros((2, 48), int), tail="mean_global"),
      "mean_global.*segment_ids",
    ),
    (dict(sinks=jnp.ones(3)), r"sinks must have the shape \[H\] = \[4\]"),
    (dict(q=jnp.ones((2, 48, 3, 12))), "multiple of k's and v's 2 heads"),
    (dict(k=jnp.ones((2, 48, 2, 11))), "k must have .* K = 12"),
    (dict(v=jnp.ones((2, 47, 2, 12))), "v must have the shape"),
    (dict(q=jnp.ones((48, 4, 12))), "q must have the shape"),
    (dict(v=jnp.ones((2, 48, 2, 257))), "at most 256"),
    (dict(implementation="cuda"), "implementation must be None or one or"),
  ),
)
def test_values(options, message):
  with pytest.raises(ValueError, match=message):
    call(**options)


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(blocks=jnp.zeros((2, 4, 3, 1), int)), "blocks must be a Block"),
    (dict(blocks=(jnp.zeros((2, 4, 3, 1)), jnp.ones((2, 4, 3)))), "integers"),
    (dict(q=jnp.ones((2, 48, 4, 12), int)), "q must be floating"),
    (dict(segment_ids=jnp.zeros((2, 48))), "segment_ids must be integers"),
    (dict(scale="1"), "scale must be a Python number"),
  ),
)
def test_types(options, message):
  with pytest.raises(TypeError, match=message):
    call(**options)


def test_padding_of_lists_means_nothing():
  """What follows a list's count may be anything, even out of range."""
  with jax.enable_x64(True):
    args = cases.make(CASE)
    for implementation in ("reference", "xla"):
      outs = [
        cases.run(args | dict(blocks=lists(x, 1)), "mean", implementation)
        for x in ([1, 1], [1, 0], [1, 77])
      ]
      for other in outs[1:]:
        jax.tree.map(np.testing.assert_array_equal, outs[0], other)
