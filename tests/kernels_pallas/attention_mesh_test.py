"""Softmax attention on explicit meshes and under `shard_map`'s default check.

Values and gradients are those of undivided arrays, and nothing is gathered.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import quick
from tests.kernels_pallas import attention_ops

# A few hundred terms of order one, added in another order.
BOUND = 2e-5
QUICK = {"full", "mean_global", "near"}
ops = pytest.mark.parametrize("op", quick.cases(attention_ops.OPS, QUICK))


def _value_and_grad(op):
  def loss(x, ids, clusters):
    out = op(*x, ids, clusters)
    total = sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(out))
    return total, out

  return jax.value_and_grad(loss, has_aux=True)


def _split(arrays):
  x = tuple(arrays[name] for name in "qkv")
  return x, arrays["ids"], arrays["clusters"]


def _check(got, want):
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    size = max(1.0, np.abs(np.asarray(b)).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * size)


@pytest.mark.parametrize("axes", [("b", None), (None, "b"), ("b", "h")])
@ops
def test_explicit_mesh(op, axes):
  run = jax.jit(_value_and_grad(op))
  args = _split(attention_ops.arrays())
  want = run(*args)
  mesh = jax.make_mesh((2, 2), ("b", "h"))
  rows, heads = axes
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  x, ids, clusters = args
  divided = (
    tuple(put(a, P(rows, None, heads)) for a in x),
    put(ids, P(rows)),
    put(clusters, P(rows, heads)),
  )
  with jax.set_mesh(mesh):
    compiled = run.lower(*divided).compile()
    got = compiled(*divided)
  _check(got, want)
  assert "all-gather" not in compiled.as_text()
  for grad, a in zip(got[1], divided[0], strict=True):
    assert jax.typeof(grad) == jax.typeof(a)


@ops
def test_shard_map(op):
  run = _value_and_grad(op)
  args = _split(attention_ops.arrays())
  want = jax.jit(run)(*args)
  mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,))

  def mapped(x, ids, clusters):
    (total, out), grads = run(x, ids, clusters)
    return (jax.lax.psum(total, "b"), out), grads

  spec = ((P(), P("b")), P("b"))
  got = jax.jit(
    jax.shard_map(mapped, mesh=mesh, in_specs=P("b"), out_specs=spec)
  )(*args)
  _check(got, want)
