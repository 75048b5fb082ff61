"""Muon against a step-by-step numpy float64 version of the algorithm."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import nnx

import optim

KELLER = [(3.4445, -4.7750, 2.0315)] * 5


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def polynomial(x):
  """Keller's five steps on one matrix, by its singular values."""
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  s = s / np.linalg.norm(s)
  for a, b, c in KELLER:
    s = a * s + b * s**3 + c * s**5
  return (u * s) @ vt


def torch_shape_factor(d_out, d_in):
  """For a torch weight (out, in): max(1, rows / columns) ** 0.5."""
  return max(1, d_out / d_in) ** 0.5


def reference_muon(w, grads, *, beta, nesterov, lr, wd, factor):
  """The published loop on one matrix, in float64."""
  m = np.zeros_like(w)
  for g in grads:
    m = beta * m + (1 - beta) * g
    u = (1 - beta) * g + beta * m if nesterov else m
    w = (1 - lr * wd) * w - lr * factor * polynomial(u)
  return w


def run(tx, params, grads):
  params = float32(params)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for g in grads:
    updates, state = update(float32(g), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


exact_products = dict(coefficients="keller", ns_dtype=jnp.float32)


class MuonTest(parameterized.TestCase):
  @parameterized.product(
    shape=[(8, 8), (64, 256), (256, 64), (5, 3)],
    nesterov=[True, False],
    weight_decay=[0.0, 0.3],
  )
  def test_is_the_published_loop(self, shape, nesterov, weight_decay):
    w, grads = normal(0, *shape), [normal(i, *shape) for i in range(1, 5)]
    want = reference_muon(
      w, grads, beta=0.9, nesterov=nesterov, lr=0.1, wd=weight_decay,
      # A JAX kernel (in, out) is the torch weight (out, in) transposed.
      factor=torch_shape_factor(d_out=shape[1], d_in=shape[0]),
    )  # fmt: skip
    tx = optim.muon(
      0.1,
      momentum=0.9,
      nesterov=nesterov,
      weight_decay=weight_decay,
      shape_scale="keller",
      **exact_products,
    )
    got, _ = run(tx, {"w": w}, [{"w": g} for g in grads])
    # Float32 rounding times Keller's slope of 485 at 0.
    np.testing.assert_allclose(got["w"], want, atol=1e-4)

  @parameterized.parameters(
    ("rms", (64, 256), 0.2 * 16),
    ("rms", (256, 64), 0.2 * 16),
    ("keller", (64, 256), 2.0),
    ("keller", (256, 64), 1.0),
    ("spectral", (64, 256), 2.0),
    ("spectral", (256, 64), 0.5),
    (None, (256, 64), 1.0),
  )
  def test_shape_scales(self, name, shape, factor):
    g = float32({"w": normal(0, *shape)})
    tx = optim.scale_by_muon(shape_scale=name, coefficients="exact")
    u, _ = tx.update(g, tx.init(g))
    got = np.linalg.svd(np.asarray(u["w"], np.float64), compute_uv=False)
    np.testing.assert_allclose(got, factor, rtol=1e-5)

  def test_rms_scale_gives_updates_of_that_size(self):
    for shape in [(32, 32), (16, 64), (64, 16)]:
      g = float32({"w": normal(0, *shape)})
      tx = optim.scale_by_muon(coefficients="exact")
      u, _ = tx.update(g, tx.init(g))
      self.assertAlmostEqual(jnp.sqrt(jnp.mean(u["w"] ** 2)), 0.2, places=5)

  def test_stacked_layers_are_separate_matrices(self):
    w = normal(0, 3, 6, 10)
    grads = [normal(i, 3, 6, 10) for i in range(1, 4)]
    tx = optim.muon(0.1, **exact_products)
    stacked, _ = run(tx, {"w": w}, [{"w": g} for g in grads])
    names = ["a", "b", "c"]
    split = lambda x: dict(zip(names, x, strict=True))
    apart, _ = run(tx, split(w), [split(g) for g in grads])
    for i, name in enumerate(names):
      np.testing.assert_allclose(stacked["w"][i], apart[name], atol=1e-5)

  def test_sign_and_scale_of_the_gradient(self):
    g = {"w": normal(0, 6, 4)}
    tx = optim.scale_by_muon(coefficients="exact")
    state = tx.init(float32(g))
    u, _ = tx.update(float32(g), state)
    v, _ = tx.update(jax.tree.map(lambda x: -1e-9 * x, float32(g)), state)
    np.testing.assert_allclose(u["w"], -v["w"], atol=1e-4)
    self.assertGreater(np.sum(u["w"] * g["w"]), 0)

  def test_momentum_dtype(self):
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    state = optim.scale_by_muon().init(params)
    self.assertEqual(state.momentum["w"].dtype, jnp.float32)
    tx = optim.scale_by_muon(momentum_dtype=jnp.bfloat16)
    u, state = tx.update(params, tx.init(params))
    self.assertEqual(state.momentum["w"].dtype, jnp.bfloat16)
    self.assertEqual(u["w"].dtype, jnp.bfloat16)
    with jax.enable_x64(True):
      state = optim.scale_by_muon().init({"w": jnp.ones((4, 4))})
      self.assertEqual(state.momentum["w"].dtype, jnp.float64)

  def test_float64(self):
    with jax.enable_x64(True):
      w, grads = normal(0, 6, 9), [normal(i, 6, 9) for i in range(1, 4)]
      want = reference_muon(
        w, grads, beta=0.95, nesterov=True, lr=0.1, wd=0.1, factor=0.2 * 3
      )
      tx = optim.muon(
        0.1, weight_decay=0.1, coefficients="keller", ns_dtype="float64"
      )
      params = {"w": jnp.asarray(w)}
      state = tx.init(params)
      for g in grads:
        u, state = tx.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, u)
      np.testing.assert_allclose(params["w"], want, atol=1e-12)

  def test_unknown_shape_scale(self):
    with self.assertRaisesRegex(ValueError, "shape_scale.*'rmss'"):
      optim.muon(0.1, shape_scale="rmss")


class MomentumTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_a_schedule_is_each_steps_rate(self, nesterov):
    warm_up = optax.linear_schedule(0.5, 0.9, 2)
    grads = [normal(i, 5, 7) for i in range(4)]
    m, want = 0.0, []
    for g, beta in zip(grads, (0.5, 0.7, 0.9, 0.9), strict=True):
      m = beta * m + (1 - beta) * g
      want.append(polynomial(beta * m + (1 - beta) * g if nesterov else m))
    own = dict(nesterov=nesterov, momentum=warm_up)
    own |= dict(shape_scale=None, coefficients="keller", ns_dtype="float64")
    factories = (optim.scale_by_muon, optax.inject_hyperparams(
      optim.scale_by_muon, static_args=("nesterov",)
    ))  # fmt: skip
    with jax.enable_x64(True):
      for factory in factories:
        tx = factory(**own)
        state = tx.init({"w": jnp.asarray(grads[0])})
        update = jax.jit(tx.update)
        for g, w in zip(grads, want, strict=True):
          u, state = update({"w": jnp.asarray(g)}, state)
          # optax counts a schedule's steps in float32.
          np.testing.assert_allclose(u["w"], w, atol=1e-5)

  def test_the_count_is_there_whether_a_schedule_reads_it_or_not(self):
    # A field that is None would be filled by `optax.tree.set(count=n)`.
    params = {"w": jnp.ones((2, 3))}
    for momentum in (0.9, lambda n: 0.1 * n):
      state = optim.scale_by_muon(momentum=momentum).init(params)
      self.assertEqual((state.count.dtype, int(state.count)), (jnp.int32, 0))

  def test_a_rate_of_one_is_refused(self):
    with self.assertRaisesRegex(ValueError, r"momentum.*\[0, 1\).*1.0"):
      optim.muon(0.1, momentum=1.0)


