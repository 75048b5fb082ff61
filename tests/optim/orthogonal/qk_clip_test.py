"""QK-Clip on weights, and with the statistic of a model's forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import optim
from models import transformer
from tests.common import jitted

CFG = transformer.Config(
  vocab_size=13,
  d_model=8,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  d_ff=8,
  init_std=1.0,
)


def weights(layers=3, d=5, heads=4, groups=2, size=3, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.normal(size=(layers, d, n * size)), dtype)
  return {"layers": {"q": draw(heads), "k": draw(groups), "v": draw(groups)}}


def logits(params, layer, heads, groups):
  """Every product of the layer's queries and keys, by head."""
  rng = np.random.default_rng(1)
  d = params["layers"]["q"].shape[1]
  x, y = rng.normal(size=(2, 7, d))
  q = np.asarray(params["layers"]["q"][layer], np.float64)
  k = np.asarray(params["layers"]["k"][layer], np.float64)
  q = (x @ q).reshape(7, heads, -1)
  k = np.repeat((y @ k).reshape(7, groups, -1), heads // groups, axis=1)
  return np.einsum("thk,shk->hts", q, k)


class WeightsTest(parameterized.TestCase):
  @parameterized.product(groups=[4, 2, 1], split=[None, "query", "group"])
  def test_logits_are_multiplied_by_gamma(self, groups, split):
    params = weights(groups=groups)
    tops = np.array([[50, 100, 200, 400], [1, 2, 3, 4], [-3, 101, 0, 1000]])
    got = optim.apply_qk_clip(params, tops, 100.0, split=split)
    gamma = np.minimum(1, 100 / np.maximum(tops, 1e-9))
    if split == "group":
      gamma = gamma.reshape(3, groups, -1).min(-1).repeat(4 // groups, axis=-1)
    for layer in range(3):
      want = logits(params, layer, 4, groups) * gamma[layer][:, None, None]
      after = logits(got, layer, 4, groups)
      np.testing.assert_allclose(after, want, atol=1e-5)
    # The layer without large logits, and what is not queries or keys.
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(x[1], y[1]), params, got
    )
    np.testing.assert_array_equal(got["layers"]["v"], params["layers"]["v"])

  def test_who_is_scaled(self):
    tops = np.full((3, 4), 400.0)
    scale = lambda a, b, name: float(
      b["layers"][name][0, 0, 0] / a["layers"][name][0, 0, 0]
    )
    for groups, split, q, k in (
      (4, None, 0.5, 0.5),
      (4, "query", 0.25, 1),
      (2, None, 0.25, 1),
      (2, "group", 0.5, 0.5),
    ):
      params = weights(groups=groups)
      got = optim.apply_qk_clip(params, tops, split=split)
      self.assertAlmostEqual(scale(params, got, "q"), q, places=6)
      self.assertAlmostEqual(scale(params, got, "k"), k, places=6)

  def test_other_layouts(self):
    params = weights()
    tops = np.array([[50, 100, 200, 400]] * 3) * np.array([[1], [2], [0]])
    want = optim.apply_qk_clip(params, tops)["layers"]["q"]
    # Heads on an axis of their own, in front of the layers.
    apart = lambda x: jnp.transpose(x.reshape(3, 5, -1, 3), (2, 1, 0, 3))
    given = {"a": [apart(params["layers"][n]) for n in "qk"]}
    got = optim.apply_qk_clip(
      given, tops, query="a/0", key="a/1", query_axes=(2, 0), key_axes=(-2, 0)
    )
    np.testing.assert_array_equal(got["a"][0], apart(want))
    # One layer.
    one = jax.tree.map(lambda x: x[1], params)
    got = optim.apply_qk_clip(one, tops[1])
    np.testing.assert_array_equal(got["layers"]["q"], want[1])

  def test_types_and_what_overflowed(self):
    params = weights(dtype=jnp.bfloat16)
    bad = np.array([[np.inf, np.nan, -np.inf, 99]] * 3)
    got = jax.jit(optim.apply_qk_clip)(params, bad)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    self.assertEqual(got["layers"]["q"].dtype, jnp.bfloat16)

  @parameterized.parameters(
    (dict(query="layers/w"), "query must name.*'layers/w'.*layers/k"),
    (dict(tau=0.0), "tau must be above 0, got 0.0"),
    (dict(split="both"), "split.*'both'"),
    (dict(max_logits=np.ones((2, 4))), r"'layers/q' \[3, 5, 12\]"),
    (dict(max_logits=np.ones((3, 5))), "not 5 query heads"),
    (dict(max_logits=np.ones((1, 3, 4))), r"\[L, H\] or \[H\]"),
    (dict(query_axes=(0, 7)), "axes"),
    (dict(key="layers/q", query="layers/k"), "not 4 query heads"),
  )
  def test_refuses(self, arguments, message):
    arguments = dict(max_logits=np.ones((3, 4))) | arguments
    with self.assertRaisesRegex(ValueError, message):
      optim.apply_qk_clip(weights(), **arguments)


class ModelTest(parameterized.TestCase):
  @parameterized.product(groups=[2, 4], split=[None, "group"])
  def test_the_next_pass_is_below_tau(self, groups, split):
    cfg = dataclasses.replace(CFG, num_kv_heads=groups)
    params = jitted(transformer.init, cfg=cfg)(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(13, size=(2, 9)))
    run = jitted(transformer.apply, cfg=cfg, return_max_logits=True)
    before = run(params, tokens).max_logits
    tau = float(np.median(before))
    clipped = optim.apply_qk_clip(params, before, tau, split=split)
    after = run(clipped, tokens).max_logits
    self.assertEqual(after.shape, (1, 4))
    # To the rounding of the weights and of products of 8 and of 2 terms.
    self.assertLess(after.max(), tau * (1 + 1e-5))
    if split is None:
      np.testing.assert_allclose(after, np.minimum(before, tau), rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
