"""`optim.flax_matrix_axes` on flax's own modules, linen and nnx."""

from __future__ import annotations

import inspect
import warnings

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optim
from jaxlib_ext import quantization
from tests.optim.rows import ROWS

X = jnp.ones((1, 3, 6))
AXES = optim.MatrixAxes
SPLIT, MERGED = AXES(-3, (-2, -1)), AXES((-3, -2), -1)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
    y = nn.DenseGeneral((2, 3))(x)
    x = x + nn.DenseGeneral(6, axis=(-2, -1), name="back")(y)
    return x + nn.Conv(6, (3,))(x), None


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    return scan()(x, None)


class Net(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.attn = nnx.MultiHeadAttention(
      num_heads=2, in_features=6, decode=False, rngs=rngs
    )
    self.wide = nnx.LinearGeneral(6, (2, 3), rngs=rngs)
    self.back = nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), rngs=rngs)
    self.conv = nnx.Conv(6, 6, (3,), rngs=rngs)


def linen(module):
  return jax.eval_shape(module.init, jax.random.key(0), X)


def found(params):
  """Axes by name, of the kernels that have any."""
  is_axes = lambda x: isinstance(x, AXES)
  flat = jax.tree_util.tree_leaves_with_path(
    optim.flax_matrix_axes(params), is_leaf=is_axes
  )
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {
    name(path).removesuffix("/value").removesuffix("/kernel"): axes
    for path, axes in flat
  }


@pytest.mark.parametrize("module", [Block(), Stack()], ids=["one", "scan"])
@pytest.mark.parametrize("wrap", [dict, flax.core.freeze])
def test_linen(module, wrap):
  got = found(wrap(linen(module)))
  got = {name.split("/")[-1]: axes for name, axes in got.items()}
  want = dict.fromkeys(("query", "key", "value", "DenseGeneral_0"), SPLIT)
  assert got == want | dict.fromkeys(("out", "back", "Conv_0"), MERGED)


def test_nnx():
  got = found(nnx.state(Net(), nnx.Param))
  want = dict.fromkeys(("attn/query", "attn/key", "attn/value", "wide"), SPLIT)
  assert got == want | dict.fromkeys(("attn/out", "back", "conv"), MERGED)


def test_plain_stacks_have_the_last_two():
  tree = {"layers": {"query": {"kernel": jnp.ones((2, 4, 6))}}}
  assert found(tree) == {}


@pytest.mark.parametrize("given", ["function", "tree"])
def test_muon_orthogonalises_the_merged_matrices(given):
  params = nnx.state(Net(), nnx.Param)["attn"]
  spec = optim.flax_matrix_axes
  tx = optim.muon(
    1.0,
    coefficients="exact",
    shape_scale=None,
    matrix_axes=spec if given == "function" else spec(params),
  )
  updates, _ = tx.update(params, tx.init(params), params)
  for name, shape in (("query", (6, 6)), ("out", (6, 6))):
    u = np.asarray(updates[name]["kernel"][...]).reshape(shape)
    np.testing.assert_allclose(
      np.linalg.svd(u, compute_uv=False), 1, atol=2.0**-20
    )


def test_entries_built_in_other_ways():
  params = nnx.state(Net(), nnx.Param)["attn"]
  axes = {
    name: MERGED if name == "out" else (0, (1, 2)) for name in sorted(params)
  }
  paths = [path for path, _ in nnx.to_flat_state(params)]
  specs = (
    axes,
    {path: axes[path[0]] for path in paths},
    {"/".join(path): axes[path[0]] for path in paths},
    nnx.State({name: {"kernel": a, "bias": None} for name, a in axes.items()}),
    optim.flax_matrix_axes(params),
  )
  out = []
  for spec in specs:
    tx = optim.muon(1.0, matrix_axes=spec)
    out.append(tx.update(params, tx.init(params), params)[0])
  for other in out[1:]:
    jax.tree.map(np.testing.assert_array_equal, out[0], other)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"query": None}, "nothing stands for 'key'"),
    (5, "nothing stands for 'key', got 5"),
    ((0, 7), "matrix_axes of 'key/kernel' must be"),
    (
      {"key": None, "out": None, "query": None, "value": None, "x": None},
      "'x' is none of them",
    ),
  ],
)
def test_what_does_not_fit_is_named_in_short(spec, message):
  params = nnx.state(Net(), nnx.Param)["attn"]
  with pytest.raises(ValueError, match=message) as error:
    optim.muon(1.0, matrix_axes=spec).init(params)
  assert len(str(error.value)) < 300


def takes_axes(row):
  return "matrix_axes" in inspect.signature(row.factory).parameters


@pytest.mark.parametrize(
  "name",
  [n for n, row in ROWS.items() if takes_axes(row)],
)
def test_a_kernel_of_three_axes_is_one_of_two(name):
  """Every factory: the update is that of the reshaped kernels."""
  row = ROWS[name]
  shapes = {"query": (6, 2, 4), "out": (2, 4, 6)}
  flat_shapes = {"query": (6, 8), "out": (8, 6)}
  sample = np.random.default_rng(0).standard_normal
  flat = {k: {"kernel": jnp.asarray(sample(s))} for k, s in flat_shapes.items()}
  flat = jax.tree.map(lambda x: x.astype(jnp.float32), flat)
  wide = {k: {"kernel": flat[k]["kernel"].reshape(shapes[k])} for k in shapes}
  out = []
  for params, axes in ((flat, None), (wide, optim.flax_matrix_axes)):
    tx = row.factory(0.1, matrix_axes=axes)
    held = params
    if row.quantized:
      held = row.prepare(params, matrix_axes=axes)
    updates, _ = jax.jit(tx.update)(params, tx.init(held), held)
    updates = quantization.dequantize_tree(updates)
    out.append({k: np.ravel(updates[k]["kernel"]) for k in shapes})
  bound = 32 * row.rounding
  for k in shapes:
    np.testing.assert_allclose(
      out[1][k], out[0][k], rtol=0, atol=bound * np.abs(out[0][k]).max()
    )


