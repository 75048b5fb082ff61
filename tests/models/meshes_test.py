"""Models under explicit meshes and in `jax.shard_map` with its default check.

Every case equals the undivided model; one divided by its batch alone gathers
nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlib_ext import meshes, sharding
from models import cnn, dit, dit_config, sampling, transformer, vit
from tests import common, quick

P = PartitionSpec
_MIXERS = {
  "full": dict(remat="full"),
  "full_bfloat16": dict(mixers=("full",), compute_dtype="bfloat16"),
  "window": dict(window=(8,), sink=1, block_size=8),
  "sparse": dict(block_size=8),
  "in_context": dict(context=8, block_size=8),
  **{name: {} for name in ("mdn", "gdn", "kda", "gla", "linear", "mamba2")},
}
_QUICK = {"full", "mdn"}
mixers = pytest.mark.parametrize(
  "name", quick.cases({name: name for name in _MIXERS}, _QUICK)
)
_PIXELS = dict(input_shape=(8, 8, 3), patch=(4, 4), d_model=16, num_layers=1)


def _config(name):
  fields = dict(vocab_size=32, d_model=16, num_layers=1, num_heads=4, d_ff=16)
  return transformer.Config(**{**fields, "mixers": (name,), **_MIXERS[name]})


def _tokens():
  return np.random.default_rng(0).integers(0, 32, (8, 25))


def _transformer(name):
  """The loss and its gradient of one transformer, and its arguments."""
  cfg = _config(name)

  def loss(params, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return transformer.loss(params, inputs, targets, cfg=cfg)[0]

  return loss, transformer.init(jax.random.key(0), cfg), _tokens()


def _classes(model, cfg):
  x = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)

  def loss(params, x):
    return jnp.mean(jnp.square(model.apply(params, x, cfg=cfg).logits - 1))

  return loss, model.init(jax.random.key(0), cfg), x


def _dit():
  cfg = dit_config.Config(**_PIXELS, num_heads=2, num_classes=3)

  def loss(params, x):
    # Not `dit.loss`, whose random times are those of a device's part.
    t, labels = jnp.full(len(x), 0.5), jnp.zeros(len(x), jnp.int32)
    velocity = dit.apply(params, x, t, labels, cfg=cfg)
    return jnp.mean(jnp.square(velocity - 1))

  params = dit.init(jax.random.key(0), cfg)
  # Its last matrix starts at zero, and lets nothing through.
  params["head"] += 0.1
  return loss, params, _classes(cnn, cnn.Config(num_classes=3))[2]


_CASES = {
  **{name: functools.partial(_transformer, name) for name in _MIXERS},
  "dit": _dit,
  "vit": lambda: _classes(
    vit, vit.Config(**_PIXELS, num_heads=2, num_classes=3)
  ),
  "cnn": lambda: _classes(
    cnn, cnn.Config(input_shape=(8, 8, 3), widths=(8,), num_classes=3)
  ),
}
cases = pytest.mark.parametrize("make", quick.cases(_CASES, _QUICK))


def _mesh(kind=AxisType.Explicit, **axes):
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes)
  )


def _put(tree, mesh, spec):
  return jax.device_put(tree, NamedSharding(mesh, spec))


def _bfloat16(make):
  return "bfloat16" in getattr(make, "args", [""])[0]


def _assert_same(got, want, make):
  """Within the roundings of a sum over devices in another order."""
  eps = 2.0**-8 if _bfloat16(make) else 2.0**-22
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    common.assert_close(a, b, eps=eps)


@cases
def test_batch_divided_over_an_explicit_mesh(make):
  loss, params, x = make()
  run = jax.jit(jax.value_and_grad(loss))
  want = run(params, x)
  mesh = _mesh(b=8)
  args = _put(params, mesh, P()), _put(x, mesh, P("b"))
  with jax.set_mesh(mesh):
    compiled = run.lower(*args).compile()
    got = compiled(*args)
  _assert_same(got, want, make)
  for grad, param in zip(*map(jax.tree.leaves, (got[1], args[0])), strict=True):
    assert jax.typeof(grad) == jax.typeof(param)
  assert "all-gather" not in compiled.as_text()


@mixers
def test_batch_and_heads_divided_over_an_explicit_mesh(name):
  make = _CASES[name]
  loss, params, x = make()
  run = jax.jit(jax.value_and_grad(loss))
  want = run(params, x)
  mesh = _mesh(b=2, t=4)
  rules = sharding.Rules(
    batch="b", embed=None, heads="t", kv_heads="t", mlp="t", vocab="t"
  )
  specs = transformer.param_specs(_config(name))
  divided = jax.device_put(params, sharding.shardings(specs, mesh, rules))
  # Without a mesh in the context: the arrays' types name theirs.
  got = run(divided, _put(x, mesh, P("b")))
  _assert_same(got, want, make)
  for a, b in zip(*map(jax.tree.leaves, (got[1], divided)), strict=True):
    assert jax.typeof(a) == jax.typeof(b)


@cases
def test_in_shard_map_with_its_default_check(make):
  loss, params, x = make()
  run = jax.jit(jax.value_and_grad(loss))
  want = run(params, x)
  mesh = _mesh(AxisType.Auto, b=8)

  def mean(params, x):
    return jax.lax.pmean(loss(params, x), "b")

  mapped = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("b")), out_specs=P())
  got = jax.jit(jax.value_and_grad(mapped))(params, x)
  _assert_same(got, want, make)


def test_outputs_and_decoding_on_an_explicit_mesh():
  cfg = _config("full")
  params, tokens = transformer.init(jax.random.key(0), cfg), _tokens()
  mesh = _mesh(b=2, t=4)
  with jax.set_mesh(mesh):
    rules = sharding.Rules(
      "b", embed=None, heads=None, kv_heads=None, mlp=None, vocab="t"
    )
    specs = transformer.param_specs(cfg)
    divided = jax.device_put(params, sharding.shardings(specs, mesh, rules))
    rows = _put(tokens, mesh, P("b"))
    apply = jax.jit(
      functools.partial(
        transformer.apply,
        cfg=cfg,
        return_hidden=True,
        return_qkv=True,
        return_max_logits=True,
        residual_sharding=NamedSharding(mesh, P("b")),
      )
    )
    got = apply(divided, rows)
    assert meshes.spec(got.logits) == ("b", None, "t")
    assert meshes.spec(got.hidden)[:2] == (None, "b")
    assert meshes.spec(got.qkv.q)[:2] == (None, "b")
    cache = transformer.init_cache(cfg, 8, 4)
    logits, cache = jax.jit(
      functools.partial(transformer.decode_step, cfg=cfg)
    )(divided, cache, rows[:, 0])
    drawn = sampling.sample(
      jax.random.key(0), divided, rows, cfg=cfg, steps=3, temperature=0
    )
  want = transformer.apply(
    params,
    tokens,
    cfg=cfg,
    return_hidden=True,
    return_qkv=True,
    return_max_logits=True,
  )
  _assert_same(got, want, None)
  _assert_same(logits, want.logits[:, 0], None)
  np.testing.assert_array_equal(
    drawn,
    sampling.sample(
      jax.random.key(0), params, tokens, cfg=cfg, steps=3, temperature=0
    ),
  )


@pytest.mark.parametrize("name", ["full", "full_bfloat16"])
def test_second_derivatives(name):
  make = _CASES[name]
  loss, params, x = make()
  gradient = jax.grad(lambda params: loss(params, x))
  along = jax.tree.map(jnp.cos, params)

  def slope(params):
    pairs = zip(*map(jax.tree.leaves, (gradient(params), along)), strict=True)
    return sum(jnp.vdot(g, v) for g, v in pairs)

  forward = jax.jit(lambda p: jax.jvp(gradient, (p,), (along,))[1])(params)
  _assert_same(jax.jit(jax.grad(slope))(params), forward, make)
