"""The order of tiles against loops over the grid, and exact inverses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sparse import tiling

CASES = {
  "1d": ((12,), (4,)),
  "2d": ((4, 6), (2, 3)),
  "2d_one_tile": ((4, 6), (4, 6)),
  "2d_rows": ((4, 6), (1, 6)),
  "3d": ((4, 4, 6), (2, 4, 3)),
}


def order(grid, tile):
  """Raster index of the token at each place, by walking through the tiles."""
  out = []
  counts = [range(n // t) for n, t in zip(grid, tile, strict=True)]
  for corner in itertools.product(*counts):
    for inside in itertools.product(*map(range, tile)):
      at = [c * t + i for c, t, i in zip(corner, tile, inside, strict=True)]
      out.append(np.ravel_multi_index(at, grid))
  return np.array(out)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_order_and_inverse(name, prefix):
  grid, tile = CASES[name]
  n = int(np.prod(grid))
  x = np.random.default_rng(0).normal(size=(2, prefix + n, 5))
  x = x.astype(np.float32)
  tiled = tiling.tile(jnp.asarray(x), grid, tile, prefix=prefix)
  np.testing.assert_array_equal(tiled[:, :prefix], x[:, :prefix])
  np.testing.assert_array_equal(
    tiled[:, prefix:], x[:, prefix + order(grid, tile)]
  )
  back = tiling.untile(tiled, grid, tile, prefix=prefix)
  np.testing.assert_array_equal(back, x)


def test_any_axis_and_dtype():
  x = np.arange(24, dtype=np.int32)
  grid, tile = CASES["2d"]
  for axis in (0, -1):
    y = tiling.tile(jnp.asarray(x), grid, tile, axis=axis)
    np.testing.assert_array_equal(y, order(grid, tile))
    assert y.dtype == x.dtype
  heads = jnp.zeros((2, 3, 24, 5))
  assert tiling.untile(heads, grid, tile, axis=2).shape == heads.shape


def test_no_gather():
  """Two reshapes and a transposition: nothing indexed, nothing stored."""
  f = lambda x: tiling.untile(
    tiling.tile(x, (4, 6), (2, 3), prefix=1), (4, 6), (2, 3), prefix=1
  )
  text = str(jax.make_jaxpr(f)(jnp.zeros((1, 25))))
  assert "transpose" in text
  assert "gather" not in text and "scatter" not in text


@pytest.mark.parametrize("f", [tiling.tile, tiling.untile])
@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(tile=(3, 2)), r"tile: got \(3, 2\); allowed: divisors of the grid"),
    (dict(tile=(2,)), r"tile: got \(2,\); allowed: 2 sizes"),
    (dict(tile=(0, 2)), r"tile: got \(0, 2\)"),
    (dict(grid=()), r"grid: got \(\)"),
    (dict(grid=(4, 4)), r"x: got 24 tokens .* 16 of the grid"),
    (dict(prefix=1), r"x: got 24 tokens .* prefix=1"),
    (dict(prefix=-1), "prefix: got -1"),
    (dict(axis=2), "axis: got 2"),
  ],
)
def test_bad_input(f, changes, words):
  arguments = dict(grid=(4, 6), tile=(2, 2), axis=1, prefix=0) | changes
  grid, tile = arguments.pop("grid"), arguments.pop("tile")
  with pytest.raises(ValueError, match=words):
    f(jnp.zeros((1, 24)), grid, tile, **arguments)
