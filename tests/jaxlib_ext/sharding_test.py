"""Rules, meshes, and shardings of optimizer state for any transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlib_ext import checkpoint, quantization, sharding, specs

NORMAL = jax.nn.initializers.normal()
SPECS = {
  "embed": specs.ParamSpec((32, 8), ("vocab", "embed"), NORMAL),
  "layers": {
    "norm": specs.ParamSpec((3, 8), ("layers", None), NORMAL),
    "q": specs.ParamSpec((3, 8, 16), ("layers", "embed", "heads"), NORMAL),
  },
}


@pytest.fixture
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_shardings_follow_the_rules(mesh):
  tree = sharding.shardings(SPECS, mesh)
  assert tree["embed"].spec == P("tensor", "fsdp")
  assert tree["layers"]["q"].spec == P(None, "fsdp", "tensor")


def test_axes_a_mesh_lacks_count_as_one():
  mesh = sharding.make_mesh({"data": 2})
  rules = sharding.Rules()
  assert rules.spec(("batch", "length"), mesh) == P("data", None)
  assert rules.spec(("vocab", "embed"), mesh) == P(None, None)


@pytest.mark.parametrize(
  ("axes", "words"),
  [
    (("embed", "embed"), "'fsdp'"),
    (("embde",), "unknown logical axis 'embde'"),
  ],
)
def test_rules_refuse(axes, words):
  with pytest.raises(ValueError, match=words):
    sharding.Rules().spec(axes)


def test_make_mesh_refuses():
  with pytest.raises(ValueError, match="needs 16 devices, there are 8"):
    sharding.make_mesh({"data": 16})
  with pytest.raises(ValueError, match="'data' must be at least 1, got 0"):
    sharding.make_mesh({"data": 0})


def test_a_dimension_that_does_not_divide_is_named(mesh):
  odd = {"w": specs.ParamSpec((7, 4), ("embed", "mlp"), NORMAL)}
  with pytest.raises(ValueError, match=r"'w'.*'embed' dimension \(7\)"):
    sharding.shardings(odd, mesh)


def labels(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "m" if path[-1].key == "q" else "a", params
  )


TRANSFORMATIONS = {
  "adamw": optax.adamw(1e-3),
  "partition": optax.partition(
    {"m": optax.contrib.muon(1e-3), "a": optax.adamw(1e-3)}, labels
  ),
  "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
  "multi_steps": optax.MultiSteps(optax.adam(1e-3), 2),
  "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
  "masked": optax.masked(optax.trace(0.9), lambda p: jax.tree.map(
    lambda x: x.ndim == 3, p)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_state_is_divided_like_its_parameter(name, mesh):
  tx = TRANSFORMATIONS[name]
  param_shardings = sharding.shardings(SPECS, mesh)
  params = jax.jit(
    lambda key: specs.init(key, SPECS), out_shardings=param_shardings
  )(jax.random.key(0))
  state_shardings = sharding.state_shardings(tx, SPECS, param_shardings)
  state = jax.jit(tx.init, out_shardings=state_shardings)(params)
  wanted = {p.shape: p.sharding for p in jax.tree.leaves(params)}
  moments = [x for x in jax.tree.leaves(state) if x.ndim >= 2 and x.size > 20]
  assert moments
  for leaf in moments:
    if leaf.shape in wanted:
      assert leaf.sharding.is_equivalent_to(wanted[leaf.shape], leaf.ndim)


def test_quantized_parameters_and_their_scales(mesh):
  param_shardings = sharding.shardings(SPECS, mesh)
  params = quantization.quantize_tree(
    specs.init(jax.random.key(0), SPECS), "int4:2"
  )
  tree = sharding.expand(params, param_shardings)
  assert tree["layers"]["q"].codes.spec == P(None, "fsdp", "tensor")
  assert tree["layers"]["q"].scales.spec == P(None, "fsdp", "tensor")
  per_channel = quantization.quantize_tree(
    specs.init(jax.random.key(0), SPECS), "int8"
  )
  tree = sharding.expand(per_channel, param_shardings)
  assert tree["layers"]["q"].scales.spec == P(None, None, "tensor")


def test_init_is_the_same_on_every_mesh(mesh):
  draw = lambda key: specs.init(key, SPECS)
  sharded = jax.jit(draw, out_shardings=sharding.shardings(SPECS, mesh))
  a, b = sharded(jax.random.key(1)), jax.jit(draw)(jax.random.key(1))
  # The random bits are the same; the inverse error function behind a normal
  # draw is compiled for each shard's shape, and may round the last bit or two
  # another way.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-22), a, b)
  assert specs.count(SPECS) == 32 * 8 + 3 * 8 + 3 * 8 * 16


def test_checksums_see_any_change_and_no_mesh(mesh):
  tree = {"a": jnp.arange(32.0).reshape(4, 8), "b": jnp.ones(3, jnp.int4)}
  before = checkpoint.checksums(tree)
  sharded = {
    **tree,
    "a": jax.device_put(
      tree["a"], jax.NamedSharding(mesh, P("data", "tensor"))
    ),
    "b": jax.device_put(tree["b"], jax.NamedSharding(mesh, P())),
  }
  assert int(checkpoint.checksums(sharded)["a"]) == int(before["a"])
  for i in range(4):
    changed = tree["a"].at[i, 3].set(-0.5)
    assert int(checkpoint.checksums({"a": changed})["a"]) != int(before["a"])
  swapped = tree["a"].at[jnp.array([0, 1])].set(tree["a"][jnp.array([1, 0])])
  assert int(checkpoint.checksums({"a": swapped})["a"]) != int(before["a"])
