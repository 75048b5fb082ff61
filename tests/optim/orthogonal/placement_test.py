"""Newton-Schulz divided over eight simulated devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optim
from jaxlib_ext import hlo
from optim.orthogonal import placement, polar

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
UP = PartitionSpec(None, "fsdp", "tensor")
DOWN = PartitionSpec(None, "tensor", "fsdp")


def make_mesh(axes, kind=AxisType.Auto):
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes)
  )


def normal(seed, *shape):
  sample = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(sample, jnp.float32)


def flops(count, m, n):
  return 5.0 * count * (4 * m * m * n + 2 * m**3)


def llama(layers, d, f):
  """Shapes and partitions of a LLaMA's matrices."""
  square, wide, tall = (layers, d, d), (layers, d, f), (layers, f, d)
  return {
    "q": (square, UP),
    "k": (square, UP),
    "v": (square, UP),
    "o": (square, DOWN),
    "gate": (wide, UP),
    "up": (wide, UP),
    "down": (tall, DOWN),
  }


def on_mesh(shapes, mesh):
  """Random arrays on the host, and the same divided over a mesh."""
  keep = lambda spec: PartitionSpec(
    *(name if name in mesh.shape else None for name in spec)
  )
  where = {
    name: NamedSharding(mesh, keep(spec)) for name, (_, spec) in shapes.items()
  }
  host = {
    name: normal(i, *shape)
    for i, (name, (shape, _)) in enumerate(shapes.items())
  }
  return host, jax.tree.map(jax.device_put, host, where), where


class PlacementTest(parameterized.TestCase):
  @parameterized.parameters((CUBE,), ({"fsdp": 8},), ({"data": 8},))
  def test_an_even_share_and_two_exchanges(self, axes):
    shapes = llama(4, 32, 64)  # 16 and 12 matrices: 2 and (padded) 2 each
    shapes["gate2"] = shapes["gate"]  # 16
    mesh = make_mesh(axes)
    host, divided, where = on_mesh(shapes, mesh)
    tx = optim.scale_by_muon(shape_scale=None)
    state = optim.MuonState(divided)
    layout = (where, optim.MuonState(where))
    compiled = jax.jit(tx.update, out_shardings=layout).lower(divided, state)
    compiled = compiled.compile()
    got, _ = compiled(divided, state)
    want, _ = jax.jit(tx.update)(host, optim.MuonState(host))
    for name in host:
      # A few roundings of bfloat16: the sums are in another order.
      np.testing.assert_allclose(got[name], want[name], atol=2.0**-6)

    costs = hlo.costs(compiled.as_text())
    ideal = (flops(16, 32, 32) + flops(16, 32, 64)) / 8
    self.assertBetween(costs.matmul_flops, ideal, 1.1 * ideal)
    elements = sum(x.size for x in host.values())
    parts = math.prod(n for name, n in axes.items() if name != "data")
    momentum = 4 * elements / parts
    self.assertLess(costs.total_collective_bytes, 2 * momentum)
    if set(axes) == {"data"}:
      self.assertNotIn("all-to-all", costs.collectives)
    else:
      # There and back for each shape; "o" is not divided as it is taken to
      # be and goes one step more.
      self.assertBetween(costs.collectives["all-to-all"], 4, 6)

  @parameterized.product(
    spec=(UP, DOWN, PartitionSpec(None, None, ("tensor", "fsdp"))),
    kind=(AxisType.Auto, AxisType.Explicit),
  )
  def test_types_tell_the_partition(self, spec, kind):
    mesh = make_mesh(CUBE, kind)
    xs = [normal(i, 8, 16, 24) for i in range(2)]
    divided = [jax.device_put(x, NamedSharding(mesh, spec)) for x in xs]
    f = lambda xs: polar.newton_schulz_list(xs, dtype=jnp.float32)
    place = NamedSharding(mesh, spec)
    step = jax.jit(
      f, out_shardings=None if kind == AxisType.Explicit else place
    )
    for got, want in zip(step(divided), jax.jit(f)(xs), strict=True):
      np.testing.assert_allclose(got, want, atol=1e-5)
    costs = hlo.costs(step.lower(divided).compile().as_text())
    momentum = sum(4 * x.size for x in xs) / 4  # a device's part
    if kind == AxisType.Explicit or spec == UP:
      self.assertEqual(costs.collectives["all-to-all"], 2)
      self.assertNotIn("collective-permute", costs.collectives)
      self.assertLess(costs.total_collective_bytes, 1.5 * momentum)
    else:  # Not as guessed: each matrix is moved once more each way.
      self.assertGreater(costs.total_collective_bytes, 2 * momentum)

  @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
  def test_counts_and_sides_that_do_not_divide(self, kind):
    shapes = {
      "few": ((3, 16, 24), UP),
      "odd": ((5, 7, 13), PartitionSpec()),
      "one": ((11, 3), PartitionSpec()),
      "many": ((2, 5, 24, 16), PartitionSpec(None, None, "tensor", "fsdp")),
      "square": ((2, 16, 16), DOWN),
    }
    host, divided, where = on_mesh(shapes, make_mesh(CUBE, kind))
    f = lambda tree: dict(
      zip(
        tree,
        polar.newton_schulz_list(list(tree.values()), dtype=jnp.float32),
        strict=True,
      )
    )
    want, got = jax.jit(f)(host), jax.jit(f)(divided)
    for name in host:
      np.testing.assert_allclose(got[name], want[name], atol=1e-5)
      if kind == AxisType.Explicit:
        self.assertEqual(
          jax.typeof(got[name]).sharding, jax.typeof(divided[name]).sharding
        )

  def test_mesh_in_context(self):
    mesh = make_mesh(CUBE)
    x = normal(0, 8, 16, 16)
    f = lambda x: optim.newton_schulz(x, dtype=jnp.float32)
    place = NamedSharding(mesh, UP)
    step = jax.jit(f, in_shardings=place, out_shardings=place)
    with jax.set_mesh(mesh):
      text = step.lower(x).compile().as_text()
    self.assertEqual(hlo.costs(text).matmul_flops, flops(1, 16, 16))

  @pytest.mark.slow
  def test_strips(self):
    # Eight devices: four matrices and one in four strips; two in four each;
    # eight whole and two of ten in four each.
    xs = [
      normal(0, 4, 16, 16),
      normal(1, 1, 50, 16),
      normal(2, 2, 8, 20),
      normal(3, 7, 12, 12),
      normal(4, 3, 12, 12),
    ]
    f = lambda xs: polar.newton_schulz_list(xs, dtype=jnp.float32)
    want = jax.jit(f)(xs)
    mesh = make_mesh(CUBE)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    divided = [put(x) for x in xs]
    with absltest.mock.patch.object(placement, "_FLOPS_PER_BYTE", 0):
      compiled = jax.jit(lambda xs: f(xs)).lower(divided).compile()
    for a, b in zip(compiled(divided), want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
    # Width 16 for the first two (50 padded to 4 · 16), 6 for 20 in strips.
    work = flops(1, 16, 16) + flops(1, 8, 6) + flops(1, 12, 12)
    work += flops(1, 12, 4)  # 12 / 4 padded to tiles of two
    self.assertEqual(hlo.costs(compiled.as_text()).matmul_flops, work)

  def test_gradients(self):
    x, g = normal(0, 3, 8, 12), normal(1, 3, 8, 12)
    f = lambda x: jnp.sum(g * optim.newton_schulz(x, dtype=jnp.float32))
    want = jax.jit(jax.grad(f))(x)
    divided = jax.device_put(x, NamedSharding(make_mesh(CUBE), UP))
    got = jax.jit(jax.grad(lambda x: f(x)))(divided)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

  def test_inside_shard_map_each_device_has_its_own(self):
    mesh = make_mesh(CUBE)
    x = normal(0, 8, 4, 6)
    spec = PartitionSpec(("data", "fsdp", "tensor"))
    f = lambda x: optim.newton_schulz(x, dtype=jnp.float32)
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(run)(x), jax.jit(f)(x), atol=1e-5)


