"""The diffusion transformer against numpy float64, and its invariances."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_ext import specs
from kernels_pallas.sparse import tiling
from models import dit, dit_block, layers
from tests.models import dit_reference

IMAGE = dit.Config(
  input_shape=(8, 8, 3),
  d_model=16,
  num_layers=2,
  num_heads=2,
  num_classes=3,
  context=True,
)
VIDEO = dataclasses.replace(
  IMAGE, input_shape=(4, 8, 4, 3), patch=(2, 2, 2), d_model=32
)
# Float32 sums of at most 64 terms, through two layers.
F32 = dict(rtol=2e-5, atol=2e-5)
# Against float64 also the angles of the time, up to 900, rounded to 2^-24.
TIMED = dict(rtol=2e-4, atol=2e-4)


def random_params(cfg, seed=0):
  """Also what `init` leaves at zero, so that every part counts."""
  leaves, tree = jax.tree.flatten(specs.abstract(dit.param_specs(cfg)))
  rng = np.random.default_rng(seed)
  return tree.unflatten(
    [jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves]
  )


def inputs(cfg, batch=2, seed=0):
  rng = np.random.default_rng(seed)
  x, context = rng.normal(size=(2, batch, *cfg.input_shape))
  return dict(
    x=jnp.asarray(x, jnp.float32),
    t=jnp.linspace(0.3, 0.9, batch),
    labels=jnp.arange(batch) % cfg.num_classes,
    context=jnp.asarray(context, jnp.float32),
  )


def velocity(cfg, params, arrays, **kwargs):
  return jax.jit(lambda p, a: dit.apply(p, **a, cfg=cfg, **kwargs))(
    params, arrays
  )


@pytest.mark.parametrize(
  "cfg",
  [
    IMAGE,
    dataclasses.replace(VIDEO, tile=(1, 2, 2), scan_layers=False),
  ],
  ids=["image", "tiled_video_unrolled"],
)
def test_against_numpy(cfg):
  params, arrays = random_params(cfg), inputs(cfg)
  got = velocity(cfg, params, arrays)
  assert got.dtype == jnp.float32
  expected = np.stack(
    [
      dit_reference.velocity(params, x, t, label, context, cfg)
      for x, t, label, context in zip(
        *(arrays[n] for n in ("x", "t", "labels", "context")), strict=True
      )
    ]
  )
  np.testing.assert_allclose(got, expected, **TIMED)


def test_velocity_is_zero_at_the_start():
  params = jax.jit(lambda key: dit.init(key, IMAGE))(jax.random.key(0))
  assert not np.any(velocity(IMAGE, params, inputs(IMAGE)))


@pytest.mark.parametrize("cfg", [IMAGE, VIDEO], ids=["image", "video"])
def test_patches(cfg):
  x = inputs(cfg)["x"]
  patches = dit.patchify(x, cfg)
  assert patches.shape == (2, cfg.num_tokens, cfg.patch_size)
  np.testing.assert_array_equal(dit.unpatchify(patches, cfg), x)
  second = x[0, :2, :2, 2:4] if cfg is VIDEO else x[0, :2, 2:4]
  np.testing.assert_array_equal(patches[0, 1], second.ravel())


@pytest.mark.parametrize("cfg", [IMAGE, VIDEO], ids=["image", "video"])
def test_positions_are_relative_along_every_axis(cfg):
  """q and k at any two places: the product depends on the way between."""
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, cfg.key_size)).astype(np.float32)
  cos, sin = dit_block.rotation(cfg, 1)
  everywhere = lambda a: jnp.tile(a, (1, cfg.num_tokens, 1, 1))
  q, k = (layers.rope(everywhere(a), cos, sin)[0, :, 0] for a in (q, k))
  scores = np.asarray(q @ k.T)
  places = list(np.ndindex(*cfg.grid))
  by_way = {}
  for i, a in enumerate(places):
    for j, b in enumerate(places):
      way = tuple(int(n) for n in np.subtract(b, a))
      by_way.setdefault(way, []).append(scores[i, j])
  # A sum of K products of about 1, rounded to 2^-24.
  assert max(np.ptp(v) for v in by_way.values()) < 1e-5
  one = np.eye(len(cfg.grid), dtype=int)
  for step in one:
    assert abs(by_way[tuple(step)][0] - by_way[tuple(0 * step)][0]) > 1e-3


def test_examples_are_independent_and_everything_counts():
  params, arrays = random_params(IMAGE), inputs(IMAGE)
  f = jax.jit(lambda a: dit.apply(params, **a, cfg=IMAGE))
  whole = f(arrays)
  swapped = f(jax.tree.map(lambda a: a[::-1], arrays))
  np.testing.assert_allclose(swapped[::-1], whole, **F32)
  for name, change in (
    ("x", 0.1), ("t", 0.05), ("labels", 1), ("context", 0.1)
  ):  # fmt: skip
    changed = arrays[name].at[0].add(change)
    other = f({**arrays, name: changed})
    assert np.max(np.abs(other[0] - whole[0])) > 1e-3, name
    np.testing.assert_allclose(other[1], whole[1], **F32)
  none = jnp.full((2,), IMAGE.num_classes)
  np.testing.assert_array_equal(
    f({**arrays, "labels": none}), f({**arrays, "labels": None})
  )
  alone = jax.eval_shape(f, {**arrays, "context": None})
  assert alone.shape == whole.shape


def test_qkv_and_the_order_of_tiles():
  params, arrays = random_params(IMAGE), inputs(IMAGE)
  out, raster = velocity(IMAGE, params, arrays, return_qkv=True)
  assert {a.shape for a in raster} == {(2, 2, 32, 2, 8)}
  # In the order of tiles, scanned or not, the result is the same.
  cfg = dataclasses.replace(IMAGE, tile=(2, 4), scan_layers=False)
  same, tiled = velocity(cfg, params, arrays, return_qkv=True)
  np.testing.assert_allclose(same, out, **F32)
  for a, b in zip(raster, tiled, strict=True):
    order = lambda a: tiling.tile(a, cfg.grid, cfg.tile, axis=2)
    halves = [order(half) for half in jnp.split(a, 2, axis=2)]
    np.testing.assert_allclose(jnp.concatenate(halves, 2), b, **F32)


def test_loss_and_gradients():
  """Without velocity it is |noise - x|^2; every parameter has a gradient."""
  x = inputs(IMAGE, batch=8)["x"]
  run = lambda p, labels: dit.loss(
    p, jax.random.key(0), x, labels, cfg=IMAGE, context=x, label_dropout=0.5
  )
  f = jax.jit(jax.value_and_grad(run))
  labels = jnp.zeros(8, jnp.int32)
  params = random_params(IMAGE)
  still = {**params, "head": jnp.zeros_like(params["head"])}
  value, _ = f(still, labels)
  # 1536 squares of variance 8 about 2: their mean is within 5 deviations.
  assert abs(value - 1 - jnp.mean(x**2)) < 5 * math.sqrt(8 / x.size)
  _, grads = f(params, labels)
  for leaf in jax.tree.leaves(grads):
    assert np.all(np.isfinite(leaf)) and np.any(leaf)
  # Some labels were dropped, some not; the others were never seen.
  seen = np.any(np.asarray(grads["label_embed"]), axis=1)
  np.testing.assert_array_equal(seen, [True, False, False, True])


def test_bfloat16_is_close():
  params, arrays = random_params(IMAGE), inputs(IMAGE)
  exact = velocity(IMAGE, params, arrays)
  cfg = dataclasses.replace(IMAGE, compute_dtype="bfloat16")
  got = velocity(cfg, params, arrays)
  assert got.dtype == jnp.float32
  # Activations are rounded to 2^-9 some twenty times.
  error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.03


def test_sampling():
  """Without velocity the noise itself; one step by hand, guided."""
  cfg = dataclasses.replace(IMAGE, num_layers=1)
  arrays = inputs(cfg)
  noise = arrays.pop("x")
  del arrays["t"]

  def sample(p, **kwargs):
    run = lambda p: dit.sample(p, noise, cfg=cfg, **arrays, **kwargs)
    return jax.jit(run)(p)

  params = random_params(cfg)
  still = {**params, "head": jnp.zeros_like(params["head"])}
  np.testing.assert_array_equal(sample(still, steps=3), noise)
  f = jax.jit(lambda a: dit.apply(params, **a, x=noise, t=jnp.ones(2), cfg=cfg))
  v = f(arrays)
  free = f({**arrays, "labels": jnp.full((2,), cfg.num_classes)})
  np.testing.assert_allclose(
    sample(params, steps=1, guidance=3.0),
    noise - (3 * v - 2 * free),
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(steps=0), "steps: got 0"),
    (dict(steps=2, full_steps=3), "full_steps: got 3; allowed: 0 to 2"),
    (dict(steps=2, guidance=2.0), "guidance: got 2.0"),
  ],
)
def test_sampling_bad_input(changes, words):
  params = jax.eval_shape(lambda: dit.init(jax.random.key(0), IMAGE))
  with pytest.raises(ValueError, match=words):
    dit.sample(params, jnp.zeros((1, 8, 8, 3)), cfg=IMAGE, **changes)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(input_shape=(8, 8)), r"input_shape: got \(8, 8\)"),
    (dict(patch=(3, 2)), r"patch: got \(3, 2\); allowed: a divisor"),
    (dict(patch=(2,)), r"patch: got \(2,\)"),
    (dict(d_model=18), "d_model: got 18; allowed: a multiple of 2"),
    (dict(d_model=4), "d_model: got 4; .*at least 4"),
    (dict(num_layers=0), "num_layers: got 0"),
    (dict(mlp_ratio=0.0), "mlp_ratio: got 0.0"),
    (dict(num_classes=-1), "num_classes: got -1"),
    (dict(compute_dtype="float16"), "compute_dtype: got 'float16'"),
    (dict(attention="linear"), "attention: got 'linear'; allowed"),
    (dict(tile=(3, 2)), r"tile: got \(3, 2\); allowed: a divisor"),
    (dict(attention="piecewise"), r"tile: got \(\)"),
    (dict(density=0.0), "density: got 0.0"),
    (dict(keep=1.5), "keep: got 1.5"),
    (dict(sharp=-0.1), "sharp: got -0.1"),
    (dict(dense_layers=3), "dense_layers: got 3; allowed: 0 to num_layers=2"),
    (
      dict(attention="in_context", tile=(2, 2), context=False),
      "context: got False",
    ),
    (dict(coarse_residual=True, context=False), "coarse_residual: got True"),
  ],
)
def test_config_bad_input(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(IMAGE, **changes)


@pytest.mark.parametrize(
  ("cfg", "changes", "words"),
  [
    (IMAGE, dict(x=jnp.zeros((2, 8, 8, 1))), "x: got shape"),
    (IMAGE, dict(context=jnp.zeros((1, 8, 8, 3))), "context: got shape"),
    (
      dataclasses.replace(IMAGE, num_classes=0),
      dict(context=None),
      "labels: got some",
    ),
    (dataclasses.replace(IMAGE, context=False), {}, "context: got one"),
    (
      dataclasses.replace(IMAGE, attention="in_context", tile=(2, 2)),
      dict(context=None),
      "context: got None",
    ),
  ],
)
def test_apply_bad_input(cfg, changes, words):
  params = jax.eval_shape(lambda: dit.init(jax.random.key(0), cfg))
  with pytest.raises(ValueError, match=words):
    dit.apply(params, **{**inputs(IMAGE), **changes}, cfg=cfg)


SPARSE = {
  "piecewise": dict(attention="piecewise", density=0.25),
  "in_context": dict(attention="in_context", keep=0.5, sharp=0.5, density=0.25),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_attention(name):
  """Of everything it is full attention; of little, something else.

  Dense layers in front have the same q, k and v as under full attention.
  """
  cfg = dataclasses.replace(IMAGE, tile=(2, 2), **SPARSE[name])
  params, arrays = random_params(cfg), inputs(cfg)
  full, expected = velocity(
    dataclasses.replace(cfg, attention="full"), params, arrays, return_qkv=True
  )
  everything = dataclasses.replace(cfg, keep=1.0, sharp=1.0, density=1.0)
  np.testing.assert_allclose(velocity(everything, params, arrays), full, **F32)
  few = dataclasses.replace(cfg, dense_layers=1)
  out, qkv = velocity(few, params, arrays, return_qkv=True)
  assert np.max(np.abs(out - full)) > 1e-2
  for a, b in zip(qkv, expected, strict=True):
    np.testing.assert_allclose(a, b, **F32)


def test_coarse_residual():
  """A share of 0 adds nothing, as at the start; another does."""
  cfg = dataclasses.replace(
    IMAGE, tile=(2, 2), coarse_residual=True, **SPARSE["in_context"]
  )
  params, arrays = random_params(cfg), inputs(cfg)
  assert not np.any(dit.init(jax.random.key(0), cfg)["layers"]["coarse"])
  layer = dict(params["layers"])
  share = layer.pop("coarse")
  plain = {**params, "layers": layer}
  without = velocity(
    dataclasses.replace(cfg, coarse_residual=False), plain, arrays
  )
  layer["coarse"] = jnp.zeros_like(share)
  np.testing.assert_array_equal(velocity(cfg, plain, arrays), without)
  assert np.max(np.abs(velocity(cfg, params, arrays) - without)) > 1e-2
  full = dataclasses.replace(cfg, attention="full")
  np.testing.assert_array_equal(
    velocity(full, params, arrays), velocity(full, plain, arrays)
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_gradients_through_sparse_attention(name):
  cfg = dataclasses.replace(
    IMAGE,
    tile=(2, 2),
    coarse_residual=name == "in_context",
    **SPARSE[name],
  )
  params, arrays = random_params(cfg), inputs(cfg)
  total = lambda p: jnp.sum(dit.apply(p, **arrays, cfg=cfg) ** 2)
  for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params)):
    assert np.all(np.isfinite(leaf)) and np.any(leaf)


@pytest.mark.slow
def test_sampling_whose_first_steps_attend_fully():
  """All of them: full attention. The first: the same first step."""
  cfg = dataclasses.replace(IMAGE, tile=(2, 2), **SPARSE["piecewise"])
  params, arrays = random_params(cfg), inputs(cfg)
  noise = arrays.pop("x")
  del arrays["t"]

  def sample(cfg, full_steps):
    run = lambda p: dit.sample(
      p, noise, cfg=cfg, **arrays, steps=2, full_steps=full_steps
    )
    return jax.jit(run)(params)

  full = sample(dataclasses.replace(cfg, attention="full"), 0)
  np.testing.assert_allclose(sample(cfg, 2), full, **F32)
  half = noise - 0.5 * velocity(
    dataclasses.replace(cfg, attention="full"),
    params,
    {**arrays, "x": noise, "t": jnp.ones(2)},
  )
  at_half = {**arrays, "x": half, "t": jnp.full((2,), 0.5)}
  expected = half - 0.5 * velocity(cfg, params, at_half)
  np.testing.assert_allclose(sample(cfg, 1), expected, rtol=1e-4, atol=1e-4)
