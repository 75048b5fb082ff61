"""Forward mode and second derivatives of linear attention, by differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.kernels_pallas import linear_cases as cases

SHAPE = cases.Shape(b=1, t=19, g=1, h=2, k=3, v=2)
IDS = np.array([[0] * 5 + [1] * 14])
STEP = 1e-5
# Central differences: 1e-10 of third derivatives, and 1e-16 / STEP of noise.
BOUND = 1e-6


def problem(name, **options):
  """A loss, where, and a direction."""
  member = cases.MEMBERS[name]
  rng = np.random.default_rng(0)
  arrays = cases.make(member, SHAPE)
  if "log_decay" in arrays:  # States that last, so that nothing is small.
    arrays["log_decay"] = 0.2 * arrays["log_decay"]
  arrays = jax.tree.map(jnp.asarray, arrays)
  direction = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape)), arrays
  )
  weights = jnp.asarray(rng.standard_normal(arrays["v"].shape))

  def loss(arrays):
    o, state = cases.call(member.op, arrays, segment_ids=IDS, **options)
    squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(state))
    return jnp.sum(jnp.sin(o) * weights) + squares

  return loss, arrays, direction


def difference(f, arrays, direction):
  at = lambda step: f(
    jax.tree.map(lambda x, d: x + step * d, arrays, direction)
  )
  return jax.tree.map(
    lambda a, b: np.asarray(a - b) / (2 * STEP), at(STEP), at(-STEP)
  )


def dot(a, b):
  return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


# Two ways to a Hessian by a vector; forward mode alone.
SECOND = {
  "jvp of grad": lambda f, x, d: jax.jvp(jax.grad(f), (x,), (d,))[1],
  "grad of grad": lambda f, x, d: jax.grad(lambda x: dot(jax.grad(f)(x), d))(x),
  "grad of jvp": lambda f, x, d: jax.grad(lambda x: jax.jvp(f, (x,), (d,))[1])(
    x
  ),
}
FIRST = {
  "jvp": lambda f, x, d: jax.jvp(f, (x,), (d,))[1],
  "linearize": lambda f, x, d: jax.linearize(f, x)[1](d),
  "vmap": lambda f, x, d: jax.vmap(lambda d: jax.jvp(f, (x,), (d,))[1])(
    jax.tree.map(lambda d: d[None], d)
  )[0],
}
TABLE = {
  f"{name}-{implementation}": (name, implementation)
  for name in cases.MEMBERS
  for implementation in ("xla", "reference")
  if implementation == "xla" or name in ("gla", "mdn_erase")
}


@pytest.mark.parametrize(
  "name, implementation", quick.cases(TABLE, {"mdn-xla"})
)
def test_derivatives(name, implementation):
  with jax.enable_x64(True):
    loss, *at = problem(name, implementation=implementation)
    first = difference(jax.jit(loss), *at)
    second = difference(jax.jit(jax.grad(loss)), *at)
    for table, want in ((FIRST, first), (SECOND, second)):
      for way, f in table.items():
        got = jax.jit(lambda x, d, f=f: f(loss, x, d))(*at)
        assert max(cases.errors(got, want).values()) < BOUND, way


def test_what_a_kernel_has_no_derivative_for():
  how = dict(implementation="pallas_tpu", interpret=True, chunk_size=16)
  with jax.enable_x64(True):
    loss, *at = problem("linear", **how)
    words = "pallas_tpu has .*use implementation='reference'"
    for table in (FIRST, SECOND):
      for way, f in table.items():
        with pytest.raises(NotImplementedError, match=words):
          f(loss, *at)
        assert way
