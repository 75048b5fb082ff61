"""Every optimizer's state in what keeps, copies and edits states."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training import train_state

import optim
from jaxlib_ext import quantization
from tests import quick
from tests.optim import suite_test
from tests.optim.rows import ROWS

rows = pytest.mark.parametrize("row", quick.cases(ROWS, suite_test.QUICK))
# Those that take arrays, and no function of the loss.
BY_GRADIENT = {
  name: row
  for name, row in ROWS.items()
  if not row.needs_value and name != "eco"
}
UNEQUAL = ("galore", "q_galore", "apollo", "fira", "frugal", "dion")


def same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@rows
def test_states_are_kept_bit_for_bit(row, tmp_path):
  tx = row.factory(row.rate)
  start = tx.init(row.prepare(suite_test.mixed_tree()))
  state = jax.tree.map(
    lambda x: (jnp.arange(x.size).reshape(x.shape) % 3 + 1).astype(x.dtype),
    start,
  )
  same_bits(
    serialization.from_bytes(start, serialization.to_bytes(state)), state
  )
  as_dict = serialization.to_state_dict(state)
  same_bits(serialization.from_state_dict(start, as_dict), state)
  same_bits(copy.deepcopy(state), state)
  same_bits(pickle.loads(pickle.dumps(state)), state)
  same_bits(optax.tree.map_params(tx, lambda x: x, state), state)
  if optax.tree.get_all_with_path(state, "count"):
    counted = optax.tree.set(state, count=jnp.int32(7))
    assert jax.tree.structure(counted) == jax.tree.structure(state)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    like = jax.eval_shape(lambda: start)
    same_bits(checkpointer.restore(tmp_path / "state", like), state)


@pytest.mark.parametrize("row", quick.cases(BY_GRADIENT, set()))
def test_train_state(row):
  """Two steps of linen's training state are two of plain optax."""
  params = suite_test.mixed_tree()
  tx = row.factory(row.rate)
  train = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
  step = jax.jit(lambda train, grads: train.apply_gradients(grads=grads))
  state, update = tx.init(params), jax.jit(tx.update)
  for i in range(2):
    grads = suite_test.gradients(params, i)
    train = step(train, grads)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  suite_test.close(train.params, params, row)


def three_steps(tx, model, row, **extra_args):
  """By `nnx.Optimizer` under `nnx.jit`, against plain optax on the arrays."""
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  held = nnx.Optimizer(model, tx, wrt=nnx.Param)
  before = jax.tree.structure(nnx.as_pure(held.opt_state))

  @nnx.jit
  def step(model, held, grads):
    held.update(model, grads, **extra_args)

  update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra_args))
  state = tx.init(params)
  for i in range(3):
    grads = suite_test.gradients(nnx.state(model, nnx.Param), 10 * i)
    step(model, held, grads)
    updates, state = update(nnx.to_pure_dict(grads), state, params)
    params = optax.apply_updates(params, updates)
  assert jax.tree.structure(nnx.as_pure(held.opt_state)) == before
  merged = nnx.merge(*nnx.split(held))
  same_bits(nnx.state(merged), nnx.state(held))
  got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  suite_test.close(got, params, row)


class Net(nnx.Module):
  """Attention and a linear layer."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs)
    self.out = nnx.Linear(8, 6, rngs=rngs)


@rows
def test_nnx_optimizer(row):
  if row.quantized:
    pytest.skip("nnx.Optimizer adds updates, which QTensors' are not")
  value = lambda p: sum(jnp.sum(x * x) for x in jax.tree.leaves(p))
  extra_args = {"value_fn": value} if row.needs_value else {}
  three_steps(row.factory(1e-2), Net(), row, **extra_args)


@pytest.mark.parametrize("name", UNEQUAL)
def test_nnx_optimizer_with_unequal_blocks(name):
  axes = optim.MatrixAxes(output_blocks=(3, 2, 1))
  tx = getattr(optim, name)(
    1e-2, matrix_axes=lambda p: jax.tree.map(lambda _: axes, p)
  )
  three_steps(tx, nnx.Linear(8, 6, rngs=nnx.Rngs(0)), ROWS[name])


def test_quantized_nnx_models():
  graph, params, rest = nnx.split(Net(), nnx.Param, ...)
  params = quantization.quantize_tree(params, "int8")
  tx = optim.eco(1e-2)
  state = tx.init(params)
  for _ in range(2):
    grads = jax.tree.map(jnp.ones_like, quantization.dequantize_tree(params))
    updates, state = tx.update(grads, state, params)
    with pytest.raises(ValueError, match=r"optim\.apply_updates puts"):
      optax.apply_updates(params, updates)
    params = optim.apply_updates(params, updates)
  exported = optim.eco_flush(params, state)
  model = nnx.merge(graph, quantization.dequantize_tree(exported), rest)
  assert model.out.kernel.shape == (8, 6)
  held = nnx.Optimizer(nnx.merge(graph, params, rest), tx, wrt=nnx.Param)
  with pytest.raises(ValueError, match=r"optim\.apply_updates puts"):
    held.update(nnx.merge(graph, params, rest), grads)
