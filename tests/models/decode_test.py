"""Cached decoding and sampling against the full forward pass."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxlib_ext import quantization
from models import decode, sampling, transformer

pytestmark = pytest.mark.slow

CFG = transformer.Config(
  vocab_size=31,
  d_model=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  d_ff=24,
  init_std=0.3,
)
# Two orders of summation over at most 24 terms, two layers deep.
UNITS = 64 * 2.0**-24


def setup(cfg=CFG):
  params = transformer.init(jax.random.key(0), cfg)
  tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, cfg.vocab_size)
  return params, tokens


class DecodeTest(parameterized.TestCase):
  @parameterized.parameters(
    {}, {"tie_embeddings": True}, {"num_kv_heads": 1}, {"scan_layers": False}
  )
  def test_step_by_step_is_the_full_forward(self, **fields):
    cfg = dataclasses.replace(CFG, **fields)
    params, tokens = setup(cfg)
    want = transformer.apply(params, tokens, cfg=cfg).logits
    step = jax.jit(functools.partial(transformer.decode_step, cfg=cfg))
    cache = transformer.init_cache(cfg, 3, 12)
    for t in range(tokens.shape[1]):
      logits, cache = step(params, cache, tokens[:, t])
      self.assertEqual(logits.dtype, jnp.float32)
      np.testing.assert_allclose(
        logits, want[:, t], rtol=0, atol=UNITS * np.max(np.abs(want))
      )
    self.assertEqual(int(cache.length), 9)

  def test_prefill_in_pieces_is_the_full_forward(self):
    params, tokens = setup()
    want = transformer.apply(params, tokens, cfg=CFG).logits
    cache = transformer.init_cache(CFG, 3, 9)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
      logits, cache = decode.prefill(
        params, cache, tokens[:, start:stop], cfg=CFG
      )
      np.testing.assert_allclose(
        logits, want[:, stop - 1], rtol=0, atol=UNITS * np.max(np.abs(want))
      )

  def test_quantized_leaves(self):
    params, tokens = setup()
    q = quantization.quantize_tree(params, "int4:8")
    plain = quantization.dequantize_tree(q, jnp.float32)
    f = jax.jit(functools.partial(decode.prefill, cfg=CFG))
    cache = transformer.init_cache(CFG, 3, 9)
    np.testing.assert_array_equal(
      f(q, cache, tokens)[0], f(plain, cache, tokens)[0]
    )

  def test_bad_arguments(self):
    params, tokens = setup()
    with self.assertRaisesRegex(ValueError, "max_length: got 0"):
      transformer.init_cache(CFG, 1, 0)
    with self.assertRaisesRegex(ValueError, "length of 9.*max_length=8"):
      cache = transformer.init_cache(CFG, 3, 8)
      decode.prefill(params, cache, tokens, cfg=CFG)

  @parameterized.parameters("full", "window", "gdn", "gdn,full")
  def test_past_the_length(self, mixers):
    cfg = dataclasses.replace(CFG, num_heads=2, mixers=mixers, window=(8,))
    params, tokens = setup(cfg)
    step = functools.partial(transformer.decode_step, cfg=cfg)
    _, cache = decode.prefill(
      params, transformer.init_cache(cfg, 3, 5), tokens[:, :4], cfg=cfg
    )
    bounded = mixers != "gdn"
    for used in (4, 5, 6):  # Traced.
      logits, cache = jax.jit(step)(params, cache, tokens[:, used])
      self.assertEqual(int(cache.length), used + 1)
      past = bounded and used >= 5
      self.assertEqual(bool(jnp.isnan(logits).all()), past)
      self.assertEqual(bool(jnp.isnan(logits).any()), past)
    if bounded:
      allowed = "length of 1; allowed: 1 to max_length=5 less the 7"
      with self.assertRaisesRegex(ValueError, allowed):
        step(params, cache, tokens[:, 7])
    else:
      self.assertTrue(jnp.isfinite(step(params, cache, tokens[:, 7])[0]).all())

  def test_pieces_past_the_length(self):
    params, tokens = setup()
    cache = transformer.init_cache(CFG, 3, 6)
    prefill = functools.partial(decode.prefill, cfg=CFG)
    _, cache = prefill(params, cache, tokens[:, :4])
    with self.assertRaisesRegex(ValueError, "length of 3.*=6 less the 4"):
      prefill(params, cache, tokens[:, 4:7])
    logits, _ = jax.jit(prefill)(params, cache, tokens[:, 4:7])
    self.assertTrue(jnp.isnan(logits).all())
    logits, _ = prefill(params, cache, tokens[:, 4:6])
    self.assertTrue(jnp.isfinite(logits).all())


class SampleTest(parameterized.TestCase):
  def test_greedy_takes_the_likeliest_of_the_full_forward(self):
    params, tokens = setup()
    got = sampling.sample(
      jax.random.key(0), params, tokens, cfg=CFG, steps=5, temperature=0.0
    )
    self.assertEqual(got.shape, (3, 5))
    text = tokens
    for _ in range(5):
      logits = transformer.apply(params, text, cfg=CFG).logits[:, -1]
      text = jnp.concatenate([text, jnp.argmax(logits, -1)[:, None]], axis=1)
    np.testing.assert_array_equal(got, text[:, 9:])

  def test_top_k_of_one_is_greedy(self):
    params, tokens = setup()
    draw = functools.partial(
      sampling.sample, jax.random.key(0), params, tokens, cfg=CFG, steps=4
    )
    np.testing.assert_array_equal(draw(top_k=1), draw(temperature=0.0))
    np.testing.assert_array_equal(draw(top_p=1e-6), draw(temperature=0.0))

  def test_near_zero_is_greedy(self):
    params, tokens = setup()
    draw = functools.partial(
      sampling.sample, jax.random.key(0), params, tokens, cfg=CFG, steps=4
    )
    want = draw(temperature=0)
    for temperature in (1e-30, 1.2e-38, 1e-40, 5e-324, np.float32(1e-45)):
      np.testing.assert_array_equal(draw(temperature=temperature), want)
    np.testing.assert_array_equal(draw(temperature=1e-30, top_p=0.5), want)
    np.testing.assert_array_equal(draw(top_p=1e-300), want)
    # Beyond float32: every token is as likely.
    got = draw(temperature=1e300)
    np.testing.assert_array_equal(got, draw(temperature=1e38))

  def test_prompts(self):
    params, tokens = setup()
    draw = functools.partial(
      sampling.sample, jax.random.key(0), params, cfg=CFG, steps=2
    )
    want = draw(tokens)
    for kind in (np.int64, np.uint8, np.uint64, np.int16):
      np.testing.assert_array_equal(draw(np.asarray(tokens).astype(kind)), want)
    np.testing.assert_array_equal(draw(np.asarray(tokens).tolist()), want)

  @parameterized.parameters(
    ([1, 2], ValueError, r"prompt: got \(2,\); allowed: a shape \[batch"),
    ([[]], ValueError, "both at least 1"),
    (np.zeros((0, 3), int), ValueError, "both at least 1"),
    (3, ValueError, "prompt: got"),
    ("text", TypeError, "prompt must be integers"),
    (None, TypeError, "prompt must be integers"),
    ([["a"]], TypeError, "prompt must be integers"),
    ([[1.0]], TypeError, "prompt must be integers"),
    ([[True]], TypeError, "prompt must be integers"),
    (np.ones((1, 2)), TypeError, "prompt must be integers"),
    ([[1, 2], [3]], TypeError, "prompt must be integers"),
    ([[31]], ValueError, "prompt: got 31; allowed: 0 to 30"),
    ([[-1]], ValueError, "prompt: got -1"),
    # In 32 bits, 5.
    ([[2**32 + 5]], ValueError, "prompt: got 4294967301"),
    (np.array([[2**32 + 5]]), ValueError, "prompt: got 4294967301"),
    ([[2**70]], ValueError, "prompt: got 1180591620717411303424"),
  )
  def test_wrong_prompts(self, prompt, kind, message):
    with self.assertRaisesRegex(kind, message):
      sampling.sample(jax.random.key(0), {}, prompt, cfg=CFG, steps=1)

  def test_first_token_has_the_distribution_of_the_softmax(self):
    params, tokens = setup()
    n = 4000
    got = sampling.sample(
      jax.random.key(5),
      params,
      jnp.broadcast_to(tokens[:1], (n, 9)),
      cfg=CFG,
      steps=1,
      temperature=2.0,
    )
    logits = transformer.apply(params, tokens[:1], cfg=CFG).logits[0, -1]
    want = np.asarray(jax.nn.softmax(logits / 2.0))
    counts = np.bincount(np.asarray(got[:, 0]), minlength=31)
    # Pearson's statistic has mean 30 and standard deviation 7.7.
    statistic = np.sum((counts - n * want) ** 2 / (n * want))
    self.assertLess(statistic, 30 + 5 * 7.7)

  def test_truncation(self):
    logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))
    kept = lambda **kw: np.flatnonzero(
      np.isfinite(sampling.truncate(logits, **kw))
    ).tolist()
    self.assertEqual(kept(), [0, 1, 2, 3])
    self.assertEqual(kept(top_k=2), [1, 2])
    self.assertEqual(kept(top_p=0.39), [1])
    self.assertEqual(kept(top_p=0.45), [1, 2])
    self.assertEqual(kept(top_p=0.75), [1, 2, 3])
    # Of the three kept, renormalized: 4/9, 3/9, 2/9.
    self.assertEqual(kept(top_k=3, top_p=0.7), [1, 2])

  @parameterized.parameters(
    ({"steps": 0}, "steps: got 0"),
    ({"steps": 1.5}, "steps: got 1.5"),
    ({"temperature": -1.0}, "temperature: got -1.0"),
    ({"temperature": math.nan}, "temperature: got nan"),
    ({"temperature": math.inf}, "temperature: got inf"),
    ({"temperature": "hot"}, "temperature: got 'hot'"),
    ({"top_p": math.nan}, "top_p: got nan"),
    ({"top_k": 1.5}, "top_k: got 1.5"),
    ({"top_k": -1}, "top_k: got -1"),
    ({"top_p": 0.0}, "top_p: got 0.0"),
  )
  def test_bad_arguments(self, kwargs, message):
    params, tokens = setup()
    with self.assertRaisesRegex(ValueError, message):
      sampling.sample(
        jax.random.key(0), params, tokens, cfg=CFG, **{"steps": 1, **kwargs}
      )


if __name__ == "__main__":
  absltest.main()