class PlanTest(absltest.TestCase):
  def plan(self, shapes, devices, **kwargs):
    return placement.plan(shapes, devices, steps=5, itemsize=2, **kwargs)

  def test_fewer_matrices_than_devices(self):
    # 24 layers of LLaMA-7B on 256 devices: 96 matrices whole, 72 in halves.
    m = 4096
    shapes = [(96, m, m), (72, m, 11008)]
    (batch,) = self.plan(shapes, 256)
    self.assertEqual(batch, ((0, 0, 96, 1), (1, 0, 72, 2)))
    even = sum(flops(*shape) for shape in shapes) / 256
    # The halves of the long ones set the time; their [m, m] products are
    # done twice.
    self.assertBetween(flops(1, m, 5504) / even, 1.26, 1.27)
    # Whole matrices, one shape after the other, would take 3.2.
    whole = flops(1, m, m) + flops(1, m, 11008)
    self.assertBetween(whole / even, 3.2, 3.3)

  def test_small_matrices_stay_whole(self):
    shapes = [(96, 256, 256), (72, 256, 688)]
    self.assertEqual(self.plan(shapes, 256), [((0, 0, 96, 1), (1, 0, 72, 1))])

  def test_many_matrices_go_shape_by_shape(self):
    shapes = [(128, 4096, 4096), (96, 4096, 11008)]
    alone = [((0, 0, 128, 1),), ((1, 0, 96, 1),)]
    self.assertEqual(self.plan(shapes, 8), alone)
    self.assertEqual(self.plan(shapes, 256, whole=True), alone)
    # 4.5 for each device: 5 are near enough.
    shapes = [(48, 768, 768), (36, 768, 2048)]
    self.assertEqual(self.plan(shapes, 8), [((0, 0, 48, 1),), ((1, 0, 36, 1),)])

  def test_what_is_left_over_is_cut(self):
    # Four layers on eight devices: 1.5 long ones for each.
    shapes = [(16, 128, 128), (12, 128, 352)]
    self.assertCountEqual(
      self.plan(shapes, 8),
      [((0, 0, 16, 1),), ((1, 0, 8, 1),), ((1, 8, 12, 2),)],
    )

  def test_any_shapes(self):
    rng = np.random.default_rng(0)
    for _ in range(200):
      devices = int(rng.integers(2, 70))
      m = int(rng.integers(1, 5000))
      shapes = [
        (int(rng.integers(1, 40)), m, m + int(rng.integers(0, 9000)))
        for _ in range(rng.integers(1, 4))
      ]
      held = [[] for _ in shapes]
      for batch in self.plan(shapes, devices):
        used = sum((x.stop - x.start) * x.strips for x in batch)
        whole = len(batch) == 1 and batch[0].strips == 1
        self.assertTrue(used <= devices or whole)
        for x in batch:
          held[x.group] += range(x.start, x.stop)
      for (count, *_), indices in zip(shapes, held, strict=True):
        self.assertEqual(indices, list(range(count)))


if __name__ == "__main__":
  absltest.main()
