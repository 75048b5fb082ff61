"""What every factory says to arguments that it cannot take.

The cases come from the signatures: a new factory or argument joins by being
there.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from jaxlib_ext import quantization
from optim import arguments
from tests import quick

NAMES = tuple(
  name
  for name, x in vars(optim).items()
  if inspect.isfunction(x)
  if name.startswith("scale_by_")
  or "learning_rate" in inspect.signature(x).parameters
)
factories = pytest.mark.parametrize("name", NAMES)

NEVER = ("0.1", True, 1j, [0.1], np.ones(2), jnp.ones(2), np.nan, -np.inf)
FLAGS = {"nesterov", "cautious", "center", "relative", "released"}
FLAGS |= {"restart_bias_correction", "train_unquantized"}
# Arguments of several allowed values, or that are checked elsewhere.
OTHERS = {"axis"}


def build(name, **kwargs):
  """The factory's transformation, at a learning rate if it has one."""
  factory = getattr(optim, name)
  if "learning_rate" in inspect.signature(factory).parameters:
    kwargs.setdefault("learning_rate", 0.1)
  return factory(**kwargs)


def numeric(name):
  """Argument → default of the factory's numbers."""
  out = {}
  for key, x in inspect.signature(getattr(optim, name)).parameters.items():
    number = isinstance(x.default, int | float)
    if key in arguments.RULES and not isinstance(
      arguments.RULES[key], arguments.Number
    ):
      continue
    if key in arguments.RULES or (number and key not in FLAGS | OTHERS):
      out[key] = 0.1 if x.default is inspect.Parameter.empty else x.default
  return out


def refuses(name, key, value):
  with pytest.raises(ValueError, match=f"^{key} must"):
    build(name, **{key: value})


@factories
def test_what_is_no_number_or_out_of_range(name):
  for key, default in numeric(name).items():
    rule = arguments.RULES[key]
    annotation = inspect.signature(getattr(optim, name)).parameters[key]
    optional = default is None or "None" in str(annotation.annotation)
    bad = NEVER if optional else (*NEVER, None)
    bad = (*bad, np.bool_(True), jnp.ones((), bool), jnp.ones((), complex))
    if key != "seed":
      bad = (*bad, -1, -0.5, np.float32(-1), np.array(-1), jnp.float32(-1))
    if not rule.infinite:
      bad = (*bad, np.inf, np.float64(np.inf))
    if rule.whole:
      bad = (*bad, 1.5, np.float32(2), jnp.float32(2))
    if rule is arguments.DECAY_RATE:
      bad = (*bad, 1, 1.0, 1.5, np.float32(1), jnp.float32(1))
      bad = (*bad, jnp.bfloat16(0.9), jnp.float16(0.9))
    if not rule.schedule:
      bad = (*bad, optax.constant_schedule(0.5))
    if rule.static:
      bad = (*bad, 0, jnp.float32(0.5), jnp.int32(1))
    for value in bad:
      refuses(name, key, value)


@pytest.mark.parametrize(
  ("key", "good", "bad"),
  [
    # What the table above means by a rule.
    ("learning_rate", (0, 1e-3, 5), (-1e-9,)),
    ("momentum", (0, 0.9, 0.999999), (1.0, 1.5, -0.1)),
    ("eps", (0, 1e-8, 2.0), (-1e-12,)),
    ("growth_limit", (1, 1.01, np.inf, None), (0.99,)),
    ("clip", (1e-3, np.inf, None), (0, -1)),
    ("epsilon", (1e-3,), (0, np.inf)),
    ("rank", (1, 4, 0.25, 1.0, 3.0, np.int64(2)), (0, 1.5, -1, 2**0.5)),
    ("density", (1, 0.01), (0, 1.1)),
    ("num_samples", (1, 7), (0, 1.0)),
    ("update_interval", (1, 200), (0, 1.5)),
    ("reset_every", (0, 200), (-1,)),
    ("seed", (0, -1, 2**31), (0.0, "1")),
    ("nesterov", (True, np.bool_(False)), (1, 0, None, "no")),
  ],
)
def test_a_name_means_one_range_everywhere(key, good, bad):
  holders = [
    name
    for name in NAMES
    if key in inspect.signature(getattr(optim, name)).parameters
  ]
  assert holders
  for name in holders:
    for value in good:
      if value is None and name not in ("apollo", "qzo"):
        continue
      if not (name == "eco" and value == 0 and key == "momentum"):
        build(name, **{key: value})
    for value in bad:
      refuses(name, key, value)


