"""Every optimizer in flax's own training loops and files."""

import copy
import inspect
import pickle

import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optim
from jaxlib_ext import quantization
from tests import quick
from tests.optim import suite_test
from tests.optim.rows import ROWS

QUICK = {"muon", "galore", "eco"}
rows = pytest.mark.parametrize("row", quick.cases(ROWS, QUICK))
BY_GRADIENT = {
  name: row
  for name, row in ROWS.items()
  if not row.needs_value and name != "eco"
}


class Model(nnx.Module):
  """Attention, a matrix with a bias, and an embedding."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.embed = nnx.Embed(6, 8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      2, 8, decode=False, use_bias=False, rngs=rngs
    )
    self.lm_head = nnx.Linear(8, 6, rngs=rngs)


def _grads(params, i):
  return jax.tree.map(lambda x: jnp.cos(i + jnp.arange(x.size)).reshape(
    x.shape), params)  # fmt: skip


@pytest.mark.parametrize("row", quick.cases(BY_GRADIENT, {"galore"}))
def test_three_steps_of_nnx_optimizer(row):
  """Equal plain optax on the same arrays, through split and merge."""
  axes = {} if "matrix_axes" not in _arguments(row) else dict(
    matrix_axes=_axes
  )  # fmt: skip
  tx = row.factory(row.rate, **axes)
  model = Model()
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, i):
    grads = _grads(nnx.state(model, nnx.Param), i)
    optimizer.update(model, grads)

  state = tx.init(params)
  update = jax.jit(tx.update)
  for i in range(3):
    step(model, optimizer, jnp.float32(i))
    updates, state = update(_grads(params, i), state, params)
    params = optax.apply_updates(params, updates)
  optimizer = nnx.merge(*nnx.split(optimizer))
  got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  suite_test.close(got, params, row)
  assert int(optimizer.step[...]) == 3


def _arguments(row):
  factory = getattr(row.factory, "func", row.factory)

  return inspect.signature(factory).parameters


def _axes(params):

  return optim.flax_matrix_axes(params)


def _stepped(row):
  """Parameters and state after two steps."""
  params = row.prepare(suite_test.mixed_tree())
  tx = row.factory(row.rate)
  state = tx.init(params)
  grads = suite_test.gradients(row.view(params))
  updates, state = jax.jit(suite_test.update_of(tx, row))(grads, state, params)
  return tx, row.apply(params, updates), state


def _assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


@rows
def test_files_copies_and_named_fields(row, tmp_path):
  tx, params, state = _stepped(row)
  whole = {"params": params, "state": state}
  blank = jax.tree.map(jnp.zeros_like, whole)
  written = flax.serialization.to_bytes(whole)
  _assert_same_bits(flax.serialization.from_bytes(blank, written), whole)
  as_dict = flax.serialization.to_state_dict(whole)
  _assert_same_bits(flax.serialization.from_state_dict(blank, as_dict), whole)
  _assert_same_bits(copy.deepcopy(whole), whole)
  _assert_same_bits(pickle.loads(pickle.dumps(whole)), whole)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "whole", whole)
    checkpointer.wait_until_finished()
    _assert_same_bits(checkpointer.restore(tmp_path / "whole", blank), whole)
  counts = optax.tree_utils.tree_get_all_with_path(state, "count")
  if counts:
    changed = optax.tree_utils.tree_set(state, count=jnp.int32(7))
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    # Of a state that has the field, optax does not look further inside.
    nested = hasattr(state, "count")
    got = optax.tree_utils.tree_get_all_with_path(changed, "count")
    assert all(count == 7 for _, count in got[: 1 if nested else None])


@pytest.mark.parametrize("row", quick.cases(BY_GRADIENT, set()))
def test_train_state(row):
  params = suite_test.mixed_tree()
  tx = row.factory(row.rate)
  train = flax.training.train_state.TrainState.create(
    apply_fn=None, params=params, tx=tx
  )
  step = jax.jit(lambda train, grads: train.apply_gradients(grads=grads))
  state = tx.init(params)
  for i in range(2):
    grads = suite_test.gradients(params, i)
    train = step(train, grads)
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
  suite_test.close(train.params, params, row)


@pytest.mark.parametrize("fmt", ["int8", "int4:8", "e3m2:8", "mxfp4", "nvfp4"])
def test_serialization_of_formats(fmt):
  tree = quantization.quantize_tree({"w": suite_test.normal(0, 32, 6)}, fmt)
  written = flax.serialization.to_bytes(tree)
  blank = jax.tree.map(jnp.zeros_like, tree)
  _assert_same_bits(flax.serialization.from_bytes(blank, written), tree)
  other = quantization.quantize_tree({"w": jnp.zeros((32, 6))}, "float8_e5m2")
  with pytest.raises(ValueError, match="state: a QTensor of format"):
    flax.serialization.from_bytes(other, written)