class NormalizeTest(parameterized.TestCase):
  @parameterized.product(
    shape=[(9, 20), (20, 9)], mode=["columns", "rows", "both"]
  )
  def test_is_muon_of_the_equilibrated_momentum(self, shape, mode):
    x = normal(0, *shape) * np.geomspace(1, 1e-3, shape[1])
    x[:, 3] = 0
    # Kernels are (in, out): a column is what one output reads.
    per_output = np.linalg.norm(x, axis=0, keepdims=True)
    per_output[per_output == 0] = 1
    per_input = np.linalg.norm(x, axis=1, keepdims=True)
    want = x
    if mode in ("columns", "both"):
      want = want / per_output
    if mode in ("rows", "both"):
      want = want / per_input
    own = dict(shape_scale=None, momentum=0.0, nesterov=False)
    tx = optim.scale_by_muon(normalize=mode, **own, **exact_products)
    # Two matrices at once; neither knows the other's scale.
    g = float32({"w": np.stack([x, 1e-25 * x])})
    u, _ = tx.update(g, tx.init(g))
    # Float32 rounding times Keller's slope of 485 at 0.
    for y in u["w"]:
      np.testing.assert_allclose(y, polynomial(want), atol=1e-4)
      np.testing.assert_array_equal(y[:, 3], 0)

  def test_unknown(self):
    with self.assertRaisesRegex(ValueError, "normalize.*'row'"):
      optim.scale_by_muon(normalize="row")


class BlocksTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("per_head", (2, 8, 12), dict(output_blocks=3), -1, (4, 8)),
    ("fused_qkv", (2, 8, 14), dict(output_blocks=(8, 4, 2)), -1, (8, 12)),
    ("of_the_output", (2, 12, 8), dict(input_blocks=3), -2, (4, 8)),
  )
  def test_a_leaf_in_blocks_is_its_blocks(self, shape, blocks, axis, ends):
    grads = [normal(i, *shape) for i in range(2)]
    cut = lambda x: dict(
      zip("abc", np.split(np.asarray(x), ends, axis=axis), strict=True)
    )
    axes = optim.MatrixAxes(-2, -1, **blocks)
    together = optim.muon(0.1, matrix_axes={"w": axes}, **exact_products)
    got, _ = run(together, {"w": grads[0]}, [{"w": g} for g in grads])
    apart = optim.muon(0.1, **exact_products)
    want, _ = run(apart, cut(grads[0]), [cut(g) for g in grads])
    for name, block in cut(got["w"]).items():
      np.testing.assert_allclose(block, want[name], atol=1e-5)


