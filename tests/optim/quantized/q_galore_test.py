"""Q-GaLore: its lazy subspaces, 8-bit moments, 8-bit weights, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import optim
from jaxlib_ext import quantization
from optim.low_rank import projection

pytestmark = pytest.mark.slow


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rank_one(seed, first):
  """A matrix [6, 9] whose leading left singular vector is a unit vector."""
  g = 0.01 * normal(seed, 6, 9)
  g[first] += 3
  return jnp.asarray(g)


def run(tx, grads, params=None):
  params = jax.tree.map(jnp.zeros_like, grads[0]) if params is None else params
  state, update, out = tx.init(params), jax.jit(tx.update), []
  for g in grads:
    updates, state = update(g, state, params)
    out.append(updates)
  return out, state


class LazySubspaceTest(parameterized.TestCase):
  def refreshes(self, grads, **kwargs):
    """The steps in which a subspace was computed, and the last state."""
    done, original = [], projection._leading

    def counting(x, rank, kind):
      jax.debug.callback(lambda: done.append(1))
      return original(x, rank, kind)

    projection._leading = counting
    try:
      tx = optim.scale_by_q_galore(rank=2, **kwargs)
      state, update, counts = tx.init(grads[0]), jax.jit(tx.update), []
      for g in grads:
        _, state = update(g, state)
        jax.effects_barrier()
        counts.append(len(done))
    finally:
      projection._leading = original
    return np.diff([0, *counts]).tolist(), state

  def test_intervals_double_where_the_subspace_stays(self):
    # The first singular vector of one layer stays, but for its sign; that of
    # the other turns by a right angle each time.
    grads = [
      {"w": jnp.stack([(-1) ** t * rank_one(t, 2), rank_one(t, (t // 2) % 2)])}
      for t in range(21)
    ]
    counts, state = self.refreshes(grads, update_interval=2)
    # Both at 0, 2, ..., 10, when the fifth cosine arrives; then one every 2
    # steps and the other after 4 and 8.
    want = [2 * (t % 2 == 0) for t in range(11)]
    want += [int(t % 2 == 0) + (t == 14) for t in range(11, 21)]
    self.assertEqual(counts, want)
    np.testing.assert_array_equal(state.interval["w"], [8, 2])
    np.testing.assert_array_equal(state.wait["w"], [1, 1])
    agreement = state.agreement["w"][..., 0]
    # The stored vector is a 4-bit one.
    self.assertGreater(agreement[0].min(), 0.9)
    self.assertLess(agreement[1].max(), 0.4)

  def test_each_leaf_has_its_own_subspace(self):
    grads = {"a": rank_one(0, 1), "b": rank_one(1, 4).T}
    _, state = run(optim.scale_by_q_galore(rank=1), [grads])
    a, b = (floats(state.projector, k, "int4:256") for k in "ab")
    self.assertEqual((int(jnp.argmax(jnp.abs(a))), a.shape), (1, (6, 1)))
    self.assertEqual((int(jnp.argmax(jnp.abs(b))), b.shape), (4, (1, 6)))


def floats(held, name, fmt="float8_e4m3fn:256"):
  """What a leaf's codes and scales in a state stand for."""
  fmt = quantization.Format.parse(fmt)
  parts = held.codes[name], held.scales[name], None, fmt
  return quantization.QTensor(*parts).dequantize()


class MomentsTest(absltest.TestCase):
  def test_directions_are_near_those_of_galore(self):
    grads = [
      {"w": jnp.asarray(normal(0, 24, 40) + 0.3 * normal(t, 24, 40))}
      for t in range(4)
    ]
    got, _ = run(optim.scale_by_q_galore(rank=8), grads)
    want, _ = run(optim.scale_by_galore(rank=8), grads)
    for a, b in zip(got, want, strict=True):
      a, b = np.ravel(a["w"]), np.ravel(b["w"])
      cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      # The 4-bit basis is off by about an eighth, codes of 8 bits by a
      # thirtieth; signs of small entries of the first step may differ.
      self.assertGreater(cosine, 0.95)

  def test_averages_are_unbiased(self):
    # Each step changes the second moment by less than its code's precision.
    g = {"w": jnp.asarray(np.sign(normal(0, 64, 64)))}
    tx = optim.scale_by_q_galore(rank=1.0, b2=0.99)
    update, state, steps = jax.jit(tx.update), tx.init(g), 150
    for _ in range(steps):
      _, state = update(g, state)
    low = floats(state.projector, "w", "int4:256").T @ g["w"]
    want = jnp.sqrt((1 - 0.99**steps) * jnp.mean(low * low))
    root = floats(state.root, "w")
    # 4096 entries of a relative spread of some percent.
    np.testing.assert_allclose(
      jnp.sqrt(jnp.mean(root * root)) / want, 1, atol=0.02
    )
    np.testing.assert_allclose(
      jnp.vdot(floats(state.mu, "w"), low) / jnp.vdot(low, low),
      1,
      atol=0.01,
    )

  def test_no_second_moment_is_lost(self):
    # A column of each size: the format's range is 2^18.
    size = 10.0 ** -np.arange(12)
    g = {"w": jnp.asarray(normal(0, 4, 12) * size, jnp.float32)}
    out, state = run(optim.scale_by_q_galore(rank=4, eps=0.0), [g, g])
    self.assertTrue(np.all(np.float32(state.root.codes["w"]) > 0))
    for u in out:
      self.assertLess(np.abs(u["w"]).max(), 1.0)

  def test_zero_gradients_give_zero_updates(self):
    g = {"w": jnp.zeros((4, 6))}
    tx = optim.scale_by_q_galore(rank=2)
    update, state = jax.jit(tx.update, donate_argnums=1), tx.init(g)
    for _ in range(2):
      out, state = update(g, state)
    np.testing.assert_array_equal(out["w"], 0)
    np.testing.assert_array_equal(np.float32(state.root.codes["w"]), 0)


