"""Every optimizer has a name, and every name a transformation that updates."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim
from experiments import configs, errors, loop, optimizers
from jaxlib_ext import quantization
from tests.experiments import runs

PARAMS = {
  "embed": jnp.ones((64, 32)),
  "layers": {"up": jnp.ones((2, 32, 64)), "norm": jnp.ones((2, 32))},
  "lm_head": jnp.ones((32, 64)),
}


def config(name, *more):
  return configs.resolve("smoke", (f"optimizer.name={name}", *more))


def test_every_factory_of_optim_has_a_name():
  def is_factory(f):
    wanted = ["learning_rate", "weight_decay"]
    return inspect.isfunction(f) and all(
      w in inspect.signature(f).parameters for w in wanted
    )

  found = {n for n in dir(optim) if is_factory(getattr(optim, n))}
  own = {"adamw", "scaled_adamw", "lion", "sgd"}
  assert found == set(optimizers.FACTORIES) - own
  assert set(optimizers.DEFAULTS) == set(optimizers.FACTORIES)


@pytest.mark.parametrize("name", optimizers.FACTORIES)
def test_the_defaults_make_an_optimizer(name):
  c = config(name)
  tx = optimizers.build(c.optimizer, steps=10, warmup_steps=2, seed=0)
  params = PARAMS
  if optimizers.quantized(name):
    params = quantization.quantize_tree(params, c.quantization.format)
  more = {}
  if optimizers.needs_loss(name):
    more["value_fn"] = lambda p: jnp.sum(
      quantization.dequantize_tree(p)["layers"]["up"]
    )

  def step(params, grads):
    return tx.update(grads, tx.init(params), params, **more)[0]

  updates = jax.eval_shape(step, params, PARAMS)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  if optimizers.quantized(name):  # replaced instead of added to
    updates = jax.eval_shape(quantization.dequantize_tree, updates)
  assert shapes(updates) == shapes(PARAMS)


def first_updates(name, *more):
  """At a rate of 0.01 without decay, for gradients that are the parameters."""
  more += "optimizer.learning_rate=0.01", "optimizer.weight_decay=0"
  tx = optimizers.build(config(name, *more).optimizer, 10, 0, 0)
  return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]


def test_the_control_scales_the_matrices_of_adamw():
  plain, scaled = first_updates("adamw"), first_updates("scaled_adamw")
  scaled["layers"]["up"] = 4 * scaled["layers"]["up"]
  jax.tree.map(np.testing.assert_array_equal, scaled, plain)


def test_what_is_left_over_has_a_rate_of_its_own():
  plain = first_updates("muon")
  other = first_updates("muon", "optimizer.fallback_learning_rate=0.04")
  other["embed"], other["lm_head"] = other["embed"] / 4, other["lm_head"] / 4
  other["layers"]["norm"] = other["layers"]["norm"] / 4
  jax.tree.map(np.testing.assert_array_equal, other, plain)
  with pytest.raises(errors.UserError, match="fallback_learning_rate"):
    config("scale", "optimizer.fallback_learning_rate=0.1")
  with pytest.raises(errors.UserError, match="fallback_learning_rate"):
    config("muon", "optimizer.fallback_learning_rate=fast")


def test_formats():
  assert config("eco").quantization.format == "int4:32"
  assert config("q_galore").quantization.format == "int8:256"
  own = config("q_galore", "quantization.format=int8")
  assert own.quantization.format == "int8"
  assert optimizers.flushes("eco") and not optimizers.flushes("q_galore")


def test_the_loss_is_asked_for():
  assert optimizers.needs_loss("mezo") and not optimizers.needs_loss("scale")
  tx = optimizers.build(config("mezo").optimizer, 10, 2, 0)
  with pytest.raises(ValueError, match="value_fn"):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("text, value", [("8", 8), ("0.5", 0.5), ("1e-1", 0.1)])
def test_a_rank_is_a_number_or_a_share(text, value):
  got = config("galore", f"optimizer.rank={text}").optimizer.arguments["rank"]
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
  "override, message",
  [
    ("optimizer.rank=much", "rank"),
    ("optimizer.scale=much", "scale"),
    ("optimizer.rnak=8", "did you mean 'rank'"),
    ("optimizer.growth_limit=1", "unknown field 'optimizer.growth_limit'"),
  ],
)
def test_bad_arguments(override, message):
  with pytest.raises(errors.UserError, match=message):
    config("galore", override)


def test_none_is_a_limit_too():
  got = config("fira", "optimizer.growth_limit=none").optimizer
  assert got.arguments["growth_limit"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mezo", "qzo", "q_galore"])
def test_the_trainer_serves_what_is_not_a_gradient_of_floats(name, tmp_path):
  overrides = runs.settings(
    runs.write_corpus(tmp_path / "corpus"),
    f"optimizer.name={name}",
    "optimizer.learning_rate=0.001",
    "model.num_layers=1",
  )
  run = loop.Run(configs.resolve("smoke", overrides), tmp_path / "run")
  state = run.trainer.init()
  leaf = lambda state: state.params["layers"]["up"]
  first = jax.tree.map(np.asarray, leaf(state))
  batch = run.trainer.place(run._batches()(0))
  state, metrics = run.trainer.step(state, batch)
  assert np.isfinite(metrics["loss"])
  after = leaf(state)
  assert hasattr(after, "codes") == (name != "mezo")
  if name == "qzo":
    np.testing.assert_array_equal(after.codes, first.codes)
    assert np.any(after.scales != first.scales)
  elif name == "q_galore":
    assert np.any(after.codes != first.codes)
  else:
    assert np.any(after != first)
