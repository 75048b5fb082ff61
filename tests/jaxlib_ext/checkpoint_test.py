"""What is read back, and what is said of what cannot be."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_ext import checkpoint


class Counted(NamedTuple):
  w: jax.Array
  count: jax.Array | None


def abstract(tree):
  return jax.eval_shape(lambda: tree)


def test_the_latest_that_is_whole(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path)
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoints"):
    checkpoints.latest_readable({})
  for step in (1, 2):
    checkpoints.save(step, {"w": jnp.full(3, step)})
  checkpoints.wait()
  like = abstract({"w": jnp.zeros(3, int)})
  step, state = checkpoints.latest_readable(like)
  assert step == 2
  np.testing.assert_array_equal(state["w"], [2, 2, 2])
  # Damaged: the one before it.
  for path in (tmp_path / "step_2").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(b"")
  step, state = checkpoints.latest_readable(like)
  assert step == 1
  np.testing.assert_array_equal(state["w"], [1, 1, 1])
  # Of another structure: both are named.
  other = abstract({"v": jnp.zeros(3, int), "w": jnp.zeros(3, int)})
  with pytest.raises(checkpoint.CheckpointError, match="step 2: .*step 1: "):
    checkpoints.latest_readable(other)
  checkpoints.close()


def test_an_array_where_there_was_none(tmp_path):
  checkpoints = checkpoint.Checkpointer(tmp_path)
  checkpoints.save(1, {"opt": (Counted(jnp.ones(3), None),)})
  checkpoints.wait()
  like = {"opt": (Counted(jnp.ones(3), jnp.int32(0)),)}
  # With shardings: without, orbax sees for itself.
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )
  with pytest.raises(checkpoint.CheckpointError, match="count': another"):
    checkpoints.restore(1, target)
  checkpoints.close()
