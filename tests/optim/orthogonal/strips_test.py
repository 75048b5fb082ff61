"""Newton-Schulz of matrices in strips against the scalar polynomials."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim
from jaxlib_ext import hlo
from optim.orthogonal import schedules, strips
from tests.optim.orthogonal.polynomials import (
  TABLES,
  largest,
  matrices,
  polynomial,
)


@functools.partial(jax.jit, static_argnames=("count", "predict", "dtype"))
def run(x, table, *, count, dtype="float32", predict=True, divisor=1.0):
  """`strips.iterate` of [b, m, n], each matrix in `count` strips."""
  x = x / (divisor * jnp.linalg.norm(x, axis=(1, 2), keepdims=True))
  y = jnp.stack(jnp.split(x.astype(dtype), count, axis=2))
  total = lambda y, narrow: jax.lax.psum(
    y.astype(narrow).astype(y.dtype), "strip"
  )
  iterate = functools.partial(
    strips.iterate,
    table=table,
    total=total,
    precision="highest",
    predict=predict,
  )
  y = jax.vmap(iterate, axis_name="strip")(y)
  return jnp.concatenate(list(y), axis=2)


def error(x, want):
  return np.abs(np.asarray(x, np.float64) - want).max()


class StripsTest(parameterized.TestCase):
  @parameterized.product(
    # 256 is in two blocks, 512 in four; 300 is not cut.
    shape=[(1, 6), (5, 16), (16, 16), (256, 256), (300, 302), (512, 520)],
    predict=[False, True],
  )
  def test_float64_is_the_polynomial(self, shape, predict):
    with jax.enable_x64(True):
      x = np.random.default_rng(0).normal(size=(1, *shape))
      for name, table in TABLES.items():
        got = run(
          jnp.asarray(x),
          jnp.asarray(table),
          count=2,
          dtype="float64",
          predict=predict,
        )
        # Slopes of up to 8 · 4 · 4 · 3 · 2 multiply roundings of 1e-16.
        self.assertLess(error(got, polynomial(x, table)), 1e-12, name)

  @parameterized.product(
    shape=[(16, 16), (16, 64), (256, 512)], name=list(TABLES)
  )
  def test_float32_is_the_polynomial(self, shape, name):
    x = matrices(*shape)
    got = run(jnp.asarray(x, jnp.float32), jnp.float32(TABLES[name]), count=4)
    # As above, of 6e-8.
    self.assertLess(error(got, polynomial(x, TABLES[name])), 5e-5)

  @parameterized.product(
    shape=[(16, 16), (16, 64), (256, 512)],
    name=list(TABLES),
    steps=[5, 6, 8],
  )
  def test_bfloat16_keeps_the_direct_forms_range(self, shape, name, steps):
    x = jnp.asarray(matrices(*shape), jnp.float32)
    table, divisor = schedules.resolve(name, steps, jnp.float32)
    direct = optim.newton_schulz(x, coefficients=name, steps=steps)
    got = run(x, table, count=2, dtype="bfloat16", divisor=divisor)
    # 5 times what bfloat16's rounding does to a value of 1, for a² of 11 to
    # 16 in the steps that predict.
    self.assertLess(largest(got).max(), largest(direct).max() + 0.02)
    if steps == 5:
      # It errs by no more than twice what the direct form does.
      want = polynomial(x, TABLES[name])
      gap = lambda y: np.linalg.norm(
        np.asarray(y, np.float64) - want, axis=(1, 2)
      )
      size = np.linalg.norm(want, axis=(1, 2))
      np.testing.assert_array_less(gap(got), 2 * gap(direct) + 0.01 * size)

  def test_zeros_give_zeros(self):
    x = jnp.zeros((1, 4, 8)).at[:, :2, :5].set(matrices(8, 8)[:1, :2, :5])
    got = run(x, jnp.float32(TABLES["keller"]), count=2)
    small = polynomial(x[:, :2, :5], TABLES["keller"])
    np.testing.assert_allclose(got[:, :2, :5], small, atol=1e-4)
    np.testing.assert_array_equal(got[:, 2:], 0)
    np.testing.assert_array_equal(got[:, :, 5:], 0)

  @parameterized.product(
    shape=[(16, 24), (256, 256), (1024, 1032)],
    steps=[1, 2, 5, 6],
    predict=[False, True],
  )
  def test_counts(self, shape, steps, predict):
    m, n = shape
    sums = []

    def total(y, dtype):
      sums.append((y.size, dtype))
      return y

    f = lambda x, table: strips.iterate(
      x, table, total=total, precision=None, predict=predict
    )
    x = jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((steps, 3), jnp.float32)
    compiled = jax.jit(f).lower(x, table).compile()
    exchanges = strips.exchanges(steps, predict)
    self.assertEqual(sums, [(strips.entries(m), jnp.bfloat16)] * exchanges)
    want = strips.flops(m, n, steps, predict)
    self.assertEqual(hlo.costs(compiled.as_text()).matmul_flops, want)

  def test_half_of_a_symmetric_matrix(self):
    self.assertEqual(strips.entries(255), 255 * 255)
    self.assertEqual(strips.entries(256), 0.75 * 256**2)
    self.assertEqual(strips.entries(640), 0.625 * 640**2)
    self.assertEqual(strips.entries(4096), 0.5625 * 4096**2)


if __name__ == "__main__":
  absltest.main()
