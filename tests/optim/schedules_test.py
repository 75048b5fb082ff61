"""Schedules of decays, masks of weight decay, fallbacks by label, `ns_steps`.

What optax's own optimizers take, for every factory that the signatures say
takes it.
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from jaxlib_ext import quantization
from optim import arguments
from optim.low_rank import moments
from optim.orthogonal import schedules
from tests import quick
from tests.optim import arguments_test

QUANTIZED = ("eco", "qzo", "scale_by_qzo")
VALUES = ("mezo", "qzo", "scale_by_mezo", "scale_by_qzo")


def normal(seed, *shape):
  sample = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(sample, jnp.float32)


def tree(seed):
  return {
    "embed": {"table": normal(seed, 5, 4)},
    "up": normal(seed + 1, 4, 6),
    "lm_head": normal(seed + 2, 4, 5),
    "scale": normal(seed + 3, 4),
  }


def takes(name, key):
  return key in inspect.signature(getattr(optim, name)).parameters


def scheduled(name):
  """The decays of a factory that may be schedules."""
  return [
    key
    for key in arguments_test.numeric(name)
    if arguments.RULES[key] is arguments.DECAY_RATE
  ]


SCHEDULED = {
  name: (name,)
  for name in arguments_test.NAMES
  if scheduled(name) and name not in QUANTIZED
}


@pytest.mark.parametrize(
  "name",
  quick.cases(
    SCHEDULED,
    {"scale_by_muon", "scale_by_dion", "scale_by_galore", "spam"},
  ),
)
def test_a_schedule_is_its_values_one_after_the_other(name):
  keys = scheduled(name)
  params = {"w": normal(0, 4, 6)}
  if "scale_by" not in name:
    params |= {"lm_head": normal(0, 4, 5), "b": normal(1, 3)}
  # 0 to begin with: the first decay divides nothing.
  value = lambda t, i: jnp.float32(0.5 + 0.1 * i) * (t > 0) + 0.02 * t
  tx = arguments_test.build(
    name, **{k: lambda t, i=i: value(t, i) for i, k in enumerate(keys)}
  )

  @jax.jit
  def both(grads, state, t):
    fixed = arguments_test.build(
      name, **{k: value(t, i) for i, k in enumerate(keys)}
    )
    return [x.update(grads, state, params) for x in (tx, fixed)]

  state = tx.init(params)
  for t in range(3):
    grads = jax.tree.map(lambda x, t=t: x * (0.5 + t), params)
    got, want = both(grads, state, jnp.int32(t))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      if jnp.issubdtype(a.dtype, jnp.floating):
        np.testing.assert_allclose(a, b, rtol=2.0**-18, atol=2.0**-20)
      else:
        np.testing.assert_array_equal(a, b)
    state = got[1]


def test_bias_corrections_of_schedules_are_the_weights_sums():
  steps = 12
  b1 = optax.linear_schedule(0.3, 0.95, steps)
  b2 = optax.cosine_decay_schedule(0.99, steps)
  grads = np.random.default_rng(0).standard_normal((steps, 4, 6))
  weights = moments.no_weights([jnp.zeros((4, 6))])
  held = ([jnp.zeros((4, 6))], [jnp.zeros((4, 6))])
  for t in range(steps):
    weights, decays = moments.weigh(weights, jnp.int32(t), b1=b1, b2=b2)
    g = [jnp.asarray(grads[t], jnp.float32)]
    (got,), held = moments.adam(g, held, weights, decays, eps=1e-8)
    # The averages themselves: each gradient's weight, divided by their sum.
    averages = []
    for schedule, power in ((b1, 1), (b2, 2)):
      rate = [np.float64(schedule(s)) for s in range(t + 1)]
      weight = np.array(
        [(1 - rate[s]) * np.prod(rate[s + 1 :]) for s in range(t + 1)]
      )
      averages.append(
        np.tensordot(weight / weight.sum(), grads[: t + 1] ** power, 1)
      )
    want = averages[0] / (np.sqrt(averages[1]) + 1e-8)
    # A few roundings per step, where nothing cancels.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_scales_vectors_are_adams():
  params = {"b": normal(0, 5)}
  mine = optim.column_normalized_sgd(0.1, vector_b1=0.8, vector_b2=0.95)
  adam = optax.adam(0.1, b1=0.8, b2=0.95)
  state, other = mine.init(params), adam.init(params)
  for t in range(5):
    grads = {"b": normal(t + 1, 5)}
    got, state = mine.update(grads, state, params)
    want, other = adam.update(grads, other, params)
    np.testing.assert_allclose(got["b"], want["b"], rtol=1e-5)


DECAYING = {
  name: (name,)
  for name in arguments_test.NAMES
  if takes(name, "weight_decay_mask") and name not in QUANTIZED
}
MASK = {
  "embed": {"table": False},
  "up": True,
  "lm_head": False,
  "scale": True,
}


def update(tx, grads, params, name):
  extra = {}
  if name in VALUES:
    extra["value_fn"] = lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(p))
  return tx.update(grads, tx.init(params), params, **extra)[0]


@pytest.mark.parametrize(
  "name",
  quick.cases(DECAYING, {"muon", "column_normalized_sgd", "spam", "mezo"}),
)
def test_a_mask_says_what_decays(name):
  params, grads = tree(0), tree(10)

  @jax.jit
  def run(params, grads):
    out = []
    for kwargs in (
      {"weight_decay": 0.0},
      {"weight_decay": 0.5, "weight_decay_mask": MASK},
      {"weight_decay": 0.5, "weight_decay_mask": lambda p: MASK},
      # A prefix.
      {"weight_decay": 0.5, "weight_decay_mask": {**MASK, "embed": False}},
    ):
      tx = arguments_test.build(name, **kwargs)
      out.append(update(tx, grads, params, name))
    return out

  plain, *masked = run(params, grads)
  want = jax.tree.map(
    lambda u, p, m: u - (0.1 * 0.5 * p if m else 0), plain, params, MASK
  )
  for got in masked:
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_mask_of_quantized_parameters():
  params, grads = {**tree(0), "w": normal(9, 8, 8)}, tree(10)
  grads["w"] = normal(11, 8, 8)
  params["up"], params["w"] = (
    quantization.quantize(params[k], "int8") for k in ("up", "w")
  )
  mask = {"embed": False, "up": True, "w": False, "lm_head": True}
  mask["scale"] = False

  # A function sees arrays, and no `QTensor`.
  def by_shape(p):
    return jax.tree.map(lambda x: x.shape in ((4, 6), (4, 5)), p)

  arms = {}
  for key, kwargs in {
    "none": {"weight_decay": 0.0},
    "all": {},
    "tree": {"weight_decay_mask": mask},
    "function": {"weight_decay_mask": by_shape},
  }.items():
    tx = optim.eco(0.1, **{"weight_decay": 0.5, **kwargs})
    state, now = tx.init(params), params
    for _ in range(2):
      updates, state = tx.update(grads, state, now)
      now = optim.apply_updates(now, updates)
    arms[key] = optim.eco_flush(now, state)
  for key in ("tree", "function"):
    for leaf, of in (
      ("up", "all"),
      ("w", "none"),
      ("lm_head", "all"),
      ("scale", "none"),
      ("embed", "none"),
    ):
      pairs = (arms[key][leaf], arms[of][leaf])
      for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_array_equal(a, b)
  assert np.any(arms["all"]["w"].codes != arms["none"]["w"].codes)


def test_a_mask_of_scales():
  params = {k: quantization.quantize(normal(0, 8, 8), "int8") for k in "ab"}
  mask = {"a": True, "b": False}
  tx = optim.qzo(0.1, weight_decay=0.5, weight_decay_mask=mask)
  flat = lambda p: jnp.float32(1.0)
  new, _ = tx.update(params, tx.init(params), params, value_fn=flat)
  for key, share in (("a", 0.95), ("b", 1.0)):
    np.testing.assert_allclose(
      new[key].scales, share * params[key].scales, rtol=1e-6
    )


@pytest.mark.parametrize(
  ("mask", "message"),
  [
    ({"up": True}, "weight_decay_mask: .*embed"),
    ({**MASK, "more": True}, "weight_decay_mask: .*more"),
    ({**MASK, "up": 1.0}, "weight_decay_mask must hold True and False, got 1"),
  ],
)
def test_masks_that_do_not_fit(mask, message):
  for factory in (optim.muon, optim.spam, optim.column_normalized_sgd):
    tx = factory(0.1, weight_decay=0.1, weight_decay_mask=mask)
    with pytest.raises(ValueError, match=message):
      tx.init(tree(0))


def test_a_fallback_for_each_label():
  params, grads = tree(0), tree(10)
  own = optax.adam(0.3, b1=0.8)
  fallback = {"embedding": own, "head": 3e-3}
  default = optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.0)
  head = optax.adamw(3e-3, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.5)
  quantized = {**params, "up": quantization.quantize(params["up"], "int8")}
  for factory, held in ((optim.muon, params), (optim.eco, quantized)):
    got = factory(0.1, weight_decay=0.5, fallback=fallback)
    updates, _ = got.update(grads, got.init(held), held)
    for leaf, tx in (("embed", own), ("lm_head", head), ("scale", default)):
      want, _ = tx.update(grads[leaf], tx.init(params[leaf]), params[leaf])
      for a, b in zip(
        *map(jax.tree.leaves, (updates[leaf], want)), strict=True
      ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_fallback_that_accumulates():
  params, grads = tree(0), tree(10)
  multi = optax.MultiSteps(optax.sgd(0.5), every_k_schedule=2)
  tx = optim.muon(0.1, fallback=multi)
  state = tx.init(params)
  updates, state = tx.update(grads, state, params)
  np.testing.assert_array_equal(updates["scale"], 0)
  updates, state = tx.update(grads, state, params)
  np.testing.assert_allclose(updates["scale"], -0.5 * grads["scale"], rtol=1e-6)


@pytest.mark.parametrize(
  ("fallback", "message"),
  [
    ("adamw", "^fallback must be .*got 'adamw'; or an optax"),
    (-1.0, "^fallback must be at least 0"),
    ({"matrix": 0.1}, "^fallback: got the label 'matrix'"),
    ({"heads": 0.1}, "^fallback: got the label 'heads'"),
    ({"head": "adam"}, r"^fallback\['head'\] must be"),
  ],
)
def test_fallbacks_that_are_none(fallback, message):
  for name in arguments_test.NAMES:
    if takes(name, "fallback"):
      with pytest.raises(ValueError, match=message):
        arguments_test.build(name, fallback=fallback)


WITH_STEPS = {
  name: (name,)
  for name in arguments_test.NAMES
  if takes(name, "ns_steps") and "scale_by" in name
}


@pytest.mark.parametrize(
  "name", quick.cases(WITH_STEPS, {"scale_by_muon", "scale_by_dion2"})
)
def test_ns_steps(name):
  grads = {"w": normal(0, 4, 6)}
  table = np.array([schedules._KELLER] * 2)

  @jax.jit
  def run(grads):
    out = []
    for kwargs in (
      dict(coefficients="keller", ns_steps=2),
      dict(coefficients=table),
      dict(coefficients="keller"),
    ):
      tx = arguments_test.build(name, **kwargs)
      # AdaMuon's first update is of signs alone.
      _, state = tx.update({"w": grads["w"][:, ::-1]}, tx.init(grads))
      out.append(tx.update(grads, state)[0]["w"])
    return out

  got, want, other = run(grads)
  np.testing.assert_allclose(got, want, rtol=2.0**-6, atol=2.0**-8)
  assert np.abs(got - other).max() > 0.01
  with pytest.raises(ValueError, match="^ns_steps=3 does not fit.*5 steps"):
    arguments_test.build(name, coefficients="dion", ns_steps=3)
  with pytest.raises(ValueError, match="^ns_steps=3 does not fit"):
    arguments_test.build(name, coefficients="exact", ns_steps=3)
