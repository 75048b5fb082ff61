"""ECO inside optax's wrappers, its arguments, memory; apply_updates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import optim
from jaxlib_ext import quantization

pytestmark = pytest.mark.slow

FORMATS = ("int4:8", "float8_e4m3fn", "mxfp8", "mxfp4", "nvfp4", "e3m2:8")


def sample(shape, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_params(name="int4:8"):
  return quantization.quantize_tree(
    {
      "embedding": jnp.asarray(sample((32, 8))),
      "layers": {"kernel": jnp.asarray(sample((2, 16, 8), 1))},
      "lm_head": jnp.asarray(sample((8, 32), 2)),
      "norm": jnp.ones((8,)),
      "out": jnp.asarray(sample((16, 8), 3)),
    },
    name,
  )


def make_grads(params, seed):
  leaves, treedef = jax.tree.flatten(params, is_leaf=quantization.is_qtensor)
  return treedef.unflatten(
    [jnp.asarray(sample(x.shape, seed + i)) for i, x in enumerate(leaves)]
  )


@functools.cache
def stepper(tx):
  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optim.apply_updates(params, updates), state

  return step


def run(tx, params, grads, state=None):
  step = stepper(tx)
  state = tx.init(params) if state is None else state
  for g in grads:
    params, state = step(params, state, g)
  assert step._cache_size() == 1, "recompiled"
  return params, state


def same_bits(tree, other) -> bool:
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
  )


def virtual(params, state):
  """z and the unquantized leaves: free of rounding's discontinuities."""
  return jax.tree.map(
    lambda p, u: p.dequantize() - state.horizon * u
    if quantization.is_qtensor(p) else p,
    params,
    state.u,
    is_leaf=quantization.is_qtensor,
  )  # fmt: skip


