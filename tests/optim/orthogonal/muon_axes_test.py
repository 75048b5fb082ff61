"""Which axes of a leaf Muon takes for its matrices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


class MatrixAxesTest(parameterized.TestCase):
  def polar(self, x, axes):
    params = {"q": jnp.asarray(x, jnp.float32), "w": jnp.ones((4, 4))}
    spec = {"q": axes, "w": None}
    out = []
    for matrix_axes in (spec, lambda p: spec):
      tx = optim.scale_by_muon(
        matrix_axes=matrix_axes, coefficients="exact", shape_scale="spectral"
      )
      out.append(tx.update(params, tx.init(params))[0]["q"])
    np.testing.assert_array_equal(*out)
    return np.asarray(out[0], np.float64)

  def orthogonal(self, x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return np.sqrt(x.shape[-1] / x.shape[-2]) * (u @ vt)

  def test_merged_outputs(self):
    x = normal(0, 12, 2, 3)
    want = self.orthogonal(x.reshape(12, 6)).reshape(12, 2, 3)
    for axes in [(0, (1, 2)), ((0,), (-2, -1))]:
      np.testing.assert_allclose(self.polar(x, axes), want, atol=1e-5)

  def test_merged_inputs(self):
    x = normal(0, 2, 3, 12)
    want = self.orthogonal(x.reshape(6, 12)).reshape(2, 3, 12)
    np.testing.assert_allclose(self.polar(x, ((0, 1), 2)), want, atol=1e-5)

  def test_head_by_head(self):
    x = normal(0, 12, 2, 3)
    want = np.stack([self.orthogonal(x[:, h]) for h in range(2)], 1)
    np.testing.assert_allclose(self.polar(x, (0, 2)), want, atol=1e-5)

  def test_outputs_before_inputs(self):
    x = normal(0, 5, 3)
    want = self.orthogonal(x.T).T
    np.testing.assert_allclose(self.polar(x, (1, 0)), want, atol=1e-5)

  def test_order_of_merged_axes(self):
    x = normal(0, 12, 2, 3)
    flat = x.transpose(0, 2, 1).reshape(12, 6)
    want = self.orthogonal(flat).reshape(12, 3, 2).transpose(0, 2, 1)
    np.testing.assert_allclose(self.polar(x, (0, (2, 1))), want, atol=1e-5)

  @parameterized.parameters(
    ((0, 0),), ((0, 3),), ((0,),), ((0, 1, 2),), (((), 1),), ("ab",), (5,)
  )
  def test_refuses(self, axes):
    with self.assertRaisesRegex(ValueError, "matrix_axes of 'q'"):
      self.polar(normal(0, 4, 2, 3), axes)

  def test_refuses_another_tree(self):
    tx = optim.scale_by_muon(matrix_axes={"other": None})
    with self.assertRaisesRegex(ValueError, "matrix_axes: its tree"):
      tx.init({"w": jnp.ones((2, 2))})

  def test_inside_muon_beside_other_leaves(self):
    params = {
      "q": jnp.asarray(normal(0, 8, 2, 3), jnp.float32),
      "embed": jnp.asarray(normal(1, 9, 8), jnp.float32),
    }
    options = dict(coefficients="keller", ns_dtype=jnp.float32)
    axes = {"q": (0, (1, 2)), "embed": None}
    tx = optim.muon(0.1, matrix_axes=axes, **options)
    got, _ = tx.update(params, tx.init(params), params)
    flat = {"q": params["q"].reshape(8, 6), "embed": params["embed"]}
    tx = optim.muon(0.1, **options)
    want, _ = tx.update(flat, tx.init(flat), flat)
    np.testing.assert_allclose(
      got["q"].reshape(8, 6), want["q"], rtol=1e-5, atol=1e-6
    )


if __name__ == "__main__":
  absltest.main()
