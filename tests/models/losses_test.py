"""The loss: slices, groups of devices, ignored and unknown targets."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_ext import hlo, sharding
from models import losses, transformer

EPS = 2.0**-24


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


class LossTest(parameterized.TestCase):
  @parameterized.parameters(1, 30, 2**24)
  def test_slices_and_gradients(self, most):
    x, head = normal(0, 2, 12, 6), normal(1, 6, 10)
    targets = jax.random.randint(jax.random.key(2), (2, 12), 0, 10)
    weights = jax.random.uniform(jax.random.key(3), (2, 12))

    def ours(x, head):
      loss, _ = losses.linear_cross_entropy(
        x, head, targets, weights=weights, z_loss=0.3
      )
      return 2.0 * loss

    def plain(x, head):
      nll, log_z = losses.cross_entropy(x @ head, targets)
      loss = nll + 0.3 * jnp.square(log_z)
      return 2.0 * jnp.sum(weights * loss) / jnp.sum(weights)

    with mock.patch.object(losses, "_MAX_LOGITS", most):
      value = ours(x, head)
      got = jax.value_and_grad(ours, argnums=(0, 1))(x, head)
    want = jax.value_and_grad(plain, argnums=(0, 1))(x, head)
    np.testing.assert_allclose(value, want[0], rtol=24 * EPS)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=0, atol=64 * EPS * np.max(np.abs(b))
      ),
      got,
      want,
    )

  def test_no_weight_at_all_is_a_loss_of_zero(self):
    loss, _ = losses.linear_cross_entropy(
      normal(0, 1, 3, 4),
      normal(1, 4, 5),
      jnp.zeros((1, 3), jnp.int32),
      weights=jnp.zeros((1, 3)),
    )
    self.assertEqual(float(loss), 0.0)

  @parameterized.parameters(1, 30, 2**24)
  def test_groups_of_devices(self, most):
    x, head = normal(0, 8, 12, 8), normal(1, 8, 10)
    targets = jax.random.randint(jax.random.key(2), (8, 12), 0, 10)

    def value(x, head, targets):
      return losses.linear_cross_entropy(x, head, targets, z_loss=0.3)[0]

    run = lambda: jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    with mock.patch.object(losses, "_MAX_LOGITS", most):
      want = run()(x, head, targets)
      for axes in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        mesh = sharding.make_mesh(axes)
        put = lambda a, *spec, mesh=mesh: jax.device_put(
          a, NamedSharding(mesh, PartitionSpec(*spec))
        )
        got = run()(put(x, "fsdp"), put(head, "fsdp"), put(targets, "fsdp"))
        jax.tree.map(
          lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=64 * EPS * np.max(np.abs(b))
          ),
          got,
          want,
        )

  def test_collectives_do_not_grow_with_the_batch(self):
    """The head is gathered once, its gradient reduced once."""
    mesh = sharding.make_mesh({"fsdp": 8})

    def struct(shape, dtype=jnp.float32):
      where = NamedSharding(mesh, PartitionSpec("fsdp"))
      return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def value(x, head, targets):
      return losses.linear_cross_entropy(x, head, targets)[0]

    run = jax.jit(
      jax.grad(value, argnums=(0, 1)),
      out_shardings=(NamedSharding(mesh, PartitionSpec("fsdp")),) * 2,
    )
    with mock.patch.object(losses, "_MAX_LOGITS", 2**10):
      for batch in (8, 64):
        args = struct((batch, 32, 16)), struct((16, 512))
        compiled = run.lower(*args, struct((batch, 32), jnp.int32)).compile()
        moved = hlo.costs(compiled.as_text()).collective_bytes
        # Each of eight devices receives 7/8 of the head once, and of its
        # gradient twice: XLA:CPU reduces on all where one part is asked for.
        self.assertLessEqual(sum(moved.values()), 3 * 7 / 8 * 16 * 512 * 4 + 64)


class TargetsTest(parameterized.TestCase):
  def _loss(self, targets, weights=None, compiled=False):
    x, head = normal(0, 2, 4, 6), normal(1, 6, 10)

    def value(x, head, targets, weights):
      return losses.linear_cross_entropy(
        x, head, targets, weights=weights, z_loss=0.1
      )[0]

    run = jax.value_and_grad(value, argnums=(0, 1))
    run = jax.jit(run) if compiled else run
    return run(x, head, targets, weights)

  @parameterized.product(value=losses.IGNORED, compiled=(False, True))
  def test_ignored_targets_have_no_part_in_the_mean(self, value, compiled):
    targets = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    weights = np.array([[1, 1, 0, 1], [1, 0, 1, 1]], np.float32)
    ignoring = np.where(weights == 0, value, targets)
    want = self._loss(targets, weights, compiled)
    for dtype in (np.int32, np.int64, np.int16):
      got = self._loss(ignoring.astype(dtype), None, compiled)
      jax.tree.map(np.testing.assert_array_equal, got, want)
    # Their weight does not matter; that of the others does.
    got = self._loss(ignoring, 3 * np.ones((2, 4), np.float32), compiled)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want
    )
    everything = self._loss(np.full((2, 4), value), None, compiled)
    self.assertEqual(float(everything[0]), 0.0)
    for grad in everything[1]:
      np.testing.assert_array_equal(grad, 0)

  @parameterized.parameters(-2, -99, 10, 156, 2**31 - 1)
  def test_unknown_targets(self, value):
    targets = np.array([[1, 2, 3, 4], [5, 6, 7, value]])
    with self.assertRaisesRegex(ValueError, rf"targets: got {value}; allowed"):
      self._loss(targets)
    with self.assertRaisesRegex(ValueError, "targets"):
      losses.cross_entropy(normal(0, 2, 4, 10), targets)
    self.assertTrue(np.isnan(self._loss(targets, compiled=True)[0]))
    nll, _ = jax.jit(losses.cross_entropy)(normal(0, 2, 4, 10), targets)
    np.testing.assert_array_equal(np.isnan(nll), targets == value)
    # Not asked for: no harm.
    weights = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.float32)
    value, _ = self._loss(targets, weights, compiled=True)
    self.assertTrue(np.isfinite(value))

  def test_values_beyond_32_bits_are_refused(self):
    targets = np.array([[1, 2, 3, 4], [5, 6, 7, 2**32 + 8]])
    with self.assertRaisesRegex(ValueError, "targets: got 4294967304"):
      self._loss(targets)

  def test_cross_entropy_of_ignored_targets_is_zero(self):
    nll, _ = losses.cross_entropy(normal(0, 3, 10), np.array([2, -1, -100]))
    np.testing.assert_array_equal(nll == 0, [False, True, True])

  def test_tokens_out_of_the_vocabulary(self):
    cfg = transformer.Config(
      vocab_size=8, d_model=16, num_layers=1, num_heads=2, d_ff=16
    )
    params = transformer.init(jax.random.key(0), cfg)
    apply = functools.partial(transformer.apply, cfg=cfg)
    for bad in (8, -1, 2**20):
      tokens = np.array([[1, 2, 3], [4, bad, 5]])
      with self.assertRaisesRegex(ValueError, f"tokens: got {bad}; allowed"):
        apply(params, tokens)
      logits = jax.jit(apply)(params, tokens).logits
      lost = np.isnan(logits).any(axis=-1)
      self.assertFalse(lost[0].any())
      self.assertTrue(lost[1, 1:].all())
    with self.assertRaisesRegex(TypeError, "tokens must be integers"):
      apply(params, np.ones((2, 3)))


if __name__ == "__main__":
  absltest.main()
