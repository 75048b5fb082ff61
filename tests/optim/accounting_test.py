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

# Two 64 x 256 kernels; subspaces of 16.
S, L, R, LAYERS = 64, 256, 16, 2
N = S * L
# Numbers of state of each kernel, beside a few scalars: the table of the
# methods in their papers' terms.
NUMBERS = {
  "muon": (optim.muon, {}, N),
  "normuon": (optim.normuon, {}, N + L),
  "adamuon": (optim.adamuon, {}, 2 * N),
  "dion": (optim.dion, {"rank": R}, N + S * R),
  "dion2": (optim.dion2, {}, N),
  "scale": (optim.column_normalized_sgd, {}, 0),
  "scale_momentum": (
    optim.column_normalized_sgd, {"momentum_on": ("matrix",)}, N
  ),
  "swan": (optim.swan, {}, 0),
  "sinkgd": (optim.sinkgd, {}, 0),
  "spam": (optim.spam, {}, 2 * N),
  "stable_spam": (optim.stable_spam, {}, 2 * N),
  "galore": (optim.galore, {"rank": R}, 2 * R * L + R * S),
  "fira": (optim.fira, {"rank": R}, 2 * R * L + R * S),
  "apollo": (optim.apollo, {"rank": R}, 2 * R * L),
  "apollo_mini": (optim.apollo_mini, {}, 2 * L),
  "frugal": (optim.frugal, {"density": 0.25}, N // 2),
  "frugal_svd": (
    optim.frugal, {"density": 0.25, "projection": "svd"}, N // 2 + R * S
  ),
  "mezo": (optim.mezo, {}, 0),
}  # fmt: skip


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

  @parameterized.parameters(*NUMBERS)
  def test_numbers_of_the_papers(self, name):
    factory, arguments, numbers = NUMBERS[name]
    for shape in ((LAYERS, S, L), (LAYERS, L, S)):
      if shape[1] == L:  # these depend on which side is the fan-in
        numbers = {"normuon": N + S, "dion": N + L * R}.get(name, numbers)
      params = {"up": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
      got = optim.state_bytes(factory(0.1, **arguments), params)["state"]
      # Counters, seeds, norms; indices of a share of the fan-in.
      scalars = 8 * LAYERS + 8 + (L // 4 * LAYERS if name == "frugal" else 0)
      self.assertBetween(got / 4 - LAYERS * numbers, 0, scalars)

  @parameterized.parameters("galore", "frugal", "stable_spam", "dion")
  def test_of_states_that_are_no_copies(self, name):
    tx, params = getattr(optim, name)(0.1), tree()
    got = optim.state_bytes(tx, params)
    self.assertEqual(got["state"], argument_bytes(tx.init(params)))

  def test_quantized_states(self):
    params = {"up": jax.ShapeDtypeStruct((LAYERS, S, L), jnp.bfloat16)}
    got = optim.state_bytes(optim.q_galore(0.1, rank=R), params)["state"]
    # Bytes of moments, half bytes of projections, 4 bytes for each column of
    # at most 256 of them; counters, seeds and five cosines.
    codes = LAYERS * (2 * R * L + R * S // 2)
    scales = 4 * LAYERS * (2 * L + R)
    self.assertBetween(got - codes - scales, 0, 4 * (8 * LAYERS + 8))

  def test_by_hand(self):
    params = {"w": jax.ShapeDtypeStruct((100, 50), jnp.bfloat16)}
    muon = optim.state_bytes(optim.muon(0.1), params)
    self.assertEqual(muon["params"], 2 * 5000)
    # A float32 momentum, its counter, and Adam's two for the absent others.
    self.assertEqual(muon["state"], 4 * 5000 + 3 * 4)
    scale = optim.state_bytes(optim.column_normalized_sgd(0.1), params)
    # The counters of momentum and vectors, and these moments' two weights.
    self.assertEqual(scale["state"], 4 * 4)

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