class LabelsTest(parameterized.TestCase):
  def tree(self):
    return float32(
      {
        "embed": {"table": normal(0, 12, 8)},
        "layers": {"up": normal(1, 2, 8, 16), "norm": normal(2, 2, 8)},
        "lm_head": normal(3, 8, 12),
        "bias": normal(4, 8),
      }
    )

  def test_default_fallback_is_adamw(self):
    params = self.tree()
    grads = [jax.tree.map(lambda x, i=i: x * i + 1, params) for i in (1, 2, 3)]
    got, _ = run(optim.muon(0.1, weight_decay=0.2), params, grads)
    adam = functools.partial(optax.adamw, 0.1, b1=0.9, b2=0.95, eps=1e-10)
    decayed, _ = run(adam(weight_decay=0.2), params, grads)
    plain, _ = run(adam(weight_decay=0.0), params, grads)
    for pick, want in [
      (lambda p: p["embed"]["table"], decayed),
      (lambda p: p["lm_head"], decayed),
      (lambda p: p["layers"]["norm"], plain),
      (lambda p: p["bias"], plain),
    ]:
      np.testing.assert_allclose(pick(got), pick(want), rtol=1e-5)

  def test_a_rate_is_that_of_the_default_fallback(self):
    params = self.tree()
    grads = [jax.tree.map(lambda x, i=i: x * i + 1, params) for i in (1, 2, 3)]
    one, _ = run(optim.muon(0.1, weight_decay=0.2), params, grads)
    other, _ = run(optim.muon(0.3, weight_decay=0.2), params, grads)
    schedule = optax.constant_schedule(0.3)
    got, _ = run(
      optim.muon(0.1, weight_decay=0.2, fallback=schedule), params, grads
    )
    other["layers"]["up"] = one["layers"]["up"]
    jax.tree.map(np.testing.assert_array_equal, got, other)
    with self.assertRaisesRegex(ValueError, "fallback must be at least 0"):
      optim.muon(0.1, fallback=-0.1)

  def test_own_fallback_takes_all_others(self):
    params = self.tree()
    got, _ = run(optim.muon(0.1, fallback=optax.sgd(1.0)), params, [params])
    for pick in (
      lambda p: p["embed"]["table"],
      lambda p: p["lm_head"],
      lambda p: p["layers"]["norm"],
      lambda p: p["bias"],
    ):
      np.testing.assert_array_equal(pick(got), 0)
    self.assertGreater(np.abs(got["layers"]["up"]).max(), 0.01)

  def test_own_labels(self):
    params = self.tree()
    labels = {
      "embed": "matrix",
      "layers": {"up": "vector", "norm": "vector"},
      "lm_head": "matrix",
      "bias": "head",
    }
    for given in (labels, lambda p: labels):
      tx = optim.muon(0.1, labels=given, fallback=optax.set_to_zero())
      updates, _ = tx.update(params, tx.init(params), params)
      moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
      self.assertEqual(
        moved,
        {
          "embed": {"table": True},
          "layers": {"up": False, "norm": False},
          "lm_head": True,
          "bias": False,
        },
      )

  def test_label_params_is_exported(self):
    self.assertEqual(
      optim.label_params(self.tree()),
      {
        "embed": {"table": "embedding"},
        "layers": {"up": "matrix", "norm": "vector"},
        "lm_head": "head",
        "bias": "vector",
      },
    )

  def test_a_vector_labelled_matrix_is_named(self):
    tx = optim.muon(0.1, labels=lambda p: jax.tree.map(lambda _: "matrix", p))
    with self.assertRaisesRegex(ValueError, r"'bias' has the shape \[8\]"):
      tx.init(self.tree())

  def test_schedules(self):
    params = self.tree()
    rate = optax.linear_schedule(0.1, 0.0, 2)
    got, _ = run(optim.muon(rate, weight_decay=0.1), params, [params] * 4)
    want, _ = run(optim.muon(0.1, weight_decay=0.1), params, [params])
    tx = optim.muon(0.05, weight_decay=0.1)
    _, state = run(optim.muon(0.1, weight_decay=0.1), params, [params])
    updates, _ = tx.update(params, state, want)
    want = optax.apply_updates(want, updates)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want
    )

  def test_bfloat16_fallback_moments_are_float32(self):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.tree())
    state = optim.muon(0.1).init(params)
    for x in jax.tree.leaves(state):
      self.assertIn(x.dtype, (jnp.float32, jnp.int32))

  def test_inject_hyperparams_changes_momentum(self):
    params = self.tree()
    tx = optax.inject_hyperparams(optim.muon)(
      learning_rate=0.1, momentum=0.9, weight_decay=0.1
    )
    state = tx.init(params)
    self.assertLessEqual(
      {"learning_rate", "momentum", "weight_decay"}, set(state.hyperparams)
    )
    _, state = tx.update(params, state, params)
    state.hyperparams["momentum"] = jnp.float32(0.0)
    _, state = jax.jit(tx.update)(params, state, params)
    inner = state.inner_state.inner_states["matrix"].inner_state[0]
    np.testing.assert_allclose(
      inner.momentum["layers"]["up"], params["layers"]["up"]
    )


class NnxTest(absltest.TestCase):
  def test_with_nnx_optimizer(self):
    class Model(nnx.Module):
      def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.lm_head = nnx.Linear(16, 11, rngs=rngs)

      def __call__(self, tokens):
        return self.lm_head(nnx.relu(self.up(self.embed(tokens))))

    tokens = jnp.arange(11)

    def loss(model):
      return optax.softmax_cross_entropy_with_integer_labels(
        model(tokens), (tokens + 1) % 11
      ).mean()

    for factory in (optim.muon, optim.column_normalized_sgd):
      model = Model(nnx.Rngs(0))
      optimizer = nnx.Optimizer(model, factory(0.02), wrt=nnx.Param)

      @nnx.jit
      def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

      first = step(model, optimizer)
      for _ in range(60):
        last = step(model, optimizer)
      self.assertLess(last, 0.3 * first)


if __name__ == "__main__":
  absltest.main()
