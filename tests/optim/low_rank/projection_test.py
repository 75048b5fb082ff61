"""Subspaces of matrices, their refreshes and ranks, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import optim
from optim.low_rank import moments, projection


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def decaying(seed, m, n, power):
  """A matrix whose k-th singular value is k^-power."""
  s = min(m, n)
  u = np.linalg.qr(normal(seed, m, s))[0]
  v = np.linalg.qr(normal(seed + 1, n, s))[0]
  return (u * np.arange(1, s + 1.0) ** -power) @ v.T


def projector(basis, shape):
  """The orthogonal projection on the span, [s, s]."""
  p = np.asarray(basis, np.float64)
  p = p if projection.on_inputs(shape) else p.T
  return p @ p.T


def leading(g, rank):
  u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
  side = u[:, :rank] if g.shape[0] <= g.shape[1] else vt[:rank].T
  return side @ side.T


class SubspacesTest(parameterized.TestCase):
  @parameterized.product(kind=("eigh", "svd"), size=(1.0, 1e-30, 1e30))
  def test_leading_singular_subspace_of_the_smaller_side(self, kind, size):
    # Of one stack: both orientations, and two layers.
    parts = [
      decaying(0, 12, 40, 1.0),
      decaying(2, 40, 12, 1.0),
      np.stack([decaying(4, 12, 40, 0.5), decaying(6, 12, 40, 1.0)]),
    ]
    given = [jnp.asarray(size * x, jnp.float32) for x in parts]
    bases = projection.subspaces(given, [3, 3, 3], kind)
    self.assertEqual([b.shape for b in bases], [(12, 3), (3, 12), (2, 12, 3)])
    pairs = [(bases[0], parts[0]), (bases[1], parts[1])]
    pairs += list(zip(bases[2], parts[2], strict=True))
    for basis, g in pairs:
      # The gap between the third and fourth squared singular value is at
      # least 0.05 of the first: some tens of roundings.
      np.testing.assert_allclose(
        projector(basis, g.shape), leading(g, 3), atol=1e-5
      )

  @parameterized.parameters((0.25, 0.92), (0.5, 0.98), (1.0, 0.999))
  def test_randomized_keeps_most_of_the_energy(self, power, share):
    g = decaying(0, 64, 160, power)
    (p,) = projection.subspaces(
      [jnp.asarray(g, jnp.float32)], [16], "randomized"
    )
    np.testing.assert_allclose(p.T @ p, np.eye(16), atol=1e-5)
    got = np.sum((np.asarray(p, np.float64).T @ g) ** 2)
    self.assertGreater(got, share * np.sum((leading(g, 16) @ g) ** 2))

  @parameterized.parameters(*projection.BASES)
  def test_bases_are_orthonormal_where_directions_are_missing(self, kind):
    one = np.outer(normal(0, 6), normal(1, 9))
    for g in (np.zeros((6, 9)), one):
      (p,) = projection.subspaces([jnp.asarray(g, jnp.float32)], [4], kind)
      np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-5)
      if g.any():
        np.testing.assert_allclose(projector(p, g.shape) @ g, g, atol=1e-5)

  def test_down_and_up(self):
    for shape in ((5, 8), (8, 5), (2, 5, 8), (2, 8, 5), (5, 5)):
      g = jnp.asarray(normal(0, *shape), jnp.float32)
      (p,) = projection.subspaces([g], [5], "eigh")
      low = projection.down(p, g)
      self.assertEqual(low.shape, projection.low_shape(shape, 5))
      np.testing.assert_allclose(
        projection.up(p, low, shape), g, atol=1e-5 * np.abs(g).max()
      )

  def test_random_bases_are_orthonormal(self):
    keys = jax.random.split(jax.random.key(0))
    parts = [jnp.zeros((3, 9, 6)), jnp.zeros((5, 8))]
    p, q = projection.random_bases(keys, parts, [4, 2])
    self.assertEqual((p.shape, q.shape), ((3, 4, 6), (5, 2)))
    for one in [*p, q.T]:
      np.testing.assert_allclose(one @ one.T, np.eye(len(one)), atol=1e-5)


class RankTest(parameterized.TestCase):
  @parameterized.parameters(
    (3, (4, 9), 3), (0.25, (64, 256), 16), (0.25, (2, 3), 1), (1.0, (5, 7), 5),
    (0.3, (10, 40), 3), (0.5, (7, 7), 4), (3.0, (4, 9), 3), (1, (5, 7), 1),
  )  # fmt: skip
  def test_rank_of(self, rank, shape, want):
    self.assertEqual(projection.rank_of(rank, "w", shape), want)

  @parameterized.parameters(0, -1, 0.0, 1.5, True, "a", None, float("nan"))
  def test_ranks_that_are_none(self, rank):
    for factory in (optim.galore, optim.fira, optim.apollo, optim.q_galore):
      with self.assertRaisesRegex(ValueError, r"rank must be .* got"):
        factory(0.1, rank=rank)

  @parameterized.parameters(
    optim.galore, optim.fira, optim.apollo, optim.q_galore
  )
  def test_a_rank_above_a_side_names_the_leaf(self, factory):
    params = {"a": {"w": jnp.zeros((2, 9, 4))}, "b": jnp.zeros(3)}
    with self.assertRaisesRegex(ValueError, r"rank: 5 .*'a/w'.*\(9, 4\)"):
      jax.eval_shape(factory(0.1, rank=5).init, params)
    jax.eval_shape(factory(0.1, rank=4).init, params)

  def test_a_traced_rank_is_refused_with_advice(self):
    with self.assertRaisesRegex(ValueError, "static_args"):
      optim.galore(0.1, rank=jnp.asarray(3))


class LayoutTest(absltest.TestCase):
  def test_split_and_pack_round_trips(self):
    tree = {
      "qkv": jnp.asarray(normal(0, 3, 6, 10), jnp.bfloat16),
      "w": jnp.asarray(normal(1, 4, 5), jnp.float32),
    }
    spec = {
      "qkv": optim.MatrixAxes(-2, -1, output_blocks=(6, 2, 2)),
      "w": None,
    }
    layout = projection.Layout.of(tree, spec, "x")
    parts = layout.split(tree)
    self.assertEqual(
      [p.shape for p in parts], [(3, 6, 6), (3, 6, 2), (3, 6, 2), (4, 5)]
    )
    self.assertEqual({str(p.dtype) for p in parts}, {"float32"})
    joined = layout.join(parts)
    jax.tree.map(np.testing.assert_array_equal, joined, tree)
    self.assertEqual(joined["qkv"].dtype, jnp.bfloat16)
    packed = layout.pack(parts)
    self.assertLen(packed, 3)
    self.assertIs(packed[2]["qkv"], parts[2])
    self.assertEqual(packed[1]["w"], optax.MaskedNode())
    for a, b in zip(layout.unpack(packed), parts, strict=True):
      self.assertIs(a, b)


class MomentsTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 1e-42, 1e-30, 1.0, 1e30)
  def test_norm_of_any_size(self, size):
    x = normal(0, 3, 4, 5) * size
    got = moments.norm(jnp.asarray(x, jnp.float32), (-2, -1))
    want = np.sqrt(np.sum(x * x, axis=(-2, -1), keepdims=True))
    # What is subnormal is flushed to zero.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-37)

  def test_growth_is_limited_matrix_by_matrix(self):
    x = jnp.asarray(normal(0, 4, 3, 5), jnp.float32)
    size = np.linalg.norm(np.asarray(x), axis=(1, 2))
    before = jnp.asarray(size * np.array([0, 0.5, 0.995, 2]), jnp.float32)
    got, after = moments.limit_growth(x, before, 1.01)
    factor = np.array([1, 0.505, 1, 1])
    np.testing.assert_allclose(got, x * factor[:, None, None], rtol=1e-5)
    np.testing.assert_allclose(after, size * factor, rtol=1e-5)

  def test_no_gain_from_nothing(self):
    low = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    got = moments.gain(jnp.ones((2, 2)), low, -1)
    np.testing.assert_allclose(got, [[0], [2**0.5 / 5]], rtol=1e-6)


class RefreshTest(parameterized.TestCase):
  def count(self, tx, params, grads):
    """How often subspaces are computed, counted when they are executed."""
    calls = []
    original = projection._leading

    def counting(x, rank, kind):
      jax.debug.callback(lambda: calls.append(1))
      return original(x, rank, kind)

    projection._leading = counting
    try:
      state, update = tx.init(params), jax.jit(tx.update)
      for g in grads:
        _, state = update(g, state, params)
      jax.effects_barrier()
    finally:
      projection._leading = original
    return len(calls)

  @parameterized.named_parameters(
    ("galore", lambda: optim.galore(0.1, rank=2, update_interval=3)),
    ("rotate", lambda: optim.galore(
      0.1, rank=2, update_interval=3, on_refresh="rotate")),
    ("fira", lambda: optim.fira(0.1, rank=2, update_interval=3)),
    ("frugal", lambda: optim.frugal(
      0.1, projection="svd", update_interval=3)),
  )  # fmt: skip
  def test_nothing_is_computed_between_refreshes(self, make):
    # One stack for all three: two layers of one leaf, and a transposed leaf.
    params = {"a": jnp.zeros((2, 4, 6)), "b": jnp.zeros((6, 4))}
    grads = [
      jax.tree.map(lambda x, i=i: jnp.asarray(normal(i, *x.shape)), params)
      for i in range(7)
    ]
    self.assertEqual(self.count(make(), params, grads), 3)


if __name__ == "__main__":
  absltest.main()
