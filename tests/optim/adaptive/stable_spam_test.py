"""Stable-SPAM against its formulas in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim

SHORT = dict(
  b1=0.8, b2=0.95, eps=1e-8, clip_decay=0.9, norm_b1=0.6, norm_b2=0.8,
  reset_every=5,
)  # fmt: skip


def spikes(seed, *shape):
  """A gradient some of whose entries are large, larger on odd seeds."""
  rng = np.random.default_rng(seed)
  g = rng.normal(size=shape)
  g *= np.where(rng.random(shape) < 0.1, 10, 1) * (1 + seed % 2)
  return np.float64(np.float32(g))


def reference(grads, *, s=lambda t: 1.0, b1, b2, eps, clip_decay, norm_b1,
              norm_b2, reset_every):  # fmt: skip
  """The directions for one tensor, and how many entries were clipped."""
  m = v = np.zeros_like(grads[0])
  largest = norm = square = 0.0
  # What is left of the weights of the zeros that the averages began with.
  rest = dict.fromkeys(("largest", "norm", "square", "m", "v"), 1.0)
  out, clipped = [], 0
  for t, g in enumerate(grads):
    top = np.max(np.abs(g))
    largest = clip_decay * largest + (1 - clip_decay) * top
    rest["largest"] *= clip_decay
    bound = largest / (1 - rest["largest"])
    # The first bound is the first maximum.
    over = np.abs(g) > bound * (1 + 1e-9)
    clipped += over.sum()
    g = np.where(over, g * bound / top, g)
    length = np.linalg.norm(g)
    norm = s(t) * norm_b1 * norm + (1 - s(t) * norm_b1) * length
    square = norm_b2 * square + (1 - norm_b2) * length**2
    rest["norm"] *= s(t) * norm_b1
    rest["square"] *= norm_b2
    root = np.sqrt(square / (1 - rest["square"]))
    g = g / length * (norm / (1 - rest["norm"])) / root
    if reset_every and t % reset_every == 0:
      m, v, rest["m"], rest["v"] = 0 * m, 0 * v, 1.0, 1.0
    m = s(t) * b1 * m + (1 - s(t) * b1) * g
    v = b2 * v + (1 - b2) * g**2
    rest["m"] *= s(t) * b1
    rest["v"] *= b2
    m_hat, v_hat = m / (1 - rest["m"]), v / (1 - rest["v"])
    out.append(m_hat / (np.sqrt(v_hat) + eps))
  return out, clipped


def directions(tx, grads):
  tree = lambda g: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
  state, out = tx.init(tree(grads[0])), []
  update = jax.jit(tx.update)
  for g in grads:
    u, state = update(tree(g), state)
    out.append(jax.tree.map(lambda x: np.asarray(x, np.float64), u))
  return out, state


class StableSpamTest(parameterized.TestCase):
  def compare(self, got, want):
    # Directions of up to 5, of averages of at most 13 float32 terms.
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)

  @parameterized.parameters(
    ((64, 256), {}),
    ((256, 64), {}),
    ((5, 4), {"reset_every": 0}),
    ((5,), {}),
  )
  def test_is_the_formula(self, shape, change):
    settings = SHORT | change
    grads = [spikes(i, *shape) for i in range(13)]
    tx = optim.scale_by_stable_spam(**settings)
    got, state = directions(tx, [{"w": g} for g in grads])
    want, clipped = reference(grads, **settings)
    self.assertGreater(clipped, 0)
    self.compare([u["w"] for u in got], want)
    self.assertEqual(state.largest["w"].size, 1)

  def test_decays_that_change(self):
    s = optax.cosine_decay_schedule(1.0, 10, 0.5)
    grads = [spikes(i, 5, 4) for i in range(13)]
    tx = optim.scale_by_stable_spam(momentum_scale=s, **SHORT)
    got, _ = directions(tx, [{"w": g} for g in grads])
    exact = lambda t: 0.5 + 0.25 * (1 + np.cos(np.pi * min(t / 10, 1)))
    want, _ = reference(grads, s=exact, **SHORT)
    self.compare([u["w"] for u in got], want)
    constant, _ = reference(grads, **SHORT)
    self.assertGreater(np.abs(want[-1] - constant[-1]).max(), 1e-2)

  def test_each_layer_and_each_gain_vector_is_a_tensor(self):
    grads = [
      {"up": spikes(i, 2, 5, 4), "norm": spikes(i + 50, 2, 4)} for i in range(7)
    ]
    tx = optim.scale_by_stable_spam(**SHORT)
    got, state = directions(tx, grads)
    for name in ("up", "norm"):
      for layer in range(2):
        want, _ = reference([g[name][layer] for g in grads], **SHORT)
        self.compare([u[name][layer] for u in got], want)
    self.assertEqual(state.norm["up"].shape, (2, 1, 1))
    self.assertEqual(state.norm["norm"].shape, (2, 1))

  def test_matrix_axes_say_what_a_tensor_is(self):
    grads = [{"q": spikes(i, 5, 2, 3), "bias": spikes(i, 3)} for i in range(7)]
    axes = {"q": (0, (1, 2)), "bias": None}
    tx = optim.scale_by_stable_spam(matrix_axes=axes, **SHORT)
    got, _ = directions(tx, grads)
    for name in ("q", "bias"):
      want, _ = reference([g[name] for g in grads], **SHORT)
      self.compare([u[name] for u in got], want)

  @parameterized.parameters(1e-30, 1e-12, 1e25)
  def test_the_scale_does_not_matter(self, size):
    grads = [{"w": spikes(i, 5, 4)} for i in range(7)]
    scaled = [{"w": -size * g["w"]} for g in grads]
    tx = optim.scale_by_stable_spam(**SHORT)
    got, state = directions(tx, scaled)
    want, _ = directions(tx, grads)
    self.compare([-u["w"] for u in got], [u["w"] for u in want])
    for x in jax.tree.leaves(state):
      self.assertTrue(np.all(np.isfinite(x)))

  def test_a_tensor_without_gradients_starts_later(self):
    grads = [{"w": np.zeros((5, 4))}] * 3 + [{"w": spikes(3, 5, 4)}] * 2
    got, _ = directions(optim.scale_by_stable_spam(**SHORT), grads)
    np.testing.assert_array_equal(got[2]["w"], 0)
    self.assertTrue(np.all(np.isfinite(got[4]["w"])))
    self.assertGreater(np.abs(got[3]["w"]).max(), 0.1)

  def test_state_and_decay(self):
    params = {"up": jnp.ones((2, 5, 4)), "norm": jnp.ones(4)}
    tx = optim.stable_spam(0.1, weight_decay=0.5)
    state = tx.init(params)
    # Two moments; three numbers for each of three tensors; six counters.
    sizes = sum(x.size for x in jax.tree.leaves(state))
    self.assertEqual(sizes, 2 * 44 + 9 + 6)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, state, params)
    np.testing.assert_allclose(updates["up"], -0.05)
    np.testing.assert_array_equal(updates["norm"], 0)

  def test_refuses(self):
    for kwargs, message in (
      ({"clip_decay": 1.0}, r"clip_decay must be in \[0, 1\)"),
      ({"norm_b1": -0.1}, r"norm_b1 must be in \[0, 1\)"),
      ({"reset_every": 2.5}, "reset_every must be a whole number"),
      ({"eps": -1.0}, "eps must be at least 0"),
      ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        optim.stable_spam(**{"learning_rate": 0.1} | kwargs)
    tx = optim.scale_by_stable_spam(matrix_axes={"w": (0, 2)})
    with self.assertRaisesRegex(ValueError, "matrix_axes of 'w'"):
      tx.init({"w": jnp.ones((2, 3))})


if __name__ == "__main__":
  absltest.main()
