"""The transformer against a float64 reference and against itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxlib_ext import labels, quantization, specs
from models import transformer
from tests.common import assert_close
from tests.models import reference

SMALL = transformer.Config(
  vocab_size=29,
  d_model=24,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  d_ff=40,
  rope_theta=100.0,
  norm_eps=1e-5,
  init_std=0.3,
)


def setup(cfg, *, length=11, batch=2):
  """Parameters with gains away from one, and random tokens."""
  params = transformer.init(jax.random.key(0), cfg)
  keys = iter(jax.random.split(jax.random.key(1), 4))
  params["final_norm"] += 0.3 * jax.random.normal(next(keys), (cfg.d_model,))
  for name in ("attn_norm", "mlp_norm"):
    gain = params["layers"][name]
    params["layers"][name] = gain + 0.3 * jax.random.normal(
      next(keys), gain.shape
    )
  tokens = jax.random.randint(next(keys), (batch, length), 0, cfg.vocab_size)
  return params, tokens


def grads(cfg, params, tokens, **kwargs):
  """Value and gradients of the loss at the next tokens."""
  f = lambda p: transformer.loss(
    p, tokens[:, :-1], tokens[:, 1:], cfg=cfg, **kwargs
  )[0]
  return jax.jit(jax.value_and_grad(f))(params)


class ReferenceTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("grouped", {}),
    ("one_group", {"num_kv_heads": 1}),
    ("ungrouped", {"num_kv_heads": 0}),
    ("head_dim", {"head_dim": 10}),
    ("tied", {"tie_embeddings": True}),
    ("unrolled", {"scan_layers": False}),
  )
  def test_logits_are_the_float64_ones(self, fields):
    cfg = dataclasses.replace(SMALL, **fields)
    params, tokens = setup(cfg)
    got = transformer.apply(params, tokens, cfg=cfg).logits
    self.assertEqual(got.dtype, jnp.float32)
    assert_close(got, reference.logits(params, tokens, cfg), 64)

  def test_lengths_that_fill_no_block_of_queries(self):
    cfg = dataclasses.replace(SMALL, num_layers=1)
    params, tokens = setup(cfg, length=131, batch=1)
    got = transformer.apply(params, tokens, cfg=cfg).logits
    assert_close(got, reference.logits(params, tokens, cfg), 64)

  def test_segments_do_not_see_each_other(self):
    params, tokens = setup(SMALL)
    segments = jnp.array([[0] * 4 + [1] * 7, [3] * 9 + [2] * 2])
    got = transformer.apply(params, tokens, cfg=SMALL, segment_ids=segments)
    want = reference.logits(params, tokens, SMALL, segments)
    assert_close(got.logits, want, 64)
    alone = transformer.apply(params, tokens[:1, 4:], cfg=SMALL)
    # Rotary angles are relative, so a segment does not know where it starts.
    assert_close(got.logits[:1, 4:], alone.logits, 64)

  def test_loss_weights_and_z_loss(self):
    cfg = dataclasses.replace(SMALL, z_loss=0.1)
    params, tokens = setup(cfg)
    weights = jax.random.uniform(jax.random.key(9), (2, 10)).at[0, 3].set(0)
    loss, metrics = transformer.loss(
      params, tokens[:, :-1], tokens[:, 1:], cfg=cfg, weights=weights
    )
    nll, z_loss = reference.loss(
      params, tokens[:, :-1], tokens[:, 1:], cfg, np.asarray(weights)
    )
    assert_close(metrics["nll"], nll, 64)
    assert_close(metrics["z_loss"], z_loss, 64)
    assert_close(loss, nll + z_loss, 64)
    self.assertEqual(loss.dtype, jnp.float32)

  def test_gradient_is_the_slope_of_the_float64_loss(self):
    cfg = dataclasses.replace(
      SMALL, num_layers=2, z_loss=0.05, tie_embeddings=True
    )
    params, tokens = setup(cfg, length=7)
    _, g = grads(cfg, params, tokens)
    p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), p64)

    def loss(step):
      moved = jax.tree.map(lambda p, d: p + step * d, p64, direction)
      return sum(reference.loss(moved, tokens[:, :-1], tokens[:, 1:], cfg))

    # Central differences in float64: the truncation error is of order h^2.
    h = 1e-5
    want = (loss(h) - loss(-h)) / (2 * h)
    got = sum(
      np.sum(np.asarray(a, np.float64) * b)
      for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(direction),
                      strict=True)
    )  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=1e-5)


class PropertyTest(parameterized.TestCase):
  def test_no_gradient_reaches_later_tokens(self):
    params, tokens = setup(SMALL, length=70)
    table = params["embed"][tokens]

    # A token's own row of the embedding, told apart by making rows positions.
    def logits(rows):
      own = {**params, "embed": rows.reshape(-1, SMALL.d_model)}
      ids = jnp.arange(rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])
      return transformer.apply(own, ids, cfg=SMALL).logits

    slope = jax.jit(
      jax.grad(lambda rows, t: jnp.sum(jnp.sin(logits(rows)[0, t])))
    )
    for position in (0, 3, 64, 69):
      g = np.asarray(slope(table, position))
      np.testing.assert_array_equal(g[0, position + 1 :], 0.0)
      np.testing.assert_array_equal(g[1], 0.0)
      self.assertTrue(np.all(np.any(g[0, : position + 1] != 0, axis=-1)))

  @parameterized.named_parameters(
    ("unrolled", {"scan_layers": False}),
    ("remat_full", {"remat": "full"}),
    ("remat_dots", {"remat": "dots"}),
    ("unrolled_remat", {"scan_layers": False, "remat": "full"}),
  )
  def test_the_program_may_change_the_function_not(self, fields):
    params, tokens = setup(SMALL)
    want_loss, want = grads(SMALL, params, tokens)
    got_loss, got = grads(dataclasses.replace(SMALL, **fields), params, tokens)
    assert_close(got_loss, want_loss, 64)
    jax.tree.map(functools.partial(assert_close, units=256), got, want)

  def test_grouped_heads_are_repeated_heads(self):
    params, tokens = setup(SMALL)
    full = dataclasses.replace(SMALL, num_kv_heads=0)
    wide = dict(params["layers"])
    for name in ("k", "v"):
      w = wide[name].reshape(3, 24, 2, 6)
      wide[name] = jnp.repeat(w, 2, axis=2).reshape(3, 24, 24)
    assert_close(
      transformer.apply(params, tokens, cfg=SMALL).logits,
      transformer.apply({**params, "layers": wide}, tokens, cfg=full).logits,
      64,
    )

  @parameterized.parameters(False, True)
  def test_without_information_the_loss_is_log_vocab(self, tied):
    cfg = dataclasses.replace(SMALL, tie_embeddings=tied)
    params, tokens = setup(cfg)
    params["embed" if tied else "head"] *= 0.0
    loss, _ = transformer.loss(params, tokens, tokens, cfg=cfg)
    # The mean is a sum of 22 terms, each rounded.
    assert_close(loss, np.log(29), 22)
    # A fresh model's logits have a small variance s: log V + s / 2 on average.
    fresh = dataclasses.replace(cfg, init_std=0.02)
    params = transformer.init(jax.random.key(3), fresh)
    loss, _ = transformer.loss(params, tokens, (tokens + 1) % 29, cfg=fresh)
    self.assertLess(abs(float(loss) - np.log(29)), 0.1)

  def test_hidden_states_are_those_the_logits_come_from(self):
    params, tokens = setup(SMALL)
    out = transformer.apply(params, tokens, cfg=SMALL, return_hidden=True)
    self.assertEqual(out.hidden.shape, (4, 2, 11, 24))
    np.testing.assert_array_equal(out.hidden[0], params["embed"][tokens])
    x = np.asarray(out.hidden[-1], np.float64)
    x /= np.sqrt(np.mean(x * x, -1, keepdims=True) + SMALL.norm_eps)
    x = (x * params["final_norm"]) @ np.asarray(params["head"], np.float64)
    assert_close(out.logits, x, 32)
    self.assertIsNone(transformer.apply(params, tokens, cfg=SMALL).hidden)

  @parameterized.parameters(True, False)
  def test_bfloat16_is_float32_to_its_rounding(self, scan):
    params, tokens = setup(SMALL, length=65, batch=1)
    cfg = dataclasses.replace(SMALL, compute_dtype="bfloat16", scan_layers=scan)
    want_loss, want = grads(SMALL, params, tokens)
    got_loss, got = grads(cfg, params, tokens)
    self.assertEqual(got_loss.dtype, jnp.float32)
    assert_close(got_loss, want_loss, 16, eps=2.0**-8)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      self.assertEqual(a.dtype, jnp.float32)
      assert_close(a, b, 64, eps=2.0**-8)
      cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
      self.assertGreater(cosine, 0.99)

  def test_curvature_by_forward_over_reverse(self):
    params, tokens = setup(SMALL, length=7)
    rng = np.random.default_rng(2)
    v = jax.tree.map(
      lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
    )
    f = jax.grad(
      lambda p: transformer.loss(p, tokens[:, :-1], tokens[:, 1:], cfg=SMALL)[0]
    )
    dot = lambda a, b: sum(
      np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64))
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    got = dot(v, jax.jit(lambda p: jax.jvp(f, (p,), (v,))[1])(params))
    p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def loss(step):
      moved = jax.tree.map(lambda p, d: p + step * np.asarray(d), p64, v)
      return reference.loss(moved, tokens[:, :-1], tokens[:, 1:], SMALL)[0]

    # Second differences in float64: truncation relative to the fourth
    # derivative, h^2, and rounding, 1e-16 / h^2, are both below 1e-5 here.
    h = 1e-5
    want = (loss(h) - 2 * loss(0.0) + loss(-h)) / h**2
    np.testing.assert_allclose(got, want, rtol=1e-4)


class ParameterTest(parameterized.TestCase):
  def test_labels(self):
    tree = labels.label_params(specs.abstract(transformer.param_specs(SMALL)))
    layer = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "matrix")
    layer |= dict.fromkeys(("attn_norm", "mlp_norm"), "vector")
    want = {
      "embed": "embedding",
      "layers": layer,
      "final_norm": "vector",
      "head": "head",
    }
    self.assertEqual(tree, want)

  # V D (twice untied) + L (4 D^2 + 3 D F + 2 D) + D, by hand.
  @parameterized.parameters(
    ("9M", 8_995_968),
    ("60M", 58_073_600),
    ("130M", 134_105_856),
    ("350M", 367_969_280),
    ("1B", 1_339_082_752),
    ("7B", 6_738_415_616),
  )
  def test_presets(self, size, parameters):
    cfg = transformer.llama(size)
    self.assertEqual(specs.count(transformer.param_specs(cfg)), parameters)
    self.assertEqual(cfg.vocab_size, 32000)
    self.assertFalse(cfg.tie_embeddings)
    self.assertEqual(transformer.llama(size, vocab_size=256).vocab_size, 256)

  def test_unknown_preset(self):
    with self.assertRaisesRegex(ValueError, "size: got '61M'.*nearest.*60M"):
      transformer.llama("61M")

  @parameterized.parameters(
    ({"d_model": 0}, "d_model: got 0; allowed: at least 1"),
    ({"num_layers": -1}, "num_layers: got -1"),
    ({"num_kv_heads": 3}, "num_kv_heads: got 3.*divisor of num_heads=4"),
    ({"head_dim": 5}, "head_dim: got 5.*even"),
    ({"d_model": 30}, "d_model: got 30.*multiple of"),
    ({"remat": "some"}, "remat: got 'some'.*none"),
    ({"compute_dtype": "float16"}, "compute_dtype: got 'float16'.*bfloat16"),
    ({"z_loss": -1.0}, "z_loss: got -1.0"),
    ({"norm_eps": 0.0}, "norm_eps: got 0.0"),
    ({"vocab_size": 2.5}, "vocab_size: got 2.5 of type float; allowed: int"),
    ({"tie_embeddings": 1}, "tie_embeddings: got 1 of type int"),
    ({"rope_theta": float("nan")}, "rope_theta: got nan"),
  )
  def test_bad_configs(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(SMALL, **fields)

  @parameterized.parameters(
    ("int4:8", {}),
    ("float8_e4m3fn", {"scan_layers": False, "compute_dtype": "bfloat16"}),
  )
  def test_quantized_leaves_are_their_dequantized_values(self, fmt, fields):
    cfg = dataclasses.replace(SMALL, **fields)
    params, tokens = setup(cfg)
    q = quantization.quantize_tree(params, fmt)
    plain = quantization.dequantize_tree(q, jnp.float32)
    apply = jax.jit(functools.partial(transformer.apply, cfg=cfg))
    np.testing.assert_array_equal(
      apply(q, tokens).logits, apply(plain, tokens).logits
    )


if __name__ == "__main__":
  absltest.main()
