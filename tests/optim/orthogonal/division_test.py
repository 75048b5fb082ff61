"""Which matrices are divided over how many devices."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest

from optim.orthogonal import division, strips


def flops(count, m, n):
  return 5.0 * count * (4 * m * m * n + 2 * m**3)


class PlanTest(absltest.TestCase):
  def plan(self, shapes, devices, **kwargs):
    return division.plan(shapes, devices, steps=5, itemsize=2, **kwargs)

  def test_fewer_matrices_than_devices(self):
    # 24 layers of LLaMA-7B on 256 devices: 96 matrices whole, 72 in halves.
    m = 4096
    shapes = [(96, m, m), (72, m, 11008)]
    (batch,) = self.plan(shapes, 256)
    self.assertEqual(batch, ((0, 0, 96, 1), (1, 0, 72, 2)))
    even = sum(flops(*shape) for shape in shapes) / 256
    # The halves of the long ones set the time.
    halves = strips.flops(m, 5504, 5, predict=True)
    self.assertBetween(halves / even, 0.96, 0.97)
    # A device receives its matrix, sends it back, and adds up three Gram
    # matrices: no more than a float32 momentum, read and written once.
    received = 2 * (2 * m * 5504 + 3 * strips.entries(m))
    momentum = 2 * 4 * sum(np.prod(shape) for shape in shapes) / 256
    self.assertBetween(received / momentum, 0.96, 0.97)
    # Whole matrices, one shape after the other, would take 3.2.
    whole = flops(1, m, m) + flops(1, m, 11008)
    self.assertBetween(whole / even, 3.2, 3.3)

  def test_where_sums_at_every_step_move_too_much(self):
    shapes = [(96, 256, 256), (72, 256, 688)]
    plan = lambda predict: division.plan(
      shapes, 256, steps=5, itemsize=4, predict=predict
    )
    self.assertEqual(plan(True), [((0, 0, 96, 1), (1, 0, 72, 2))])
    self.assertEqual(plan(False), [((0, 0, 96, 1), (1, 0, 72, 1))])

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
