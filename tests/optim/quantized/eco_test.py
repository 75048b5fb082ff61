"""ECO: exact trajectories, convergence, determinism."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import optim
from jaxlib_ext import quantization

BETA = 0.9


def sample(shape, seed=0, scale=1.0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (rng.standard_normal(shape) * scale).astype(np.float32)


def stepper(tx):
  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optim.apply_updates(params, updates), state

  return step


def same_bits(tree, other) -> bool:
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
  )


def rates_of(learning_rate, n) -> np.ndarray:
  if callable(learning_rate):
    return np.array([float(learning_rate(t)) for t in range(n)], np.float64)
  return np.full(n, learning_rate, np.float64)


def horizons(rates, beta, decay) -> np.ndarray:
  """c_t of every step by the recursion from the far end, in float64."""
  rho = 1 - rates * decay
  beta = np.broadcast_to(beta, rho.shape)
  c = np.zeros(len(rates) + 1)
  c[-1] = beta[-1] / (rho[-1] - beta[-1])
  for t in reversed(range(len(rates))):
    c[t] = beta[t] * (1 + c[t + 1]) / rho[t]
  return c


SCHEDULES = {
  "constant": 0.01,
  "cosine": optax.cosine_decay_schedule(0.05, 50),
  "warmup": optax.warmup_cosine_decay_schedule(0.0, 0.05, 10, 50, 0.0),
  "steps": optax.piecewise_constant_schedule(0.02, {15: 0.0, 30: 1.0}),
}


class TrajectoryTest(parameterized.TestCase):
  @parameterized.product(
    name=("int4:8", "float8_e4m3fn", "mxfp4", "nvfp4"),
    schedule=tuple(SCHEDULES),
    decay=(0.0, 1.5),
  )
  @pytest.mark.slow
  def test_no_rounding_error_enters_z(self, name, schedule, decay):
    n, rate = 60, SCHEDULES[schedule]
    params = {"w": quantization.quantize(sample((2, 16, 4)), name)}
    grads = sample((n, 2, 16, 4), seed=1)
    tx = optim.eco(rate, weight_decay=decay, momentum=BETA)
    step, state = stepper(tx), tx.init(params)

    # float64, far past the steps taken: what c_t has to foresee.
    rates = rates_of(rate, 2000)
    c = horizons(rates, BETA, decay)
    z = np.asarray(params["w"].dequantize(), np.float64)
    magnitude = 0.0
    for t in range(n):
      params, state = step(params, state, {"w": grads[t]})
      z = (1 - rates[t] * decay) * z
      z = z - (1 + c[t + 1]) * (1 - BETA) * rates[t] * grads[t]
      np.testing.assert_allclose(state.horizon, c[t + 1], rtol=1e-5)
      theta = np.asarray(params["w"].dequantize(), np.float64)
      pending = np.float64(state.horizon) * np.asarray(state.u["w"])
      # Per step, a few roundings of numbers no larger than θ and c u, and
      # the rounding of c itself, which acts on the change of c u.
      magnitude += np.abs(theta).max() + np.abs(pending).max()
      error = np.abs(theta - pending - z).max()
      self.assertLess(error, 8 * 2.0**-24 * magnitude)
    # Far below the errors that the grid makes:
    grid_error = np.abs(theta - z).max()
    self.assertGreater(grid_error, 100 * 8 * 2.0**-24 * magnitude)

  @parameterized.parameters(
    # All three; the momentum alone; the momentum and the rate.
    ("cosine", (0.5, 0.95, 30), optax.linear_schedule(2.0, 0.0, 40)),
    ("constant", (0.95, 0.6, 50), 0.0),
    ("warmup", (0.9, 0.5, 20), 1.5),
  )
  def test_no_rounding_error_enters_z_with_schedules(self, rate, ends, decay):
    n, rate, momentum = 40, SCHEDULES[rate], optax.linear_schedule(*ends)
    params = {"w": quantization.quantize(sample((2, 16, 4)), "int4:8")}
    grads = sample((n, 2, 16, 4), seed=1)
    tx = optim.eco(rate, weight_decay=decay, momentum=momentum)
    step, state = stepper(tx), tx.init(params)
    rates, beta, decay = (rates_of(x, 1000) for x in (rate, momentum, decay))
    c = horizons(rates, beta, decay)
    z = np.asarray(params["w"].dequantize(), np.float64)
    magnitude = 0.0
    for t in range(n):
      params, state = step(params, state, {"w": grads[t]})
      z = (1 - rates[t] * decay[t]) * z
      z = z - (1 + c[t + 1]) * (1 - beta[t]) * rates[t] * grads[t]
      np.testing.assert_allclose(state.horizon, c[t + 1], rtol=1e-5)
      theta = np.asarray(params["w"].dequantize(), np.float64)
      pending = np.float64(state.horizon) * np.asarray(state.u["w"])
      # As above.
      magnitude += np.abs(theta).max() + np.abs(pending).max()
      self.assertLess(
        np.abs(theta - pending - z).max(), 8 * 2.0**-24 * magnitude
      )
    self.assertGreater(np.abs(theta - z).max(), 100 * 8 * 2.0**-24 * magnitude)

  def test_a_momentum_of_0_loses_one_steps_errors(self):
    params = {"w": quantization.quantize(sample((16, 4)), "int4:8")}
    grads = sample((6, 16, 4), seed=1)
    tx = optim.eco(0.1, momentum=lambda t: 0.9 * (t % 3 > 0))
    step, state = stepper(tx), tx.init(params)
    for t in range(6):
      params, state = step(params, state, {"w": grads[t]})
      self.assertTrue(np.all(np.isfinite(state.u["w"])))
      self.assertTrue(np.all(np.isfinite(params["w"].dequantize())))

  def test_stateful_inner(self):
    n, inner = 20, optax.scale_by_rms(decay=0.9)
    params = {"w": quantization.quantize(sample((16, 4)), "int4:8")}
    grads = sample((n, 16, 4), seed=1)
    tx = optim.eco(0.01, inner=inner)
    step, state = stepper(tx), tx.init(params)
    inner_state = inner.init(jnp.zeros((16, 4)))
    z = np.asarray(params["w"].dequantize(), np.float64)
    for t in range(n):
      params, state = step(params, state, {"w": grads[t]})
      direction, inner_state = inner.update(jnp.asarray(grads[t]), inner_state)
      z = z - 0.01 * np.asarray(direction, np.float64)
    got = params["w"].dequantize() - state.horizon * state.u["w"]
    # 20 steps of numbers up to about 3.
    np.testing.assert_allclose(got, z, atol=20 * 3 * 8 * 2.0**-24)

  def test_inner_may_read_the_parameters(self):
    params = {"w": quantization.quantize(sample((16, 4)), "int8")}
    tx = optim.eco(0.1, inner=optax.add_decayed_weights(0.5))
    zeros = {"w": jnp.zeros((16, 4))}
    new, _ = stepper(tx)(params, tx.init(params), zeros)
    want = params["w"].dequantize() * (1 - 0.1 * 0.1 * 0.5)
    np.testing.assert_allclose(
      new["w"].dequantize(), want, atol=2 * float(params["w"].scales.max())
    )

  def test_two_steps_to_nearest_by_hand(self):
    # Powers of two throughout: every operation is exact, so is the equality.
    rng = np.random.default_rng(0)
    codes = rng.integers(-3, 4, (16, 4)).astype(np.float32)
    codes[0] = 7
    grads = rng.integers(-8, 9, (2, 16, 4)).astype(np.float32) / 4
    grads[:, 0] = 0  # The largest code stays, and so does the scale, 1/4.
    params = {"w": quantization.quantize(codes / 4, "int4")}
    tx = optim.eco(0.25, momentum=0.5, rounding="nearest")
    step, state = stepper(tx), tx.init(params)
    theta, u = codes / 4, np.zeros_like(codes)
    for g in grads:
      params, state = step(params, state, {"w": g})
      u = 0.5 * u + 0.5 * 0.25 * g
      target = theta - u
      theta = np.clip(np.round(target * 4), -7, 7) / 4
      u = u - (target - theta)  # c = 0.5 / (1 - 0.5) = 1
      np.testing.assert_array_equal(params["w"].dequantize(), theta)
      np.testing.assert_array_equal(state.u["w"], u)

  def test_rate_zero_moves_nothing(self):
    for name in ("int4:8", "mxfp4", "nvfp4", "float8_e4m3fn"):
      params = {"w": quantization.quantize(sample((16, 4)), name)}
      tx = optim.eco(lambda t: 0.0 * t, weight_decay=0.1)
      new, state = stepper(tx)(params, tx.init(params), {"w": sample((16, 4))})
      self.assertTrue(same_bits(new, params))
      np.testing.assert_array_equal(state.u["w"], 0)


class ConvergenceTest(parameterized.TestCase):
  def run_quadratic(self, name, kind, rate, steps):
    """Losses above the optimum: the tail's mean, and that of the flush."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.standard_normal((64, 8)) * 0.5, jnp.float32)
    curvature = jnp.asarray(rng.uniform(0.1, 1, (64, 8)), jnp.float32)
    start = target + 0.5 * jnp.asarray(sample((64, 8), 3))
    tx = optim.eco(rate) if kind == "eco" else None
    params = {"w": quantization.quantize(start, name)}

    def loss(w):
      return 0.5 * jnp.sum(curvature * (w - target) ** 2)

    def gradient(w, key):
      noise = 0.05 * jax.random.normal(key, w.shape)
      return curvature * (w - target) + noise

    def eco_step(carry, key):
      params, state = carry
      grads = {"w": gradient(params["w"].dequantize(), key)}
      updates, state = tx.update(grads, state, params)
      params = optim.apply_updates(params, updates)
      return (params, state), loss(params["w"].dequantize())

    def other_step(carry, key):
      w, u, count = carry
      q = quantization.quantize(w, name)
      eta = rate(count) if callable(rate) else rate
      u = BETA * u + (1 - BETA) * eta * gradient(q.dequantize(), key)
      w = w - u
      if kind == "naive":
        w = quantization.quantize(w, name, key=key).dequantize()
      return (w, u, count + 1), loss(
        quantization.quantize(w, name).dequantize()
      )

    keys = jax.random.split(jax.random.key(1), steps)
    if kind == "eco":
      carry = (params, tx.init(params))
      (params, state), losses = jax.jit(
        lambda c, k: jax.lax.scan(eco_step, c, k)
      )(carry, keys)
      flushed = optim.eco_flush(params, state)
      return float(losses[-500:].mean()), float(loss(flushed["w"].dequantize()))
    carry = (start, jnp.zeros_like(start), jnp.zeros((), jnp.int32))
    _, losses = jax.jit(lambda c, k: jax.lax.scan(other_step, c, k))(
      carry, keys
    )
    floor = loss(quantization.quantize(target, name).dequantize())
    return float(losses[-500:].mean()), float(floor)

  # Of the 4-bit grids' losses, most is the grid's own (see the next test).
  @parameterized.parameters(
    ("int4:32", 1.0), ("float8_e4m3fn", 0.7), ("nvfp4", 0.7), ("mxfp8", 0.7)
  )  # fmt: skip
  @pytest.mark.slow
  def test_close_to_master_weights(self, name, of_naive):
    eco, _ = self.run_quadratic(name, "eco", 1e-2, 4000)
    master, _ = self.run_quadratic(name, "master", 1e-2, 4000)
    naive, _ = self.run_quadratic(name, "naive", 1e-2, 4000)
    self.assertLess(eco, 2 * master)
    self.assertLess(eco, of_naive * naive)

  @parameterized.parameters("int4:32", "float8_e4m3fn")
  def test_flush_reaches_the_grids_floor(self, name):
    schedule = optax.cosine_decay_schedule(2e-2, 4000)
    eco, flushed = self.run_quadratic(name, "eco", schedule, 4000)
    _, floor = self.run_quadratic(name, "master", schedule, 4000)
    self.assertLess(flushed, 0.8 * eco)
    self.assertLess(flushed, 2 * floor)


