"""Types under explicit meshes and inside `jax.shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlib_ext import meshes

P = PartitionSpec


def _divided(x, spec, types=(AxisType.Explicit,) * 2):
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=types)
  return jax.device_put(x, NamedSharding(mesh, spec))


def test_spec_and_mesh():
  x = _divided(jnp.ones((4, 8, 3)), P("a", ("b",)))
  assert meshes.spec(x) == ("a", "b", None)
  assert meshes.explicit_axes(meshes.explicit_mesh({"x": x})) == ("a", "b")
  assert meshes.explicit_mesh((jnp.ones(3), np.ones(2), 1.0)) is None
  automatic = _divided(jnp.ones((4, 8)), P("a"), (AxisType.Auto,) * 2)
  assert meshes.explicit_mesh(automatic) is None
  assert meshes.spec(automatic) == (None, None)


def test_run_automatic_keeps_values_types_and_gradients():
  table = jnp.arange(24.0).reshape(6, 4)
  ids = jnp.array([[0, 1, 1, 5], [2, 2, 3, 0]])

  def f(table, ids):
    y = meshes.run_automatic(
      lambda table, ids: table[ids], table, ids, out_specs=P("a")
    )
    return jnp.sum(y**2), y

  want, want_grad = jax.value_and_grad(f, has_aux=True)(table, ids)
  for types in (
    (AxisType.Explicit,) * 2,
    (AxisType.Explicit, AxisType.Auto),
  ):
    args = _divided(table, P(None, "b"), types), _divided(ids, P("a"), types)
    run = jax.jit(jax.value_and_grad(f, has_aux=True))
    (got, y), grad = run(*args)
    np.testing.assert_array_equal(grad, want_grad)
    assert got == want[0]
    assert meshes.spec(y)[0] == "a"
    assert jax.typeof(grad) == jax.typeof(args[0])


def test_vary_like_lets_a_loop_start():
  mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

  def f(x, w):
    start = meshes.vary_like(jnp.zeros(x.shape[1:]), x)
    (w,) = meshes.vary_alike(w)
    total, _ = jax.lax.scan(lambda c, row: (c + row * w, None), start, x)
    return total[None]

  x = jnp.arange(32.0).reshape(16, 2)
  mapped = jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
  got = jax.jit(mapped)(x, jnp.float32(3))
  np.testing.assert_array_equal(got, 3 * x.reshape(8, 2, 2).sum(1))
  x = jnp.ones(2)
  assert meshes.vary_like(x, x) is x
