"""QZO: codes stay, scales learn; the published formula and its traps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from jaxlib_ext import quantization


def sample(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(fmt="int4:8"):
  return {
    "w": quantization.quantize(sample((2, 16, 3)), fmt),
    "gain": jnp.asarray(sample((3,), 1)),
  }


def distance(goal):
  """Squared distance to parameters of the same codes and other scales."""
  want = quantization.dequantize_tree(goal)

  def value(params):
    got = quantization.dequantize_tree(params)
    return sum(
      jnp.sum(jnp.square(a - b))
      for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)
    )

  return value


def run(tx, params, value_fn, count):
  @jax.jit
  def step(params, state):
    updates, state = tx.update(params, state, params, value_fn=value_fn)
    return optim.apply_updates(params, updates), state

  state, states = tx.init(params), []
  for _ in range(count):
    params, state = step(params, state)
    states.append(state)
  return params, states


def with_scales(params, scales):
  w = params["w"]
  return {
    **params, "w": quantization.QTensor(w.codes, scales, None, w.format)
  }  # fmt: skip


def expanded(param):
  """The scale of each weight, from the codes and the weights, in float64."""
  groups = np.asarray(param.scales, np.float64)
  return np.repeat(groups, param.format.block, axis=-2)


@pytest.mark.parametrize("relative", [False, True])
def test_one_step_is_the_formula(relative):
  """In float64; the direction is read off the update of a slope of one."""
  params, rate, epsilon, decay = model(), 0.02, 1e-2, 0.3
  kwargs = dict(epsilon=epsilon, relative=relative, seed=4)
  goal = with_scales(params, params["w"].scales * 1.3)
  value = distance(goal)
  scales = np.asarray(params["w"].scales, np.float64)
  codes = np.asarray(params["w"].dequantize(), np.float64) / expanded(
    params["w"]
  )
  want = np.asarray(goal["w"].dequantize(), np.float64)

  tx = optim.scale_by_qzo(**kwargs, clip=None)
  got, state = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=value))(
    params, tx.init(params)
  )
  slope = float(state.slopes[0])
  unit = scales if relative else 1.0
  z = np.asarray(got["w"], np.float64) / slope / unit
  loss = lambda s: np.sum((codes * np.repeat(s, 8, axis=-2) - want) ** 2)
  d = (
    loss(scales + epsilon * unit * z) - loss(scales - epsilon * unit * z)
  ) / (2 * epsilon)
  # Losses of about 5, rounded to 2^-24 of that and divided by 1e-2.
  assert slope == pytest.approx(d, abs=3e-4)
  assert np.all(np.asarray(got["gain"]) == 0)

  tx = optim.qzo(rate, **kwargs, clip=None, weight_decay=decay)
  after, _ = run(tx, params, value, 1)
  stepped = np.maximum(scales - rate * (unit * d * z + decay * scales), 0)
  np.testing.assert_allclose(after["w"].scales, stepped, atol=1e-5)
  np.testing.assert_array_equal(after["w"].codes, params["w"].codes)
  np.testing.assert_array_equal(after["gain"], params["gain"])


@pytest.mark.parametrize("kwargs, rate", [
  (dict(num_samples=8), 4e-3),
  (dict(num_samples=8, relative=True, train_unquantized=True), 2e-2),
], ids=["scales", "all"])  # fmt: skip
def test_converges_to_other_scales(kwargs, rate):
  params = model()
  factors = np.exp(0.2 * sample(params["w"].scales.shape, 3))
  goal = with_scales(params, params["w"].scales * factors)
  if "train_unquantized" in kwargs:
    goal["gain"] = goal["gain"] + 0.5
  value = distance(goal)
  tx = optim.qzo(optax.cosine_decay_schedule(rate, 300), **kwargs)
  after, _ = run(tx, params, value, 300)
  assert value(after) < 0.02 * value(params)
  np.testing.assert_array_equal(after["w"].codes, params["w"].codes)


def test_slopes_are_clipped():
  params = model()
  steep = lambda p: (
    1e6 * distance(with_scales(params, params["w"].scales * 2))(p)
  )
  _, states = run(optim.qzo(0.0, num_samples=4), params, steep, 2)
  slopes = np.abs(np.stack([s[0].slopes for s in states]))
  assert np.all(slopes == 100)
  _, states = run(optim.qzo(0.0, clip=None), params, steep, 1)
  assert abs(float(states[0][0].slopes[0])) > 1e4


def test_scales_do_not_change_their_sign():
  params = model()
  after, _ = run(
    optim.qzo(1.0), params, lambda p: 1e3 * jnp.sum(p["w"].scales), 1
  )
  scales = np.asarray(after["w"].scales)
  # About half of the steps of size 100 |z| go down, to exactly zero.
  assert np.all(scales >= 0)
  assert 0.1 < np.mean(scales == 0) < 0.9


def test_bad_input_is_named():
  for kwargs, words in (
    (dict(clip=0.0), "clip must be positive"),
    (dict(epsilon=-1.0), "epsilon must be positive"),
    (dict(learning_rate=-1.0), "learning_rate must be at least 0"),
  ):
    with pytest.raises(ValueError, match=words):
      optim.qzo(**{"learning_rate": 0.1, **kwargs})
  tx = optim.qzo(0.1)
  with pytest.raises(ValueError, match="there are none; pass the parameters"):
    tx.init({"w": jnp.ones((2, 2))})
  for fmt in ("mxfp4", "nvfp4"):
    with pytest.raises(ValueError, match="the leaf 'w' has scales of float8"):
      tx.init(model(fmt))
  both = {**model(), "ids": jnp.zeros((2,), jnp.int32)}
  tx.init(both)
  with pytest.raises(ValueError, match="the leaf 'ids' is of the dtype int32"):
    optim.qzo(0.1, train_unquantized=True).init(both)
  with pytest.raises(ValueError, match="value_fn: the update needs the loss"):
    tx.update(model(), tx.init(model()), model())