class RandomnessTest(parameterized.TestCase):
  def run_steps(self, params, n=3, **kwargs):
    tx = optim.eco(1.0, **kwargs)
    step, state = stepper(tx), tx.init(params)
    grads = jax.tree.map(
      lambda p: jnp.full(p.shape, 0.1),
      params,
      is_leaf=quantization.is_qtensor,
    )
    for _ in range(n):
      params, state = step(params, state, grads)
    return params, state

  def test_seed(self):
    params = {"w": quantization.quantize(sample((64, 16)), "int4:8")}
    first = self.run_steps(params, seed=3)
    self.assertTrue(same_bits(first, self.run_steps(params, seed=3)))
    self.assertFalse(same_bits(first[0], self.run_steps(params, seed=4)[0]))

  def test_leaves_and_steps_differ(self):
    # One leaf twice, and a third one whose two layers are that leaf too.
    one = sample((64, 16))
    params = quantization.quantize_tree(
      {"a": one, "b": one, "c": np.stack([one, one])}, "int4:8"
    )
    new, _ = self.run_steps(params, n=1)
    moved = [new["a"].codes, new["b"].codes, *new["c"].codes]
    for i in range(4):
      for j in range(i):
        self.assertGreater(np.mean(np.asarray(moved[i] != moved[j])), 0.01)
    again, _ = self.run_steps(params, n=1)
    self.assertTrue(same_bits(new, again))

  def test_sharded_equals_unsharded(self):
    mesh = jax.make_mesh(
      (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec(None, "a", "b")
    place = jax.sharding.NamedSharding(mesh, spec)
    params = {"w": quantization.quantize(sample((2, 64, 16)), "int4:8")}
    # Products with powers of two are exact, so it does not matter which of
    # them a program contracts with a sum into one rounding.
    tx = optim.eco(2.0**-4, momentum=0.5)
    outcomes = []
    for sharding in (jax.devices()[0], place):
      p = jax.device_put(params, sharding)
      state = tx.init(p)
      step = stepper(tx)
      for t in range(3):
        g = jax.device_put(sample((2, 64, 16), seed=t), sharding)
        p, state = step(p, state, {"w": g})
      outcomes.append((p, state))
    self.assertTrue(same_bits(*outcomes))
    self.assertEqual(outcomes[1][0]["w"].codes.sharding.spec, spec)
    self.assertEqual(outcomes[1][1].u["w"].sharding.spec, spec)
    self.assertEqual(tx.init(p).u["w"].sharding.spec, spec)


class NearestTest(parameterized.TestCase):
  def test_warns_above_the_allowed_momentum(self):
    with self.assertWarnsRegex(UserWarning, "10 grid steps"):
      optim.eco(0.1, momentum=0.95, rounding="nearest")
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      optim.eco(0.1, momentum=0.9, rounding="nearest")
      optim.eco(0.1, momentum=0.99)

  def test_flush_changes_nothing(self):
    params = {"w": quantization.quantize(sample((16, 4)), "int4:8")}
    tx = optim.eco(0.1, rounding="nearest")
    step, state = stepper(tx), tx.init(params)
    for t in range(5):
      params, state = step(params, state, {"w": sample((16, 4), seed=t)})
    self.assertTrue(same_bits(optim.eco_flush(params, state), params))


if __name__ == "__main__":
  absltest.main()