def assert_same_run(got, want):
  """Equal but for the order of a few float32 operations on numbers near 3."""
  for a, b in zip(
    jax.tree.leaves(virtual(*got)), jax.tree.leaves(virtual(*want)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=3 * 32 * 2.0**-24)


class WrappersTest(parameterized.TestCase):
  def test_after_clipping(self):
    params = make_params()
    grads = [make_grads(params, 10 * t) for t in range(3)]
    clip = optax.clip_by_global_norm(1.0)
    clipped = [clip.update(g, clip.init(g))[0] for g in grads]
    got, state = run(optax.chain(clip, optim.eco(0.1)), params, grads)
    want, inside = run(optim.eco(0.1), params, clipped)
    assert_same_run((got, state[1]), (want, inside))

  def test_injected_hyperparameters(self):
    params = make_params()
    grads = [make_grads(params, 10 * t) for t in range(3)]
    make = optax.inject_hyperparams(
      optim.eco, static_args=("labels",), hyperparam_dtype=jnp.float32
    )
    tx = make(0.1, weight_decay=0.1, labels=optim.label_params)
    got, state = run(tx, params, grads)
    plain = optim.eco(0.1, weight_decay=0.1)
    want, want_state = run(plain, params, grads)
    np.testing.assert_allclose(
      state.inner_state.horizon, want_state.horizon, rtol=1e-6
    )
    assert_same_run((got, state.inner_state), (want, want_state))
    state.hyperparams["learning_rate"] = jnp.zeros(())
    state = state._replace(
      inner_state=state.inner_state._replace(
        u=jax.tree.map(jnp.zeros_like, state.inner_state.u)
      )
    )
    still, _ = stepper(tx)(got, state, grads[0])
    self.assertTrue(same_bits(still, got))
    scheduled = make(optax.linear_schedule(0.1, 0.0, 10))
    _, state = run(scheduled, params, grads)
    self.assertLess(float(state.hyperparams["learning_rate"]), 0.1)

  @parameterized.parameters("int4:8", "mxfp8", "mxfp4", "nvfp4")
  def test_multi_steps(self, name):
    params = make_params(name)
    grads = [make_grads(params, 10 * t) for t in range(4)]
    tx = optax.MultiSteps(optim.eco(0.1, weight_decay=0.1), 2)
    state = tx.init(jax.eval_shape(quantization.dequantize_tree, params))
    once, state = run(tx, params, grads[:1], state)
    self.assertTrue(same_bits(once, params))
    twice, state = run(tx, once, grads[1:2], state)
    mean = [
      jax.tree.map(lambda a, b: a + (b - a) / 2, *grads[i : i + 2])
      for i in (0, 2)
    ]
    plain = optim.eco(0.1, weight_decay=0.1)
    want, want_state = run(plain, params, mean[:1])
    assert_same_run((twice, state.inner_opt_state), (want, want_state))
    thrice, state = run(tx, twice, grads[2:3], state)
    self.assertTrue(same_bits(thrice, twice))
    last, state = run(tx, thrice, grads[3:], state)
    want, want_state = run(plain, want, mean[1:], want_state)
    assert_same_run((last, state.inner_opt_state), (want, want_state))
    flushed = optim.eco_flush(last, state)
    inside = optim.eco_flush(last, state.inner_opt_state)
    self.assertTrue(same_bits(flushed, inside))

  def test_skipping_bad_gradients(self):
    params = make_params("mxfp4")
    good, bad = make_grads(params, 0), make_grads(params, 1)
    bad["out"] = bad["out"].at[0, 0].set(jnp.nan)
    tx = optax.MultiSteps(
      optim.eco(0.1), 1, should_skip_update_fn=optax.skip_not_finite
    )
    state = tx.init(jax.eval_shape(quantization.dequantize_tree, params))
    new, state = run(tx, params, [bad], state)
    self.assertTrue(same_bits(new, params))
    got, state = run(tx, params, [good], state)
    want = run(optim.eco(0.1), params, [good])
    assert_same_run((got, state.inner_opt_state), want)

  def test_flush_finds_its_state(self):
    params = make_params()
    with self.assertRaisesRegex(ValueError, "got 0"):
      optim.eco_flush(params, optax.EmptyState())
    state = optim.eco(0.1).init(params)
    with self.assertRaisesRegex(ValueError, "got 2"):
      optim.eco_flush(params, (state, [state]))
    self.assertTrue(same_bits(optim.eco_flush(params, [state]), params))


class OtherLeavesTest(parameterized.TestCase):
  def test_default_is_adamw_without_decay_of_vectors(self):
    params = make_params()
    grads = [make_grads(params, 10 * t) for t in range(2)]
    got, _ = run(optim.eco(0.1, weight_decay=0.3), params, grads)
    names = ("embedding", "lm_head", "norm")
    floats = {name: params[name] for name in names}
    adamw = optax.adamw(
      0.1, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.3,
      mask={"embedding": True, "lm_head": True, "norm": False},
    )  # fmt: skip
    want, _ = run(adamw, floats, [{n: g[n] for n in names} for g in grads])
    for name in names:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)

  def test_fallback_and_labels(self):
    params = make_params()
    grads = make_grads(params, 0)
    tx = optim.eco(0.1, fallback=optax.sgd(1.0))
    got, _ = run(tx, params, [grads])
    np.testing.assert_allclose(got["norm"], params["norm"] - grads["norm"])
    self.assertTrue(quantization.is_qtensor(got["layers"]["kernel"]))

    labels = {"a": "embedding", "b": "matrix"}
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    params = quantization.quantize_tree(params, "int8", labels=labels)
    self.assertFalse(quantization.is_qtensor(params["a"]))
    got, _ = run(optim.eco(0.1, labels=labels), params, [make_grads(params, 0)])
    self.assertTrue(quantization.is_qtensor(got["b"]))

  def test_bfloat16_leaves_keep_their_dtype(self):
    params = {**make_params(), "norm": jnp.ones((8,), jnp.bfloat16)}
    grads = make_grads(params, 0)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
    got, state = run(optim.eco(0.1), params, [grads, grads])
    self.assertEqual(got["norm"].dtype, jnp.bfloat16)
    self.assertEqual(state.u["out"].dtype, jnp.float32)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"momentum": 0.0}, "momentum"),
    ({"momentum": 1.0}, "momentum"),
    ({"momentum": -0.5}, "momentum"),
    ({"rounding": "up"}, "rounding: got 'up'"),
    ({"weight_decay": 2.0}, "learning_rate"),
  )
  def test_arguments(self, kwargs, said):
    with self.assertRaisesRegex(ValueError, said):
      optim.eco(0.1, **kwargs)

  def test_parameters(self):
    params = make_params()
    tx = optim.eco(0.1)
    with self.assertRaisesRegex(ValueError, "'out'.*quantize_tree"):
      tx.init({**params, "out": jnp.ones((16, 8))})
    state = tx.init(params)
    grads = make_grads(params, 0)
    with self.assertRaisesRegex(ValueError, "needs the parameters"):
      tx.update(grads, state)
    with self.assertRaisesRegex(ValueError, "'out'.*quantize_tree"):
      stepper(tx)({**params, "out": jnp.ones((16, 8))}, state, grads)
    embedding = quantization.quantize(params["embedding"], "int8")
    with self.assertRaisesRegex(ValueError, "'embedding' is a QTensor"):
      tx.init({**params, "embedding": embedding})


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters("int4:32", "float8_e4m3fn")
  def test_no_float_copy_between_steps(self, name):
    shape = (4, 256, 256)
    params = quantization.quantize_tree({"w": sample(shape)}, name)
    tx = optim.eco(0.1, weight_decay=0.1)
    state = tx.init(params)
    n = 4 * 256 * 256

    def step(params, state, grads):
      updates, state = tx.update(grads, state, params)
      return optim.apply_updates(params, updates), state

    compiled = (
      jax.jit(step, donate_argnums=(0, 1))
      .lower(params, state, {"w": jnp.zeros(shape)})
      .compile()
    )
    memory = compiled.memory_analysis()
    held = params["w"].nbytes_packed + 4 * n  # The codes and u.
    scalars = 1024
    self.assertLess(memory.argument_size_in_bytes, held + 4 * n + scalars)
    self.assertLess(memory.output_size_in_bytes, held + scalars)
    # All but the gradients is updated in place.
    self.assertGreater(memory.alias_size_in_bytes, held - scalars)


