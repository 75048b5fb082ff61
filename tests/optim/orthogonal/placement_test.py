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
from optim.orthogonal import division, placement, polar, schedules, strips
from tests.optim.orthogonal.polynomials import polynomial

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
    everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = tx.init(divided)
    layout = (where, optim.MuonState(where, everywhere))
    compiled = jax.jit(tx.update, out_shardings=layout).lower(divided, state)
    compiled = compiled.compile()
    got, _ = compiled(divided, state)
    # A square's columns are where "o" has its rows.
    turn = lambda tree: {**tree, "o": jnp.swapaxes(tree["o"], 1, 2)}
    turned = turn(host)
    want = turn(jax.jit(tx.update)(turned, tx.init(turned))[0])
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
      # There and back for each shape; "o" is known by its name.
      self.assertEqual(costs.collectives["all-to-all"], 4)
      self.assertNotIn("collective-permute", costs.collectives)

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

  @parameterized.parameters((CUBE,), ({"fsdp": 8},))
  def test_experts_narrower_than_the_model(self, axes):
    # Their short side is not the model's width, which fsdp divides.
    experts = lambda spec: PartitionSpec(None, *spec)
    shapes = {
      "q": ((8, 32, 32), UP),
      "k": ((8, 32, 16), UP),
      "gate": ((4, 2, 32, 16), experts(UP)),
      "up": ((4, 2, 32, 16), experts(UP)),
      "down": ((4, 2, 16, 32), experts(DOWN)),
    }
    mesh = make_mesh(axes)
    host, divided, where = on_mesh(shapes, mesh)
    f = lambda tree: dict(
      zip(tree, polar.newton_schulz_list(list(tree.values())), strict=True)
    )
    compiled = jax.jit(f, out_shardings=where).lower(divided).compile()
    want, got = jax.jit(f)(host), compiled(divided)
    for name in host:
      np.testing.assert_allclose(
        *(np.asarray(x[name], np.float32) for x in (got, want)), atol=2.0**-6
      )
    costs = hlo.costs(compiled.as_text())
    self.assertEqual(costs.collectives["all-to-all"], 4)
    self.assertNotIn("collective-permute", costs.collectives)
    parts = math.prod(n for name, n in axes.items() if name != "data")
    momentum = sum(4 * x.size for x in host.values()) / parts
    self.assertLess(costs.total_collective_bytes, 1.5 * momentum)

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

  @parameterized.parameters(
    ("polar_express", 5, True),
    ("polar_express", 4, False),
    (((2.0, -1.5, 0.5),) * 5, None, False),
  )
  @pytest.mark.slow
  def test_halves_in_bfloat16(self, coefficients, steps, predict):
    shapes = {
      "wide": ((2, 256, 640), UP),
      "wide2": ((1, 256, 640), UP),
      "square": ((2, 256, 256), UP),
    }
    mesh = make_mesh(CUBE)
    host, divided, where = on_mesh(shapes, mesh)

    def f(tree):
      ys = polar.newton_schulz_list(
        list(tree.values()), coefficients=coefficients, steps=steps
      )
      return dict(zip(tree, ys, strict=True))

    direct = jax.jit(f)(host)
    compiled = jax.jit(f, out_shardings=where).lower(divided).compile()
    got = compiled(divided)
    table, divisor = schedules.resolve(coefficients, steps, np.float64)
    for name, x in host.items():
      want = polynomial(x, table, divisor)
      gap = lambda y, want=want: np.linalg.norm(y - want, axis=(1, 2))
      bound = 2 * gap(direct[name]) + 0.01 * np.linalg.norm(want, axis=(1, 2))
      np.testing.assert_array_less(gap(got[name]), bound)
    costs = hlo.costs(compiled.as_text())
    steps = steps or len(coefficients)
    work = strips.flops(256, 320, steps, predict)
    self.assertEqual(costs.matmul_flops, work)
    exchanges = strips.exchanges(steps, predict)
    self.assertEqual(costs.collectives["collective-permute"], exchanges)

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
    with absltest.mock.patch.object(division, "_FLOPS_PER_BYTE", 0):
      compiled = jax.jit(lambda xs: f(xs)).lower(divided).compile()
    for a, b in zip(compiled(divided), want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
    # Width 16 for the first two (50 padded to 4 · 16), 6 for 20 in strips.
    cut = lambda m, n: strips.flops(m, n, 5, predict=True)
    work = cut(16, 16) + cut(8, 6) + flops(1, 12, 12)
    work += cut(12, 4)  # 12 / 4 padded to tiles of two
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


class CommonSideTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 0),
    ([(4, 6)], 4),
    ([(6, 4), (2, 6, 6)], 6),
    # Many small ones, few large ones: entries count.
    ([(9, 2, 3), (8, 8)], 8),
  )
  def test_most_entries_then_the_smaller(self, shapes, side):
    self.assertEqual(placement.common_side(shapes), side)


if __name__ == "__main__":
  absltest.main()
