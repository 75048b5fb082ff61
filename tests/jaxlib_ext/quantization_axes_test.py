"""Quantized arrays whose fan-in or fan-out has several axes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlib_ext import checkpoint, matrices, quantization, sharding
from tests.jaxlib_ext import quantization_test as table

# Kernels of layers of 50 x 6, as (shape, matrix_axes, to [3, 50, 6]).
WIDE = (
  ((3, 50, 2, 3), (1, (2, 3)), lambda x: x.reshape(3, -1, 6)),
  ((3, 25, 2, 6), ((-3, -2), -1), lambda x: x.reshape(3, -1, 6)),
  # Heads that are a batch, between the two sides.
  ((50, 3, 6), (0, -1), lambda x: jnp.moveaxis(x, 1, 0)),
)


def from_layers(x, shape):
  """The inverse of the functions of `WIDE`."""
  return (x if shape[0] == 3 else jnp.moveaxis(x, 0, 1)).reshape(shape)


class MatrixAxesTest(parameterized.TestCase):
  @parameterized.product(name=table.FORMATS, seed=table.ROUNDINGS)
  @pytest.mark.slow
  def test_as_the_merged_matrix(self, name, seed):
    x, key = jnp.asarray(table.sample((3, 50, 6))), table.key_of(seed)

    @jax.jit
    def run(x):
      plain = quantization.quantize(x, name, key=key)
      out = []
      for shape, axes, _ in WIDE:
        wide = from_layers(x, shape)
        q = quantization.quantize(wide, name, key=key, matrix_axes=axes)
        again = quantization.quantize(
          q.dequantize(), name, key=key, matrix_axes=axes
        )
        out.append((q, q.dequantize(), again))
      return plain, plain.dequantize(), out

    plain, values, out = run(x)
    for (shape, _, merge), (q, wide, again) in zip(WIDE, out, strict=True):
      self.assertEqual(q.shape, shape)
      self.assertEqual(q.nbytes_packed, plain.nbytes_packed)
      self.assertEqual(q.scales.ndim, q.ndim)
      parts = ("codes", "scales", "matrix_scale")
      for part in parts[: 2 + (plain.matrix_scale is not None)]:
        a, b = getattr(q, part), getattr(plain, part)
        a = a if part == "matrix_scale" else merge(a)
        table.assert_same_bits(jnp.ravel(a), jnp.ravel(b))
      table.assert_same_bits(merge(wide), values)
      self.assertEqual(jax.tree.structure(again), jax.tree.structure(q))
      table.assert_same_bits(again, q)

  @parameterized.parameters("int8", "int4:16", "nvfp4")
  def test_layers_are_sliced_scanned_and_mapped(self, name):
    for shape, axes, _ in WIDE[:2]:
      # Of one layer, so that they can be given to vmap too.
      one = axes if axes[1] == -1 else (0, (1, 2))
      x = jnp.asarray(table.sample(shape))
      q = table.quantize(x, name, matrix_axes=axes)
      first = jax.tree.map(lambda a: a[0], q)
      want = table.quantize(x[0], name, matrix_axes=one)
      self.assertEqual(jax.tree.structure(first), jax.tree.structure(want))
      table.assert_same_bits(first, want)
      f = functools.partial(table.quantize, fmt=name, matrix_axes=one)
      mapped = jax.vmap(f)(x)
      self.assertEqual(jax.tree.structure(mapped), jax.tree.structure(q))
      table.assert_same_bits(mapped, q)
      values = table.dequantize(q)
      for other in (
        jax.lax.scan(lambda c, layer: (c, layer.dequantize()), None, q)[1],
        jax.vmap(lambda layer: layer.dequantize())(q),
      ):
        np.testing.assert_array_equal(other, values)

  def test_of_what_is_quantized_and_the_last_two(self):
    x = jnp.asarray(table.sample((32, 4, 8)))
    q = table.quantize(x, "int8", matrix_axes=(0, (1, 2)))
    self.assertEqual(q.nbytes_packed, x.size + 4 * 32)
    self.assertEqual(q.scales.shape, (1, 4, 8))
    self.assertEqual(table.quantize(q, "int4").matrix_axes, q.matrix_axes)
    plain = table.quantize(x, "int8")
    for axes in ((-2, -1), (1, 2), matrices.MatrixAxes()):
      same = table.quantize(q.dequantize(), "int8", matrix_axes=axes)
      self.assertIsNone(same.matrix_axes)
      self.assertEqual(jax.tree.structure(same), jax.tree.structure(plain))
    with self.assertRaisesRegex(ValueError, "matrix_axes of 'x'"):
      table.quantize(x, "int8", matrix_axes=(0, 3))

  def test_trees_by_names(self):
    x = jnp.asarray(table.sample((6, 2, 4)))
    params = {
      "attn": {"query": {"kernel": x, "bias": jnp.ones((2, 4))}},
      "layers": {"up": jnp.asarray(table.sample((2, 8, 8)))},
      "scale": jnp.ones((4,)),
    }
    axes = {"attn": (0, (1, 2)), "layers": None, "scale": None}
    for spec in (axes, lambda tree: axes):
      tree = quantization.quantize_tree(params, "int8", matrix_axes=spec)
      query = tree["attn"]["query"]["kernel"]
      table.assert_same_bits(
        query, table.quantize(x, "int8", matrix_axes=(0, (1, 2)))
      )
      self.assertIsNone(tree["layers"]["up"].matrix_axes)
      again = quantization.quantize_tree(tree, "int8")
      self.assertEqual(jax.tree.structure(again), jax.tree.structure(tree))
      table.assert_same_bits(again, tree)
    with self.assertWarnsRegex(UserWarning, "6 matrices of 2 x 4"):
      quantization.quantize_tree(params, "int8")
    with self.assertRaisesRegex(ValueError, "nothing stands for 'layers'"):
      quantization.quantize_tree(params, "int8", matrix_axes={"attn": None})

  @parameterized.parameters("int8", "nvfp4")
  @pytest.mark.slow
  def test_explicit_meshes(self, name):
    mesh = jax.make_mesh(
      (2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2
    )
    x = jnp.asarray(table.sample((16, 2, 4)))
    for axes in ((0, (1, 2)), ((0, 1), 2)):
      want = table.quantize(x, name, key=table.key_of(5), matrix_axes=axes)
      for spec in (("y", "x"), (None, "x", "y"), (("x", "y"),)):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        with jax.set_mesh(mesh):
          y = jax.device_put(x, place)
          q = table.quantize(y, name, key=table.key_of(5), matrix_axes=axes)
          self.assertEqual(
            jax.typeof(q.codes), jax.typeof(y).update(dtype=q.codes.dtype)
          )
          got = table.dequantize(q)
          self.assertEqual(jax.typeof(got), jax.typeof(y))
          again = table.quantize(q, name, key=table.key_of(5))
          self.assertEqual(
            jax.tree.map(jax.typeof, again), jax.tree.map(jax.typeof, q)
          )
        table.assert_same_bits(jax.device_get(q), jax.device_get(want))
        np.testing.assert_array_equal(got, table.dequantize(want))
        # What `sharding.expand` puts beside the codes.
        placed = jax.device_put(want, sharding.expand(want, place))
        np.testing.assert_array_equal(table.dequantize(placed), got)


def test_checkpoints(tmp_path):
  """Files hold what there is in the axes' own shapes; other axes are told."""
  x = jnp.asarray(table.sample((6, 2, 4)))
  params = {"w": table.quantize(x, "nvfp4", matrix_axes=(0, (1, 2)))}
  like = jax.eval_shape(lambda: params)
  checkpoints = checkpoint.Checkpointer(tmp_path)
  checkpoints.save(1, params)
  checkpoints.wait()
  _, got = checkpoints.latest_readable(like)
  checkpoints.close()
  for other in (
    got,
    serialization.from_bytes(params, serialization.to_bytes(params)),
  ):
    assert jax.tree.structure(other) == jax.tree.structure(params)
    table.assert_same_bits(other, params)
  plain = {"w": table.quantize(x, "nvfp4")}
  with pytest.raises(ValueError, match="a QTensor of format 'nvfp4'"):
    serialization.from_bytes(plain, serialization.to_bytes(params))


if __name__ == "__main__":
  absltest.main()