class ApplyUpdatesTest(parameterized.TestCase):
  def test_arrays_as_optax(self):
    params = {"a": jnp.ones((3,), jnp.bfloat16), "b": None, "c": jnp.ones(2)}
    updates = {"a": jnp.full((3,), 0.5), "b": None, "c": jnp.ones(2)}
    got = optim.apply_updates(params, updates)
    want = optax.apply_updates(params, updates)
    self.assertTrue(same_bits(got, want))
    self.assertEqual(got["a"].dtype, jnp.bfloat16)
    self.assertIsNone(got["b"])

  @parameterized.parameters(*FORMATS)
  def test_replaces_unless_zeroed(self, name):
    old = quantization.quantize(sample((16, 8)), name)
    for x in (sample((16, 8), 1), np.zeros((16, 8), np.float32)):
      new = quantization.quantize(x, name)
      self.assertTrue(same_bits(optim.apply_updates(old, new), new))
    zeroed = jax.tree.map(jnp.zeros_like, new)
    self.assertTrue(same_bits(optim.apply_updates(old, zeroed), old))

  @parameterized.parameters(*FORMATS)
  def test_updates_that_were_computed_with(self, name):
    params = quantization.quantize_tree({"w": jnp.ones((16, 8))}, name)
    tx = optim.eco(1e-2)
    grads = {"w": jnp.ones((16, 8))}
    updates, _ = tx.update(grads, tx.init(params), params)
    got = optim.apply_updates(params, updates)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(params))
    self.assertTrue(same_bits(got["w"].codes, updates["w"].codes))
    zeroed = jax.tree.map(jnp.zeros_like, updates)
    self.assertTrue(same_bits(optim.apply_updates(params, zeroed), params))
    # u = 0.1 · 0.01, within a rounding at random of the coarsest format.
    np.testing.assert_allclose(got["w"].dequantize(), 0.999, atol=0.5)

    for apply in (optax.apply_updates, jax.jit(optax.apply_updates)):
      with self.assertRaisesRegex(ValueError, r"optim\.apply_updates puts"):
        apply(params, updates)
    with self.assertRaisesRegex(ValueError, r"optim\.apply_updates puts"):
      optax.add_decayed_weights(0.1).update(updates, None, params)
    for compute in (
      lambda u: u + u,
      lambda u: -u,
      lambda u: jnp.asarray(1e-3, u.dtype) * u,
      lambda u: jnp.clip(u, -1, 1),
      lambda u: u.astype(jnp.float32) * 0.1,
    ):
      changed = jax.tree.map(compute, updates)
      with self.assertRaisesRegex(ValueError, "come before the one"):
        optim.apply_updates(params, changed)
    sums = jax.tree.map(lambda u: u + u, updates)
    got = jax.jit(optim.apply_updates)(params, sums)
    self.assertTrue(np.all(np.isnan(got["w"].dequantize())))

  def test_other_optimizers_of_quantized_parameters(self):
    params = quantization.quantize_tree({"w": jnp.ones((16, 8))}, "int8")
    for tx in (optim.q_galore(1e-2), optim.qzo(1e-2)):
      value = lambda p: jnp.sum(p["w"].dequantize())
      tx = optax.with_extra_args_support(tx)
      updates, _ = tx.update(
        {"w": jnp.ones((16, 8))}, tx.init(params), params, value_fn=value
      )
      self.assertTrue(quantization.is_qtensor(updates["w"]))
      with self.assertRaisesRegex(ValueError, r"optim\.apply_updates puts"):
        optax.apply_updates(params, updates)
      got = optim.apply_updates(params, updates)
      self.assertEqual(jax.tree.structure(got), jax.tree.structure(params))

  def test_errors(self):
    old = quantization.quantize(sample((16, 8)), "int8")
    for new in (
      jnp.zeros((16, 8)),
      quantization.quantize(sample((16, 8)), "int4"),
      quantization.quantize(sample((8, 8)), "int8"),
    ):
      with self.assertRaisesRegex(ValueError, "QTensor of format int8"):
        optim.apply_updates({"w": old}, {"w": new})


if __name__ == "__main__":
  absltest.main()
