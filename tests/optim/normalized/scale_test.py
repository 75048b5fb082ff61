"""SCALE against a numpy float64 version in the torch layout of its paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def unit_columns(g):
  """For a kernel (in, out): one norm per output unit."""
  out = np.empty_like(g)
  for j in range(g.shape[1]):
    out[:, j] = g[:, j] / max(np.sqrt(np.mean(g[:, j] ** 2)), 1e-8)
  return out


class ColumnNormTest(parameterized.TestCase):
  def apply(self, g, **kwargs):
    tx = optim.scale_by_column_norm(**kwargs)
    out, state = jax.jit(tx.update)({"w": g}, tx.init({"w": g}))
    self.assertEmpty(jax.tree.leaves(state))
    return out["w"]

  def test_fan_in_is_axis_0(self):
    g = normal(0, 6, 4)
    got = self.apply(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got, unit_columns(g), rtol=1e-6)

  @parameterized.parameters(1, -1)
  def test_fan_out_is_axis_1(self, axis):
    g = normal(0, 6, 4)
    got = self.apply(jnp.asarray(g, jnp.float32), axis=axis)
    np.testing.assert_allclose(got, unit_columns(g.T).T, rtol=1e-6)

  @parameterized.parameters(0, -2)
  def test_leading_axes_are_a_batch(self, axis):
    g = normal(0, 2, 3, 6, 4)
    got = self.apply(jnp.asarray(g, jnp.float32), axis=axis)
    for index in np.ndindex(2, 3):
      np.testing.assert_allclose(got[index], unit_columns(g[index]), rtol=1e-6)

  def test_a_vector_is_one_column(self):
    g = normal(0, 6)
    got = self.apply(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got, unit_columns(g[:, None])[:, 0], rtol=1e-6)

  def test_zero_columns_stay_zero(self):
    g = jnp.asarray(normal(0, 6, 4), jnp.float32).at[:, 1].set(0)
    got = self.apply(g)
    np.testing.assert_array_equal(got[:, 1], 0)
    np.testing.assert_allclose(got, unit_columns(np.float64(g)), rtol=1e-6)

  @parameterized.parameters(1e-30, 1e-20, 1e-9, 1e-7, 1e20, 8e37)
  def test_any_size(self, size):
    g = (normal(0, 6, 4) * size).astype(np.float32)
    want = unit_columns(g.astype(np.float64))
    np.testing.assert_allclose(self.apply(g), want, rtol=1e-6, atol=1e-37)

  def test_sizes_far_apart_in_one_tree(self):
    sizes = {"a": 1.0, "b": 1e25, "c": 1e-25}
    g = {k: (normal(0, 6, 4) * v).astype(np.float32) for k, v in sizes.items()}
    tx = optim.scale_by_column_norm()
    got, _ = jax.jit(tx.update)(g, tx.init(g))
    for k, x in g.items():
      want = unit_columns(x.astype(np.float64))
      np.testing.assert_allclose(got[k], want, rtol=1e-6)

  @parameterized.parameters(1, 7, 8, 9, 65, 130)
  def test_long_rows(self, rows):
    g = normal(0, 2, rows, 8200).astype(np.float32)
    got = self.apply(g)
    for one, x in zip(got, g.astype(np.float64), strict=True):
      want = x / np.sqrt(np.mean(x**2, axis=0))
      np.testing.assert_allclose(one, want, rtol=1e-6)

  def test_eps_is_the_smallest_divisor(self):
    g = jnp.full((6, 4), 0.5)
    np.testing.assert_allclose(self.apply(g, eps=2.0), 0.25, rtol=1e-6)

  def test_dtypes(self):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
      self.assertEqual(self.apply(jnp.ones((2, 3), dtype)).dtype, dtype)
    with jax.enable_x64(True):
      g = normal(0, 6, 4)
      np.testing.assert_allclose(
        self.apply(jnp.asarray(g)), unit_columns(g), rtol=1e-14
      )

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "axis must be .* got 2"):
      optim.scale_by_column_norm(axis=2)
    with self.assertRaisesRegex(ValueError, "'w'"):
      self.apply(jnp.float32(1.0))


class ColumnNormalizedSgdTest(parameterized.TestCase):
  def params(self):
    return {
      "embed_tokens": normal(0, 12, 8),
      "layers": {"up": normal(1, 2, 8, 16), "norm": normal(2, 2, 8)},
      "lm_head": normal(3, 8, 12),
      "norm": normal(4, 8),
    }

  def run_ours(self, tx, params, grads):
    params = float32(params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in grads:
      updates, state = update(float32(g), state, params)
      params = optax.apply_updates(params, updates)
    return params, state

  @parameterized.parameters((0.0, None), (0.3, None), (0.3, 0.5))
  def test_is_the_published_loop(self, wd, vector_lr):
    lr = 0.1
    params = self.params()
    grads = [
      jax.tree.map(lambda x, i=i: normal(i, *x.shape) + 0.1 * x, params)
      for i in range(10, 14)
    ]
    got, _ = self.run_ours(
      optim.column_normalized_sgd(
        lr, weight_decay=wd, vector_learning_rate=vector_lr
      ),
      params,
      grads,
    )

    def plain(w, gs):
      for g in gs:
        w = (1 - lr * wd) * w - lr * unit_columns(g)
      return w

    def head(w, gs):
      m = np.zeros_like(w)
      for g in gs:
        m = 0.9 * m + 0.1 * g
        w = (1 - lr * wd) * w - lr * unit_columns(m)
      return w

    def adam(w, gs):
      m, v = np.zeros_like(w), np.zeros_like(w)
      for t, g in enumerate(gs, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - (vector_lr or lr) * step
      return w

    def near(a, b, atol=2e-6):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)

    # 1 - 0.999^t in float32 is off by 6e-8 / 1e-3 relative, and the step by
    # half of that: 3e-5 of each of the four.
    adam_error = 4 * 3e-5 * (vector_lr or lr)
    near(
      got["embed_tokens"],
      plain(params["embed_tokens"], [g["embed_tokens"] for g in grads]),
    )
    for i in range(2):
      near(
        got["layers"]["up"][i],
        plain(params["layers"]["up"][i], [g["layers"]["up"][i] for g in grads]),
      )
    near(got["lm_head"], head(params["lm_head"], [g["lm_head"] for g in grads]))
    near(
      got["norm"], adam(params["norm"], [g["norm"] for g in grads]), adam_error
    )
    near(
      got["layers"]["norm"],
      adam(params["layers"]["norm"], [g["layers"]["norm"] for g in grads]),
      adam_error,
    )

  def test_only_head_and_vectors_have_state(self):
    params = float32(self.params())
    state = optim.column_normalized_sgd(0.1).init(params)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.ndim)
    self.assertEqual(sizes, [8, 8, 16, 16, 96])

  def test_schedules(self):
    params = self.params()
    rate = optax.piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.0})
    tx = optim.column_normalized_sgd(rate, vector_learning_rate=lambda _: 0.0)
    got, _ = self.run_ours(tx, params, [params] * 5)
    want = params["lm_head"] - 0.15 * unit_columns(params["lm_head"])
    np.testing.assert_allclose(got["lm_head"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got["norm"], np.float32(params["norm"]))

  def test_bfloat16_updates_round_once(self):
    params = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), float32(self.params())
    )
    tx = optim.column_normalized_sgd(0.1, weight_decay=0.3)
    updates, _ = tx.update(params, tx.init(params), params)
    exact = jax.tree.map(np.float64, params)["embed_tokens"]
    want = -0.1 * (unit_columns(exact) + 0.3 * exact)
    np.testing.assert_allclose(
      np.float64(updates["embed_tokens"]), want, rtol=2.0**-8 + 1e-6
    )

  @parameterized.parameters("columns", "rows", "sign", "spectral")
  def test_normalizations(self, kind):
    params = self.params()
    grads = [jax.tree.map(lambda x: x + 0.3, params)]

    def rows(g):
      return np.swapaxes(unit_columns(np.swapaxes(g, -1, -2)), -1, -2)

    def polar(g):
      u, _, vt = np.linalg.svd(g, full_matrices=False)
      return np.sqrt(max(g.shape)) * (u @ vt)

    of = {"columns": unit_columns, "rows": rows, "sign": np.sign}
    tx = optim.column_normalized_sgd(0.1, normalization=kind)
    got, _ = self.run_ours(tx, params, grads)
    for pick in (
      lambda p: p["embed_tokens"],
      lambda p: p["layers"]["up"][1],
      lambda p: p["lm_head"],
    ):
      w, g = pick(params), pick(grads[0])
      u = (w - np.asarray(pick(got), np.float64)) / 0.1
      # Updates of 1 on weights of up to 4, at a rate of 0.1.
      rounding = 40 * 2.0**-23
      if kind == "spectral":
        want = polar(g)
        # Muon's polynomials in bfloat16: singular values within 0.15 of 1.
        cosine = np.vdot(u, want) / np.linalg.norm(u) / np.linalg.norm(want)
        self.assertGreater(cosine, 0.99)
        self.assertAlmostEqual(np.sqrt(np.mean(u**2)), 1, delta=0.15)
      else:
        np.testing.assert_allclose(u, of[kind](g), atol=3 * rounding)
        self.assertAlmostEqual(np.sqrt(np.mean(u**2)), 1, delta=1e-4)

  def test_spectral_to_rounding(self):
    g = float32({"w": normal(0, 2, 24, 9)})
    tx = optim.scale_by_spectral_norm(coefficients="exact")
    got, _ = jax.jit(tx.update)(g, tx.init(g))
    values = np.linalg.svd(np.float64(got["w"]), compute_uv=False)
    np.testing.assert_allclose(values, np.sqrt(24), rtol=1e-5)
    self.assertGreater(np.vdot(got["w"], g["w"]), 0)
    with self.assertRaisesRegex(ValueError, "spectral.*'b'"):
      tx.init({"b": jnp.ones(3)})

  @parameterized.parameters(
    ((), 0),
    (("head",), 96),
    (("embedding", "head"), 192),
    (("matrix", "embedding", "head"), 448),
  )
  def test_momentum_on(self, where, entries):
    params = self.params()
    grads = [
      jax.tree.map(lambda x, i=i: normal(i, *x.shape), params) for i in (10, 11)
    ]
    tx = optim.column_normalized_sgd(0.1, momentum_on=where)
    got, state = self.run_ours(tx, params, grads)
    adam = 2 * sum(params[k].size for k in ("norm",)) + 2 * 16
    sizes = [x.size for x in jax.tree.leaves(state) if x.ndim]
    self.assertEqual(sum(sizes), entries + adam)
    for label, pick in (
      ("matrix", lambda p: p["layers"]["up"][0]),
      ("embedding", lambda p: p["embed_tokens"]),
      ("head", lambda p: p["lm_head"]),
    ):
      a, b = pick(grads[0]), pick(grads[1])
      second = 0.09 * a + 0.1 * b if label in where else b
      want = pick(params) - 0.1 * (unit_columns(a) + unit_columns(second))
      np.testing.assert_allclose(pick(got), want, rtol=1e-5, atol=1e-6)

  def test_refuses_unknown_ablations(self):
    with self.assertRaisesRegex(ValueError, "normalization.*'column'"):
      optim.column_normalized_sgd(0.1, normalization="column")
    for where in (("vector",), "head", ("heads",)):
      with self.assertRaisesRegex(ValueError, "momentum_on must be a tuple"):
        optim.column_normalized_sgd(0.1, momentum_on=where)

  def test_labels(self):
    params = float32({"w": normal(0, 4, 6)})
    for labels in ({"w": "head"}, lambda p: {"w": "head"}):
      state = optim.column_normalized_sgd(0.1, labels=labels).init(params)
      self.assertEqual(
        [x.shape for x in jax.tree.leaves(state) if x.ndim], [(4, 6)]
      )
    with self.assertRaisesRegex(ValueError, "labels: got 'matrx'"):
      optim.column_normalized_sgd(0.1, labels={"w": "matrx"}).init(params)


if __name__ == "__main__":
  absltest.main()
