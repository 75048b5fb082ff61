"""Second derivatives and forward mode of softmax attention, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.kernels_pallas import attention_ops

QUICK = {"full", "mean_global", "near"}
ops = pytest.mark.parametrize("op", quick.cases(attention_ops.OPS, QUICK))


def _problem(op, implementation):
  arrays = attention_ops.arrays(np.float64, batch=1)
  ids, clusters = arrays["ids"], arrays["clusters"]

  def loss(x):
    out = op(*x, ids, clusters, implementation=implementation)
    flat = jnp.concatenate([a.ravel() for a in jax.tree.leaves(out)])
    return jnp.sum(jnp.sin(flat) * jnp.arange(flat.size) / 99)

  x = tuple(jnp.asarray(arrays[name]) for name in "qkv")
  rng = np.random.default_rng(1)
  along = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in x)
  return loss, x, along


def _dot(a, b):
  return sum(map(jnp.vdot, a, b))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@ops
def test_hessian_vector_products(op, implementation):
  """Forward over reverse and reverse over reverse, against differences."""
  with jax.enable_x64(True):
    loss, x, along = _problem(op, implementation)
    gradient = jax.jit(jax.grad(loss))
    # Both rounding, 1e-16 / h, and curvature, h^2, are far below the bound.
    h = 1e-5
    at = lambda s: gradient(
      tuple(a + s * b for a, b in zip(x, along, strict=True))
    )
    want = [(a - b) / (2 * h) for a, b in zip(at(h), at(-h), strict=True)]
    forward = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (along,))[1])
    reverse = jax.jit(jax.grad(lambda x: _dot(jax.grad(loss)(x), along)))
    for got in (forward(x), reverse(x)):
      for a, b in zip(got, want, strict=True):
        bound = 1e-7 * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@ops
def test_forward_mode(op):
  """By the reference; elsewhere the error names it."""
  with jax.enable_x64(True):
    loss, x, along = _problem(op, "reference")
    want = _dot(jax.jit(jax.grad(loss))(x), along)
    _, got = jax.jit(lambda x: jax.jvp(loss, (x,), (along,)))(x)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    got = jax.linearize(loss, x)[1](along)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    loss, x, along = _problem(op, "xla")
    with pytest.raises(NotImplementedError, match="reference"):
      jax.jvp(loss, (x,), (along,))
