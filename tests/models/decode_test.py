"""Cached decoding and sampling against the full forward pass."""

from __future__ import annotations

import dataclasses
import functools

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
    ({"temperature": -1.0}, "temperature: got -1.0"),
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