class WeightsTest(absltest.TestCase):
  def make(self, fmt="int8:256"):
    w = jnp.asarray(normal(0, 2, 16, 24))
    params = quantization.quantize_tree({"w": w, "gain": jnp.ones(3)}, fmt)
    grads = {"w": jnp.asarray(normal(1, 2, 16, 24)), "gain": jnp.ones(3)}
    return params, grads

  def test_new_weights_are_the_sum_rounded_to_a_neighbour(self):
    params, grads = self.make()
    tx = optim.q_galore(0.3, rank=4, weight_decay=0.1)
    (updates,), _ = run(tx, [grads], params)
    new = optim.apply_updates(params, updates)
    self.assertEqual(new["w"].format, params["w"].format)
    self.assertEqual(updates["gain"].shape, (3,))
    view = quantization.dequantize_tree(params)
    (exact,), _ = run(tx, [grads], view)
    want = view["w"] + exact["w"]
    self.assertEqual(exact["w"].dtype, jnp.float32)
    error = new["w"].dequantize() - want
    step = jnp.max(jnp.abs(want), axis=-2, keepdims=True) / 127
    self.assertLess(float(jnp.max(jnp.abs(error) / step)), 1.001)
    self.assertGreater(float(jnp.mean(jnp.abs(error) / step)), 0.1)

  def test_rounding_is_unbiased(self):
    # Updates of a twentieth of a grid step move the mean weight all the same.
    params, grads = self.make()
    grads["gain"] *= 0
    tx = optim.q_galore(0.004, rank=1.0, scale=0.25)
    update, state = jax.jit(tx.update), tx.init(params)
    exact_tx, view = optim.q_galore(0.004, rank=1.0, scale=0.25), None
    start = view = quantization.dequantize_tree(params)
    exact_update, exact_state = jax.jit(exact_tx.update), exact_tx.init(view)
    for _ in range(40):
      updates, state = update(grads, state, params)
      params = optim.apply_updates(params, updates)
      updates, exact_state = exact_update(grads, exact_state, view)
      view = optim.apply_updates(view, updates)
    moved = np.ravel(view["w"] - start["w"])
    got = np.ravel(params["w"].dequantize() - start["w"])
    # 768 entries with an error of about a grid step (0.02) each, over moves
    # of about 0.04: the slope has a spread of 0.02.
    np.testing.assert_allclose(got @ moved / (moved @ moved), 1, atol=0.1)

  def test_without_gradients_codes_stay(self):
    params, grads = self.make()
    grads = jax.tree.map(jnp.zeros_like, grads)
    out, _ = run(optim.q_galore(0.1, rank=4), [grads, grads], params)
    for updates in out:
      new = optim.apply_updates(params, updates)
      np.testing.assert_array_equal(new["w"].codes, params["w"].codes)
      np.testing.assert_array_equal(new["w"].scales, params["w"].scales)

  def test_parameters_are_needed(self):
    params, grads = self.make()
    tx = optim.q_galore(0.1, rank=4)
    with self.assertRaisesRegex(ValueError, "params: q_galore.update needs"):
      tx.update(grads, tx.init(params))

  def test_bfloat16_parameters(self):
    w = {"w": jnp.asarray(normal(0, 6, 9), jnp.bfloat16)}
    (updates,), state = run(optim.q_galore(0.1, rank=2), [w], w)
    self.assertEqual(updates["w"].dtype, jnp.bfloat16)


class MemoryTest(absltest.TestCase):
  def test_state_bytes(self):
    params = {"w": jnp.zeros((3, 256, 512))}
    tx = optim.scale_by_q_galore(rank=64)
    got = optim.state_bytes(tx, params)["state"]
    bases = 256 * 64 // 2 + 4 * 64  # a scale per basis vector
    moments = 2 * (64 * 512 + 4 * 512)
    # 7 numbers per layer; the counter, the key and two sums of weights.
    self.assertEqual(got, 3 * (bases + moments + 4 * 7) + 20)

  def test_a_share_of_adam(self):
    # Weights and state in bytes per parameter at rank S / 4: 8-bit weights,
    # 2 · 1/4 of 8 bits, and 1/4 · S/L of 4 bits; Adam has 12 in float32.
    params = {"w": jnp.zeros((512, 2048))}
    got = jax.eval_shape(lambda: quantization.quantize_tree(params, "int8:256"))
    per_param = optim.state_bytes(optim.q_galore(0.1), got)["per_param"]
    self.assertBetween(per_param, 1.5, 1.6)

  def test_arguments_out_of_range(self):
    for kwargs, message in (
      (dict(projector_format="int3"), "format: got 'int3'"),
      (dict(moment_format="x"), "format: got 'x'"),
      (dict(update_interval=0), "update_interval must be"),
      (dict(basis="qr"), "basis must be one of"),
      (dict(b1=1.0), "b1 must be in"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        optim.q_galore(0.1, **kwargs)


if __name__ == "__main__":
  absltest.main()