@factories
def test_numpys_numbers_are_pythons(name):
  plain = {k: v for k, v in numeric(name).items() if v is not None}
  kind = lambda v: np.int32 if isinstance(v, int) else np.float64
  build(name, **{k: kind(v)(v) for k, v in plain.items()})
  build(name, **{k: np.array(v) for k, v in plain.items()})
  traceable = {
    k: jnp.asarray(v) for k, v in plain.items() if not arguments.RULES[k].static
  }
  build(name, **traceable)


@pytest.mark.parametrize(
  "name", [n for n in NAMES if n.startswith("scale_by_") and "qzo" not in n]
)
def test_directions_refuse_leaves_that_are_no_floats(name):
  for leaf, kind in (
    (jnp.ones((4, 6), jnp.int32), "int32"),
    (jnp.ones((4, 6), bool), "bool"),
    (jnp.ones((4, 6), jnp.complex64), "complex64"),
    (quantization.quantize(jnp.ones((4, 6)), "int8"), "quantized"),
    (1.0, "1.0 of the type float: pass it through jnp.asarray"),
  ):
    with pytest.raises(ValueError, match=f"'w' is .*{kind}"):
      build(name).init({"w": leaf})


@pytest.mark.parametrize("name", [n for n in NAMES if "scale_by" not in n])
def test_factories_refuse_pythons_floats(name):
  with pytest.raises(ValueError, match="the leaf 'w' is 1.0 of the type float"):
    build(name).init({"w": 1.0})


def static_args(name):
  """What has a number for a default and cannot be traced."""
  return tuple(
    key
    for key, default in numeric(name).items()
    if default is not None and arguments.RULES[key].static
  )


@factories
def test_what_must_be_static_says_so(name):
  given = {"ns_steps": 3, "density": 0.5}
  for key, default in numeric(name).items():
    if not arguments.RULES[key].static:
      continue
    others = set(static_args(name)) - {key}
    inject = optax.inject_hyperparams(getattr(optim, name), others)
    kwargs = {"learning_rate": 0.1} if "learning_rate" in numeric(name) else {}
    if default is None:
      kwargs[key] = given[key]
    with pytest.raises(
      ValueError, match=rf'^{key} must be static.*static_args=\("{key}",\)'
    ):
      inject(**kwargs).init({"w": jnp.ones((4, 6))})


FLOATS = {
  name: (name,)
  for name in NAMES
  if "scale_by" not in name and name not in ("eco", "mezo", "qzo")
}


@pytest.mark.parametrize(
  "name", quick.cases(FLOATS, {"muon", "column_normalized_sgd", "galore"})
)
def test_injected_into_bfloat16(name):
  params = {"w": jnp.ones((4, 6), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
  grads = jax.tree.map(lambda x: 0.3 * x, params)
  inject = functools.partial(
    optax.inject_hyperparams, getattr(optim, name), static_args(name)
  )
  rates = {
    k for k in numeric(name) if arguments.RULES[k] is arguments.DECAY_RATE
  }
  if rates:
    with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
      jax.jit(inject()(learning_rate=0.1).init)(params)
  wide = inject(hyperparam_dtype=jnp.float32)(learning_rate=0.1)

  @jax.jit
  def run(params, grads):
    # One program for both: what the numbers being traced changes is seen.
    out = []
    for tx in (wide, build(name)):
      out.append(tx.update(grads, tx.init(params), params)[0])
    return out

  got, want = run(params, grads)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=2.0**-7, atol=1e-8
    )


def test_numbers_without_a_default_are_injected_too():
  params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
  grads = jax.tree.map(lambda x: 0.3 * x, params)
  for factory, kwargs in (
    (optim.muon, {"fallback": 3e-3}),
    (optim.column_normalized_sgd, {"vector_learning_rate": 3e-3}),
  ):
    tx = optax.inject_hyperparams(factory)(learning_rate=0.1, **kwargs)
    state = tx.init(params)
    assert kwargs.keys() < state.hyperparams.keys()
    updates, _ = jax.jit(tx.update)(grads, state, params)
    np.testing.assert_allclose(updates["b"], -3e-3, rtol=1e-5)


def test_inner_is_a_transformation():
  with pytest.raises(ValueError, match="^inner must be an optax.*got 0.9"):
    optim.eco(0.1, inner=0.9)
  with pytest.raises(ValueError, match="^weight_decay must be at least 0"):
    optim.add_cautious_decay(-0.1)
