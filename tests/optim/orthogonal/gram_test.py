"""The Gram form against the direct one and against the scalar polynomials."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim
from optim.orthogonal import gram
from tests.optim.orthogonal.polynomials import (
  TABLES,
  largest,
  matrices,
  polynomial,
)


@functools.partial(
  jax.jit,
  static_argnames=("dtype", "form"),
)
def run(x, table, *, dtype, form):
  return optim.newton_schulz(
    x, coefficients=table, dtype=dtype, form=form, precision="highest"
  )


class RangeTest(parameterized.TestCase):
  @parameterized.product(aspect=[1, 4, 40], name=list(TABLES))
  def test_bfloat16_keeps_the_direct_forms_range(self, aspect, name):
    x = jnp.asarray(matrices(16, 16 * aspect), jnp.float32)
    table = jnp.asarray(TABLES[name], jnp.float32)
    ideal = polynomial(x, TABLES[name])
    direct = run(x, table, dtype="bfloat16", form="direct")
    got = run(x, table, dtype="bfloat16", form="gram")
    # 2^-8 is what bfloat16's rounding does to a value of 1.
    self.assertLess(largest(got).max(), largest(direct).max() + 0.004)
    # Both round the input, which is most of what they err by; where that is
    # little, a form may be ahead by chance.
    error = lambda y: largest(np.asarray(y, np.float64) - ideal)
    np.testing.assert_array_less(error(got), 1.2 * error(direct) + 0.004)

  @parameterized.product(aspect=[1, 4], name=list(TABLES))
  def test_float32_is_the_polynomial(self, aspect, name):
    x = jnp.asarray(matrices(16, 16 * aspect), jnp.float32)
    table = jnp.asarray(TABLES[name], jnp.float32)
    got = run(x, table, dtype="float32", form="gram")
    # Three steps between restarts multiply what rounding (6e-8) does to R by
    # slopes of 16 · 16 · 11 in R, and of 4 · 4 · 3 · 2 in Q.
    np.testing.assert_allclose(got, polynomial(x, TABLES[name]), atol=2e-3)

  @parameterized.parameters((8, 8), (5, 17), (17, 5), (2, 3, 9, 4), (1, 6))
  def test_float64_is_the_polynomial(self, *shape):
    with jax.enable_x64(True):
      x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
      y = optim.newton_schulz(x, dtype="float64", form="gram")
      want = polynomial(x, TABLES["polar_express"])
      np.testing.assert_allclose(y, want, atol=1e-11)

  def test_zeros_give_zeros_beside_others(self):
    x = jnp.asarray(matrices(16, 16), jnp.float32).at[1].set(0)
    table = jnp.asarray(TABLES["keller"], jnp.float32)
    y = run(x, table, dtype="bfloat16", form="gram")
    np.testing.assert_array_equal(y[1], 0)
    self.assertGreater(np.abs(y[0]).max(), 0.1)


def product_cost(f, x):
  """Multiplications and additions of f's products, float32 ones 15-fold.

  Those whose precision is the platform's choice count once.
  """
  return sum(_cost(eqn) for eqn in jax.make_jaxpr(f)(x).jaxpr.eqns)


def _cost(eqn):
  if eqn.primitive.name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval
    inner = np.prod([left.shape[axis] for axis in contract])
    full = left.dtype == jnp.float32 and eqn.params["precision"] is not None
    size = np.prod(eqn.outvars[0].aval.shape)
    return 2 * int(inner) * int(size) * (15 if full else 1)
  times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
  inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
  return times * sum(
    _cost(e) for sub in inner for e in getattr(sub, "eqns", [])
  )


class ChoiceTest(parameterized.TestCase):
  @parameterized.product(
    case=[
      ("bfloat16", None, {"direct", "gram"}),
      ("float32", "highest", {"direct", "gram"}),
      ("float32", None, {"direct"}),
    ],
    steps=[2, 5, 8],
  )
  def test_takes_the_form_of_fewer_flops(self, case, steps):
    dtype, precision, want = case
    chosen = set()
    for n in (8, 12, 16, 24, 192, 512, 1600):
      x = jax.ShapeDtypeStruct((8, n), jnp.float32)
      f = functools.partial(
        optim.newton_schulz, dtype=dtype, precision=precision, steps=steps
      )
      own, direct, other = (
        product_cost(functools.partial(f, form=form), x)
        for form in (None, "direct", "gram")
      )
      self.assertEqual(own, min(direct, other), n)
      chosen.add("gram" if other < direct else "direct")
    self.assertEqual(chosen, want)

  @parameterized.parameters(
    ("exact", None), (TABLES["keller"], None), ("polar_express", 9)
  )
  def test_nothing_unproven_is_chosen(self, coefficients, steps):
    x = jax.ShapeDtypeStruct((4, 4000), jnp.float32)
    f = functools.partial(
      optim.newton_schulz,
      coefficients=coefficients,
      steps=steps,
      precision="highest",
    )
    direct = jax.make_jaxpr(functools.partial(f, form="direct"))(x)
    self.assertEqual(str(jax.make_jaxpr(f)(x)), str(direct))

  def test_segments(self):
    self.assertEqual(gram.segments(5, jnp.bfloat16), (5,))
    self.assertEqual(gram.segments(5, jnp.float32), (2, 3))
    self.assertEqual(gram.segments(8, jnp.bfloat16), (4, 4))
    self.assertEqual(gram.segments(1, jnp.float64), (1,))

  def test_an_unknown_form(self):
    with self.assertRaisesRegex(ValueError, "form must be.*got 'grams'"):
      optim.newton_schulz(jnp.ones((3, 4)), form="grams")


if __name__ == "__main__":
  absltest.main()
