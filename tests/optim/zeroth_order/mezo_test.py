"""MeZO: the estimate, its storage, what it does to narrow numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim

SHAPES = {"w": (4, 3), "b": (5,)}


def sample(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tree(seed=0, dtype=jnp.float32):
  return {
    k: jnp.asarray(sample(s, seed + i), dtype)
    for i, (k, s) in enumerate(SHAPES.items())
  }


def squares(params):
  """Half the squared length, whose gradient is the parameters."""
  return 0.5 * sum(
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(params)
  )


def run(tx, params, value_fn, count):
  """Parameters after jitted steps, and the slopes of each."""

  @jax.jit
  def step(params, state):
    updates, state = tx.update(params, state, params, value_fn=value_fn)
    return optax.apply_updates(params, updates), state

  state, slopes = tx.init(params), []
  for _ in range(count):
    params, state = step(params, state)
    slopes.append(np.asarray(state[0].slopes))
  return params, np.stack(slopes)


def flat(params):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)]
  )


@jax.jit
def replayed(params, seed, slopes, start):
  return optim.mezo_replay(params, seed, slopes, -1.0, start=start)


def directions(seed, count, num_samples):
  """z_i of a step, [num_samples, n]: the update of a slope of one."""
  zeros = jax.tree.map(jnp.zeros_like, tree())
  hot = num_samples * np.eye(num_samples, dtype=np.float32)
  return np.stack(
    [flat(replayed(zeros, seed, row[None], count)) for row in hot]
  )


@pytest.mark.parametrize("num_samples", [1, 3])
def test_steps_are_the_formula(num_samples):
  """In float64, from directions that are read off the updates."""
  rate, decay, epsilon, seed = 0.03, 0.2, 1e-2, 5
  tx = optim.mezo(
    rate, epsilon=epsilon, num_samples=num_samples, weight_decay=decay,
    seed=seed,
  )  # fmt: skip
  chained = optax.chain(tx)  # value_fn passes through
  got, slopes = run(tx, tree(), squares, 3)
  theta = flat(tree())
  for count in range(3):
    z = directions(seed, count, num_samples)
    loss = lambda x: 0.5 * np.sum(x**2)
    d = [
      (loss(theta + epsilon * v) - loss(theta - epsilon * v)) / (2 * epsilon)
      for v in z
    ]
    # Losses of about 8 are rounded to 2^-24 of that, over 1e-2: 5e-5 in d.
    np.testing.assert_allclose(slopes[count], d, atol=3e-4)
    theta = theta - rate * (np.mean(z.T * d, axis=1) + decay * theta)
  np.testing.assert_allclose(flat(got), theta, atol=1e-4)
  state = chained.init(tree())
  updates, _ = jax.jit(
    lambda p, s: chained.update(p, s, p, value_fn=squares)
  )(tree(), state)  # fmt: skip
  first, _ = run(tx, tree(), squares, 1)
  np.testing.assert_allclose(
    flat(updates), flat(first) - flat(tree()), atol=1e-6
  )


def test_directions_are_standard_normal_and_differ():
  """Between leaves, samples, steps and seeds."""
  zeros = {"a": jnp.zeros((200,)), "b": jnp.zeros((200,))}

  def z(seed, count, i):
    hot = np.zeros((1, 2), np.float32)
    hot[0, i] = 2
    return replayed(zeros, seed, hot, count)

  drawn = [z(0, 0, 0), z(0, 0, 1), z(0, 1, 0), z(1, 0, 0)]
  rows = np.stack([np.asarray(x) for t in drawn for x in t.values()])
  # Eight rows of 200: means are good to 0.07, correlations too.
  assert np.abs(rows.mean(axis=1)).max() < 0.3
  assert np.abs(rows.std(axis=1) - 1).max() < 0.2
  assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 0.3


def test_the_mean_over_directions_is_the_gradient():
  params = tree()
  tx = optim.scale_by_mezo(num_samples=4096)
  updates, _ = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=squares))(
    params, tx.init(params)
  )
  g = flat(params)
  # Of variance (|g|^2 + g_i^2) / 4096: five deviations.
  bound = 5 * np.sqrt((np.sum(g**2) + g**2) / 4096)
  assert np.all(np.abs(flat(updates) - g) < bound)


def test_converges_with_one_direction():
  tx = optim.mezo(0.05)
  params, _ = run(tx, tree(), squares, 300)
  # At a rate of 1 / (n + 2), 300 steps leave (1 - 1 / 19)^300 on average.
  assert squares(params) < 1e-4 * squares(tree())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_a_run_is_its_seed_slopes_and_rates(dtype):
  rates = optax.cosine_decay_schedule(0.05, 8)
  tx = optim.mezo(rates, num_samples=2, weight_decay=0.1, seed=3)
  state, params = tx.init(tree(0, dtype)), tree(0, dtype)
  step = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=squares))
  record, half = [], None
  for i in range(6):
    updates, state = step(params, state)
    params = optax.apply_updates(params, updates)
    record.append((np.asarray(state[0].slopes), float(rates(i))))
    half = params if i == 2 else half
  slopes, used = (np.stack(x) for x in zip(*record, strict=True))
  replay = functools.partial(optim.mezo_replay, seed=3, weight_decay=0.1)
  got = replay(tree(0, dtype), slopes=slopes, learning_rates=used)
  # Two compilations may fuse a product and a sum or not: a rounding of the
  # parameters' format per step.
  unit = float(jnp.finfo(dtype).eps)
  close = functools.partial(np.testing.assert_allclose, atol=6 * 3 * unit)
  close(flat(got), flat(params))
  got = replay(half, slopes=slopes[3:], learning_rates=used[3:], start=3)
  close(flat(got), flat(params))


def test_bfloat16_parameters_do_not_drift():
  """In place, perturbing and restoring would lose bits; here nothing moves."""
  params = tree(0, jnp.bfloat16)
  tx = optim.mezo(0.0)
  after, slopes = run(tx, params, squares, 5)
  assert np.all(slopes != 0)
  for a, b in zip(*map(jax.tree.leaves, (after, params)), strict=True):
    assert a.dtype == jnp.bfloat16 and np.array_equal(a, b)


def test_memory_does_not_grow_with_directions():
  size = 256 * 256
  params = {k: jax.ShapeDtypeStruct((256, 256), jnp.float32) for k in "abcd"}

  def temp(num_samples):
    tx = optim.mezo(1e-3, num_samples=num_samples)
    state = jax.eval_shape(tx.init, params)

    def step(params, state):
      updates, state = tx.update(params, state, params, value_fn=squares)
      return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=0).lower(params, state).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * 4 * size)

  # In copies of the parameters: the moved one, and the random bits and
  # counters of all leaves, which XLA's CPU backend draws at once. Without the
  # loop there would be two moved ones beside a direction. JAX 0.12 takes twice
  # as much (5.25), and with one direction only.
  newer = jax.__version_info__ >= (0, 12)
  assert temp(1) < (5.5 if newer else 2.6)
  # The sum of the directions, twice, besides, and the squares of a leaf.
  few = temp(4)
  assert few < (4.6 if newer else 4.3)
  # Four times as many take no more but their slopes.
  assert temp(16) < few + 0.01


def test_inside_masked_only_what_is_kept_moves():
  params = tree()
  tx = optax.masked(optim.mezo(0.1), {"w": True, "b": False})
  seen = []

  def value(masked):
    seen.append(masked)
    return squares(masked)

  updates, _ = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=value))(
    params, tx.init(params)
  )
  assert isinstance(seen[0]["b"], optax.MaskedNode)
  np.testing.assert_array_equal(updates["b"], params["b"])
  assert np.all(np.asarray(updates["w"]) != 0)


def test_bad_input_is_named():
  for kwargs, words in (
    (dict(epsilon=0.0), "epsilon must be positive, got 0.0"),
    (dict(num_samples=0), "num_samples must be a whole number"),
    (dict(learning_rate=-1.0), "learning_rate must be at least 0"),
    (dict(weight_decay=-1.0), "weight_decay must be at least 0"),
  ):
    with pytest.raises(ValueError, match=words):
      optim.mezo(**{"learning_rate": 0.1, **kwargs})
  tx = optim.mezo(0.1)
  with pytest.raises(ValueError, match="the leaf 'codes' is of the dtype int8"):
    tx.init({"codes": jnp.zeros((2,), jnp.int8)})
  state = tx.init(tree())
  with pytest.raises(ValueError, match="value_fn: the update needs the loss"):
    tx.update(tree(), state, tree())
  with pytest.raises(ValueError, match="value_fn must give a real scalar"):
    tx.update(tree(), state, tree(), value_fn=lambda p: p["w"])
  with pytest.raises(
    ValueError, match=r"slopes must be \[steps, num_samples\]"
  ):
    optim.mezo_replay(tree(), 0, np.zeros(3), 0.1)
