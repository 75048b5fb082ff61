"""Byte counts against what XLA says a program's arguments take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optim


def tree(dtype=jnp.float32):
  return {
    "embed": jnp.ones((16, 8), dtype),
    "layers": {"up": jnp.ones((2, 8, 16), dtype), "norm": jnp.ones((2, 8))},
    "lm_head": jnp.ones((8, 16), dtype),
  }


def argument_bytes(*args):
  total = lambda *a: sum(
    jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(a)
  )
  compiled = jax.jit(total, keep_unused=True).lower(*args).compile()
  return compiled.memory_analysis().argument_size_in_bytes


FACTORIES = {
  "adamw": lambda: optax.adamw(0.1),
  "sgd": lambda: optax.sgd(0.1),
  "muon": lambda: optim.muon(0.1),
  "scale": lambda: optim.column_normalized_sgd(0.1),
}


class StateBytesTest(parameterized.TestCase):
  @parameterized.product(
    name=list(FACTORIES), dtype=[jnp.float32, jnp.bfloat16, jnp.int4]
  )
  def test_is_what_xla_says(self, name, dtype):
    if dtype == jnp.int4 and name != "sgd":
      self.skipTest("optimizers of floats")
    tx, params = FACTORIES[name](), tree(dtype)
    got = optim.state_bytes(tx, params)
    state = tx.init(params)
    self.assertEqual(got["params"], argument_bytes(params))
    if jax.tree.leaves(state):
      self.assertEqual(got["state"], argument_bytes(state))
    else:
      self.assertEqual(got["state"], 0)
    self.assertEqual(got["total"], got["params"] + got["state"])
    count = sum(x.size for x in jax.tree.leaves(params))
    self.assertEqual(got["per_param"], got["total"] / count)

  def test_by_hand(self):
    params = {"w": jax.ShapeDtypeStruct((100, 50), jnp.bfloat16)}
    muon = optim.state_bytes(optim.muon(0.1), params)
    self.assertEqual(muon["params"], 2 * 5000)
    # A float32 momentum, and Adam's two counters for the absent others.
    self.assertEqual(muon["state"], 4 * 5000 + 2 * 4)
    scale = optim.state_bytes(optim.column_normalized_sgd(0.1), params)
    self.assertEqual(scale["state"], 4)

  def test_int4_is_half_a_byte(self):
    params = {"w": jax.ShapeDtypeStruct((5, 3), jnp.int4)}
    self.assertEqual(optim.state_bytes(optax.sgd(0.1), params)["params"], 8)

  def test_random_keys(self):
    tx = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    got = optim.state_bytes(tx, {"w": jnp.ones(3)})
    self.assertEqual(got["state"], 4 + 2 * 4)

  def test_packed_parameters(self):
    @jax.tree_util.register_pytree_node_class
    class Packed:
      def __init__(self, codes):
        self.codes = codes
        self.shape = codes.shape

      nbytes_packed = 17

      def dequantize(self):
        return self.codes

      def tree_flatten(self):
        return (self.codes,), None

      @classmethod
      def tree_unflatten(cls, _, children):
        return cls(*children)

    params = {"w": Packed(jnp.ones((3, 4), jnp.int8)), "b": jnp.ones(2)}
    got = optim.state_bytes(optax.set_to_zero(), params)
    self.assertEqual(got["params"], 17 + 8)
    self.assertEqual(got["per_param"], 25 / 14)

  @parameterized.parameters(*FACTORIES)
  def test_one_devices_share(self, name):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def where(x):
      if x.shape[-2] < 8:
        return NamedSharding(mesh, PartitionSpec())
      return NamedSharding(
        mesh, PartitionSpec(*(None,) * (x.ndim - 2), "a", "b")
      )

    tx = FACTORIES[name]()
    params = jax.tree.map(lambda x: jax.device_put(x, where(x)), tree())
    got = optim.state_bytes(tx, params)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      params,
    )
    self.assertEqual(optim.state_bytes(tx, abstract), got)
    self.assertEqual(got["params"], argument_bytes(params))
    state = tx.init(params)
    if jax.tree.leaves(state):
      self.assertEqual(got["state"], argument_bytes(state))
    whole = optim.state_bytes(tx, tree())
    self.assertLess(got["total"], whole["total"] / 4)
    share = sum(
      x.addressable_shards[0].data.size for x in jax.tree.leaves(params)
    )
    self.assertEqual(got["per_param"], got["total"] / share)


if __name__ == "__main__":
  absltest.main()