def trained_by_eco(params, grads, axes):
  """Parameters after two steps, and what `eco_flush` makes of them."""
  params = quantization.quantize_tree(params, "int8:4", matrix_axes=axes)
  tx = optim.eco(0.1, weight_decay=0.1, matrix_axes=axes)

  def run(params, grads):
    state = tx.init(params)
    for _ in range(2):
      updates, state = tx.update(grads, state, params)
      params = optim.apply_updates(params, updates)
    return params, optim.eco_flush(params, state)

  out = jax.jit(run)(params, grads)
  for tree in out:
    assert jax.tree.structure(tree) == jax.tree.structure(params)
  return out


@pytest.mark.slow
def test_eco_keeps_the_axes_of_its_parameters():
  """Bit for bit that of the reshaped kernels, also on an explicit mesh."""
  sample = np.random.default_rng(0).standard_normal
  wide = {
    "query": {"kernel": jnp.asarray(sample((8, 2, 4)), jnp.float32)},
    "out": {"kernel": jnp.asarray(sample((2, 4, 8)), jnp.float32)},
  }
  flat = jax.tree.map(lambda x: x.reshape(8, 8), wide)
  spec = optim.flax_matrix_axes
  want = trained_by_eco(flat, jax.tree.map(jnp.ones_like, flat), None)
  found = [trained_by_eco(wide, jax.tree.map(jnp.ones_like, wide), spec)]
  mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
  places = {
    "query": {"kernel": NamedSharding(mesh, PartitionSpec("y", "x"))},
    "out": {"kernel": NamedSharding(mesh, PartitionSpec("x", None, "y"))},
  }
  with jax.set_mesh(mesh):
    params = jax.device_put(wide, places)
    got = trained_by_eco(params, jax.tree.map(jnp.ones_like, params), spec)
  found.append(jax.device_get(got))
  for got in found:
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      assert np.ravel(a).tobytes() == np.ravel(b).tobytes()


def test_axes_of_quantized_parameters():
  params = {"query": {"kernel": jnp.ones((8, 2, 4))}}
  spec = optim.flax_matrix_axes
  held = quantization.quantize_tree(params, "int8", matrix_axes=spec)
  for axes in (None, spec, (0, (1, 2)), (-3, (-2, -1))):
    optim.eco(0.1, matrix_axes=axes).init(held)
  optim.eco(0.1, matrix_axes=spec).init(jax.eval_shape(lambda: params))
  with pytest.raises(
    ValueError, match="'query/kernel' must be .*quantize_tree"
  ):
    optim.eco(0.1, matrix_axes=(-2, -1)).init(held)
  assert "[0] x [1, 2]" in optim.describe_labels(held)
  scales = 4 * 8
  assert held["query"]["kernel"].nbytes_packed == 8 * 2 * 4 + scales
  plain = quantization.quantize_tree(params, "int8", matrix_axes=(-2, -1))
  for old, new in ((held, plain), (plain, held)):
    with pytest.raises(ValueError, match="matrix axes .* takes another such"):
      optim.apply_updates(old, new)
  value = lambda p: jnp.sum(p["query"]["kernel"].dequantize())
  tx = optim.qzo(0.1)
  step = jax.jit(lambda s, p: tx.update(params, s, p, value_fn=value)[0])
  new = optim.apply_updates(held, step(tx.init(held), held))
  assert jax.tree.structure(new) == jax.tree.structure(held)


@pytest.mark.parametrize(
  "factory",
  [
    optim.muon,
    optim.swan,
    optim.column_normalized_sgd,
    optim.galore,
    optim.dion2,
    optim.stable_spam,
  ],
)
def test_one_warning_where_three_axes_are_ambiguous(factory):
  params = {
    n: {"kernel": jnp.ones((32, 4, 8))} for n in ("query", "key", "lm_head")
  }
  params["lm_head"]["kernel"] = jnp.ones((32, 8))
  options = {} if factory is not optim.galore else {"rank": 2}
  with pytest.warns(UserWarning, match="32 matrices of 4 x 8") as found:
    tx = factory(0.1, **options)
    state = tx.init(params)
  (warning,) = found
  for words in ("'key/kernel', 'query/kernel'", "optim.flax_matrix_axes"):
    assert words in str(warning.message)
  keep = {"query": (-2, -1), "key": (-2, -1), "lm_head": None}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    tx.update(params, state, params)
    for axes in (optim.flax_matrix_axes, {**keep, "query": (0, (1, 2))}):
      factory(0.1, matrix_axes=axes, **options).init(params)
    factory(0.1, matrix_axes=(-2, -1), **options).init(params)


def test_no_warning_where_names_tell_the_stack():
  shapes = {
    "layers": {"up": (2, 8, 16), "experts": {"down": (2, 3, 16, 8)}},
    "ScanBlock_0": {"Dense_0": {"kernel": (2, 8, 16)}},
    "h": {"q": (2, 8, 8)},
    "Conv_0": {"kernel": (3, 3, 8, 8)},
    "stage1": {"up": (2, 3, 3, 8, 8), "shrink": (3, 3, 8, 8)},
  }
  params = jax.tree.map(
    jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.eval_shape(optim.scale_by_muon().init, params)
