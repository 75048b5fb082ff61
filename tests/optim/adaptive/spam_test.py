"""SPAM against its formulas in float64, and its sparse moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim
from optim.adaptive import spam

SHORT = dict(
  b1=0.8, b2=0.95, eps=1e-6, threshold=6.0, reset_every=7, warmup=3, grace=2
)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def spikes(seed, *shape):
  """A gradient some of whose entries are ten times the usual."""
  rng = np.random.default_rng(seed)
  g = rng.normal(size=shape)
  return np.float64(np.float32(g * np.where(rng.random(shape) < 0.1, 10, 1)))


def reference(grads, *, restart=True, b1, b2, eps, threshold, reset_every,
              warmup, grace):  # fmt: skip
  """The directions, and how many entries were clipped."""
  m = v = np.zeros_like(grads[0])
  t = n = clipped = 0
  since_first_reset = None
  out = []
  for step, g in enumerate(grads):
    if step and reset_every and step % reset_every == 0:
      m, v, n, since_first_reset = 0 * m, 0 * v, 0, 0
      t = 0 if restart else t
    if n >= grace and threshold:
      spike = (v > 0) & (g**2 > threshold * v)
      clipped += spike.sum()
      g = np.where(spike, np.sign(g) * np.sqrt(threshold * v), g)
    t, n = t + 1, n + 1
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    if since_first_reset is not None and n - 1 < warmup:
      u *= 1 - 0.99 * (1 + np.cos(np.pi * (n - 1) / warmup)) / 2
    out.append(u)
  return out, clipped


def directions(tx, grads):
  tree = lambda g: {"w": jnp.asarray(g, jnp.float32)}
  state, out = tx.init(tree(grads[0])), []
  update = jax.jit(tx.update)
  for g in grads:
    u, state = update(tree(g), state)
    out.append(np.asarray(u["w"], np.float64))
  return out, state


class SpamTest(parameterized.TestCase):
  @parameterized.parameters(
    ((64, 256), True), ((256, 64), False), ((3, 5, 4), True)
  )
  def test_is_the_formula(self, shape, restart):
    grads = [spikes(i, *shape) for i in range(17)]
    tx = optim.scale_by_spam(restart_bias_correction=restart, **SHORT)
    got, state = directions(tx, grads)
    want, clipped = reference(grads, restart=restart, **SHORT)
    self.assertGreater(clipped, 10)
    # Directions of up to 5, of averages of at most 17 float32 terms.
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    self.assertEqual(state.count, 17)

  @parameterized.parameters(
    ({"reset_every": 0}),
    ({"threshold": 0.0}),
    ({"warmup": 0}),
    ({"grace": 0}),
  )
  def test_parts_can_be_left_out(self, **change):
    grads = [spikes(i, 5, 4) for i in range(17)]
    got, _ = directions(optim.scale_by_spam(**SHORT | change), grads)
    want, _ = reference(grads, **SHORT | change)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    plain, _ = reference(grads, **SHORT)
    self.assertGreater(np.abs(want[-1] - plain[-1]).max(), 1e-3)

  def test_without_resets_and_clipping_it_is_adam(self):
    grads = [spikes(i, 5, 4) for i in range(5)]
    tx = optim.scale_by_spam(reset_every=0, threshold=0.0, eps=1e-8)
    got, _ = directions(tx, grads)
    want, _ = directions(optax.scale_by_adam(), grads)
    # 1 - 0.999 of a rounded 0.999, which optax divides by, is 5e-5 off.
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-4)

  def test_the_release_right_after_a_reset(self):
    """Its correction goes on: 0.1 g / sqrt(0.001 g²), damped to a hundredth."""
    grads = [normal(i, 5, 4) for i in range(41)]
    settings = dict(reset_every=40, warmup=4, threshold=0.0, eps=0.0)
    # 0.05 for the decay that 41 steps have nearly forgotten.
    tx = optim.scale_by_spam(b2=0.95, restart_bias_correction=False, **settings)
    got, _ = directions(tx, grads)
    correction = np.sqrt(1 - 0.95**41) / (1 - 0.9**41)
    want = 0.01 * 0.1 / np.sqrt(0.05) * correction * np.sign(grads[40])
    np.testing.assert_allclose(got[40], want, rtol=1e-5)
    got, _ = directions(optim.scale_by_spam(b2=0.95, **settings), grads)
    np.testing.assert_allclose(got[40], 0.01 * np.sign(grads[40]), rtol=1e-5)

  def test_first_gradients_of_an_entry_are_no_spikes(self):
    grads = [np.zeros((2, 2)) for _ in range(30)]
    grads[25] = np.eye(2)
    tx = optim.scale_by_spam()
    got, _ = directions(tx, grads)
    self.assertGreater(got[25][0, 0], 0.1)

  def test_vectors_do_not_decay(self):
    params = {"w": jnp.ones((2, 3)), "norm": jnp.ones(3)}
    tx = optim.spam(0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05)
    np.testing.assert_array_equal(updates["norm"], 0)

  def test_cautious_decay(self):
    params = {"w": jnp.ones((2, 3))}
    tx = optim.spam(0.1, weight_decay=0.5, cautious=True)
    update = jax.jit(tx.update)
    for sign, want in ((1, -0.15), (-1, 0.1)):
      g = {"w": sign * params["w"]}
      updates, _ = update(g, tx.init(params), params)
      np.testing.assert_allclose(updates["w"], want, rtol=1e-5)

  def test_refuses(self):
    for kwargs, message in (
      ({"b2": 1.0}, r"b2 must be in \[0, 1\)"),
      ({"threshold": -1.0}, "threshold must be at least 0"),
      ({"reset_every": -1}, "reset_every must be a whole number"),
      ({"warmup": 1.5}, "warmup must be a whole number"),
      ({"density": 0.0}, r"density must be None or in \(0, 1\]"),
      ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        optim.spam(0.1, **kwargs)
    with self.assertRaisesRegex(ValueError, "SPAM.*'w' is of the dtype int32"):
      optim.spam(0.1).init({"w": jnp.ones((2, 2), jnp.int32)})


class SparseTest(parameterized.TestCase):
  def run_sparse(self, shape, density, steps=17, seed=0):
    grads = [spikes(i, *shape) for i in range(steps)]
    tx = optim.scale_by_spam(density=density, seed=seed, **SHORT)
    return grads, *directions(tx, grads)

  def test_chosen_entries_follow_the_formula(self):
    grads, got, state = self.run_sparse((3, 5, 7), 0.3)
    self.assertEqual(state.mu["w"].shape, (31,))
    choices = []
    for start in (0, 7, 14):
      interval = got[start : start + 7]
      chosen = interval[0] != 0
      choices.append(chosen)
      self.assertEqual(chosen.sum(), 31)
      for u in interval:
        np.testing.assert_array_equal(u != 0, chosen)
    self.assertFalse(np.array_equal(choices[0], choices[1]))
    self.assertFalse(np.array_equal(choices[1], choices[2]))
    want, _ = reference(grads, **SHORT)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
      b = np.where(choices[i // 7], b, 0)
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

  def test_other_seeds_choose_others(self):
    _, a, _ = self.run_sparse((5, 7), 0.3, steps=1)
    _, b, _ = self.run_sparse((5, 7), 0.3, steps=1, seed=1)
    self.assertFalse(np.array_equal(a[0] != 0, b[0] != 0))

  def test_all_entries_are_the_dense_method(self):
    grads, got, _ = self.run_sparse((5, 7), 1.0)
    want, _ = reference(grads, **SHORT)
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-5, atol=1e-5)

  @parameterized.parameters((10, 3), (10, 7), (12, 4), (9, 1), (5, 5))
  def test_every_entry_is_as_likely(self, size, count):
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    entries = jax.vmap(lambda key: spam._entries(key, size, count))
    chosen = np.asarray(jax.jit(entries)(keys))
    self.assertTrue(np.all((chosen >= 0) & (chosen < size)))
    self.assertTrue(np.all(np.diff(np.sort(chosen, axis=1), axis=1) > 0))
    share = np.bincount(chosen.ravel(), minlength=size) / draws
    # Five standard deviations of a share of 4000 draws.
    p = count / size
    self.assertLessEqual(
      np.abs(share - p).max(), 5 * np.sqrt(p * (1 - p) / draws)
    )

  def test_saves_memory_where_matrices_are(self):
    params = {
      "embed": jnp.ones((10, 8)),
      "up": jnp.ones((8, 100)),
      "norm": jnp.ones(8),
    }
    count = lambda **kwargs: sum(
      x.size for x in jax.tree.leaves(optim.spam(0.1, **kwargs).init(params))
    )
    # The moments of the embedding and the norm are whole; 5 are counters and
    # the key.
    self.assertEqual(count(density=0.25), 2 * (80 + 200 + 8) + 5)
    self.assertEqual(count(), 2 * (80 + 800 + 8) + 5)
    labels = lambda p: jax.tree.map(lambda _: "vector", p)
    self.assertEqual(count(density=0.25, labels=labels), count())

  def test_refuses_what_int32_cannot_count(self):
    params = {"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    tx = optim.scale_by_spam(density=0.5)
    with self.assertRaisesRegex(ValueError, "density: the leaf 'w' has 2147"):
      jax.eval_shape(tx.init, params)


if __name__ == "__main__":
  absltest.main()
