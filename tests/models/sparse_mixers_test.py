"""Windows and block-sparse attention as the mixers of a model."""

from __future__ import annotations

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxlib_ext import config as config_lib
from models import attention, block, decode, layers, transformer
from tests.common import assert_close, jitted

pytestmark = pytest.mark.slow

CFG = transformer.Config(
  vocab_size=29,
  d_model=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  d_ff=24,
  init_std=0.3,
  mixers=("window", "full", "window"),
  window=(3, 5, 1, 4, 30, 2, 2, 9),
  sink=2,
  block_size=4,
)
LENGTH = 23


def setup(cfg=CFG):
  params = jitted(transformer.init, cfg=cfg)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, cfg.vocab_size)
  return params, tokens


def by_definition(q, k, v, *, cfg, position, segment_ids=None):
  """`attention.mix` of "window" and "full", with every mask written down."""
  row, column = np.indices((q.shape[1],) * 2)
  mask = np.broadcast_to(column <= row, (cfg.num_heads, *row.shape))
  if cfg.pattern[position] == "window":
    window = np.array(cfg.window_at(position))[:, None, None]
    mask = mask & ((row - column < window) | (column < cfg.sink))
  mask = mask[None]
  if segment_ids is not None:
    mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None])
  return attention.attention(q, k, v, mask=mask)


class WindowTest(parameterized.TestCase):
  def test_values_and_gradients_are_those_of_the_mask(self):
    params, tokens = setup()
    loss = lambda p: transformer.loss(
      p, tokens[:, :-1], tokens[:, 1:], cfg=CFG
    )[0]
    got = jitted(jax.value_and_grad(loss))(params)
    with mock.patch.object(attention, "mix", by_definition):
      want = jitted(jax.value_and_grad(lambda p: loss(p)))(params)
    jax.tree.map(functools.partial(assert_close, units=1024), got, want)

  def test_prefill_and_steps_are_the_parallel_form(self):
    params, tokens = setup()
    want = jitted(transformer.apply, cfg=CFG)(params, tokens).logits
    prefill = jitted(decode.prefill, cfg=CFG)
    # Pieces shorter and longer than the ring of 5, and the end of the sinks.
    pieces = (1, 1, 1, 1, 9, 9, 1)
    self.assertEqual(sum(pieces), LENGTH)
    cache, start = transformer.init_cache(CFG, 2, LENGTH), 0
    for piece in pieces:
      logits, cache = prefill(params, cache, tokens[:, start : start + piece])
      start += piece
      assert_close(logits, want[:, start - 1])

  def test_a_text_shorter_than_the_sinks(self):
    cfg = dataclasses.replace(CFG, sink=9, num_layers=1)
    params, tokens = setup(cfg)
    want = jitted(transformer.apply, cfg=cfg)(params, tokens[:, :6]).logits
    cache = transformer.init_cache(cfg, 2, 6)
    prefill = jitted(decode.prefill, cfg=cfg)
    for start in (0, 3):
      logits, cache = prefill(params, cache, tokens[:, start : start + 3])
      assert_close(logits, want[:, start + 2])

  def test_bytes_are_constant_in_length(self):
    cfg = dataclasses.replace(CFG, mixers=("window",), window=(3, 5, 1, 4))
    # Keys and values of 5 + 2 tokens, 2 heads of 4, float32, 3 layers.
    expected = 3 * 2 * (5 + 2) * 2 * 4 * 4
    for length in (7, 1000, 10**6):
      self.assertEqual(decode.cache_bytes(cfg, length), expected)
    self.assertEqual(decode.cache_bytes(cfg, 6), expected * 6 // 7)

  def test_longgen_keeps_everything_in_the_middle_third(self):
    for depth, full in ((3, 1), (4, 1), (12, 4), (32, 11)):
      mixers = transformer.longgen_mixers(depth)
      self.assertLen(mixers, depth)
      first, last = mixers.index("full"), mixers[::-1].index("full")
      self.assertEqual(mixers[first : depth - last], ("full",) * full)
      self.assertLessEqual(abs(first - last), 1)
    cfg = dataclasses.replace(
      CFG, num_layers=4, mixers=transformer.longgen_mixers(4), window=(5,)
    )
    token = 2 * 2 * 4 * 4
    self.assertEqual(decode.cache_bytes(cfg, 1000), (3 * 7 + 1000) * token)
    with self.assertRaisesRegex(ValueError, "num_layers: got 2"):
      transformer.longgen_mixers(2)

  def test_segments(self):
    cfg = dataclasses.replace(
      CFG, num_layers=1, mixers=("window",), window=(3, 5, 1, 4), sink=0
    )
    params, tokens = setup(cfg)
    ids = jnp.repeat(jnp.arange(3), jnp.array([5, 1, 17]))[None]
    ids = jnp.broadcast_to(ids, tokens.shape)
    got = jitted(transformer.apply, cfg=cfg)(params, tokens, segment_ids=ids)
    with mock.patch.object(attention, "mix", by_definition):
      want = jitted(transformer.apply, cfg=cfg)(params, tokens, segment_ids=ids)
    assert_close(got.logits, want.logits)
    sinking = dataclasses.replace(cfg, sink=2)
    with self.assertRaisesRegex(ValueError, "segment_ids: .*sink=2 .*sink=0"):
      transformer.apply(params, tokens, cfg=sinking, segment_ids=ids)

  def test_windows_of_heads_and_positions(self):
    cfg = dataclasses.replace(CFG, window=7)
    self.assertEqual(cfg.window_at(2), (7,) * 4)
    cfg = dataclasses.replace(CFG, window=list(range(1, 9)))
    self.assertEqual(cfg.window_at(0), (1, 2, 3, 4))
    self.assertEqual(cfg.window_at(2), (5, 6, 7, 8))
    # Two positions of one mixer whose windows differ are two.
    both = dataclasses.replace(cfg, mixers=("window", "window"))
    self.assertEqual(both.pattern, ("window", "window"))
    same = dataclasses.replace(both, window=(1, 2, 3, 4))
    self.assertEqual(same.pattern, ("window",))
    values = json.loads(json.dumps(config_lib.to_dict(cfg)))
    self.assertEqual(config_lib.from_dict(transformer.Config, values), cfg)
    got = config_lib.replace(cfg, "window", "1,2,3,4")
    self.assertEqual(got.window, (1, 2, 3, 4))

  @parameterized.parameters(
    ({"window": (0,)}, r"window: got \(0,\); allowed: numbers of at least 1"),
    ({"window": (1, 2)}, r"window: got \(1, 2\); .* \[1, 4, 8\] of them"),
    ({"window": (1.5,)}, r"window: got \(1.5,\)"),
    ({"window": "many"}, "window: got 'many' of type str"),
    ({"sink": -1}, "sink: got -1; allowed: at least 0"),
    ({"density": 0.0}, r"density: got 0.0; allowed: in \(0, 1\]"),
    ({"density": 1.5}, "density: got 1.5"),
    ({"keep": 0.0}, r"keep: got 0.0; allowed: in \(0, 1\]"),
    ({"sharp": -0.1}, r"sharp: got -0.1; allowed: in \[0, 1\]"),
    ({"context": 0}, "context: got 0; allowed: at least 1"),
    ({"block_size": 0}, "block_size: got 0; allowed: at least 1"),
    ({"tail": "median"}, "tail: got 'median'; allowed: one of"),
  )
  def test_bad_configs(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(CFG, **fields)


class ChosenBlocksTest(parameterized.TestCase):
  """The mixers that choose blocks, and what makes each exact."""

  SPARSE = dataclasses.replace(
    CFG, num_layers=2, mixers=("sparse",), window=(6,), density=0.4, tail="mean"
  )
  IN_CONTEXT = dataclasses.replace(
    CFG, num_layers=2, mixers=("in_context",), window=(6,), context=10,
    keep=0.4, sharp=0.5, density=0.4,
  )  # fmt: skip

  @parameterized.parameters(
    (SPARSE, dict(density=1.0)), (IN_CONTEXT, dict(keep=1.0, sharp=1.0))
  )
  def test_everything_exact_is_full_attention(self, own, everything):
    cfg = dataclasses.replace(own, **everything)
    params, tokens = setup(cfg)
    full = dataclasses.replace(cfg, mixers=("full",))
    want = jitted(transformer.apply, cfg=full)(params, tokens).logits
    got = jitted(transformer.apply, cfg=cfg)(params, tokens).logits
    assert_close(got, want)
    # One token at a time it reads everything, whatever it would choose.
    prefill = jitted(decode.prefill, cfg=own)
    cache = transformer.init_cache(own, 2, LENGTH)
    assert_close(prefill(params, cache, tokens)[0], want[:, -1])

  # What "in_context" keeps depends on the whole target.
  @parameterized.parameters((SPARSE, 13), (IN_CONTEXT, 10))
  def test_it_is_causal_and_an_approximation(self, cfg, start):
    params, tokens = setup(cfg)
    run = jitted(transformer.apply, cfg=cfg)
    got = run(params, tokens).logits
    later = tokens.at[:, start:].set((tokens[:, start:] + 7) % 29)
    np.testing.assert_array_equal(
      run(params, later).logits[:, :start], got[:, :start]
    )
    full = dataclasses.replace(cfg, mixers=("full",))
    want = jitted(transformer.apply, cfg=full)(params, tokens).logits
    # The first block is exact; later ones are near and not equal.
    assert_close(got[:, :4], want[:, :4])
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    self.assertBetween(error, 1e-4, 1)

  def test_rows_it_cannot_take(self):
    cfg = self.IN_CONTEXT
    params, tokens = setup(cfg)
    with self.assertRaisesRegex(ValueError, "context: got 10; allowed: less"):
      transformer.apply(params, tokens[:, :10], cfg=cfg)
    with self.assertRaisesRegex(ValueError, "segment_ids: the mixer 'in_cont"):
      transformer.apply(
        params, tokens, cfg=cfg, segment_ids=jnp.zeros_like(tokens)
      )


class QkvTest(parameterized.TestCase):
  def test_heads_of_the_softmax_layers_in_order(self):
    cfg = dataclasses.replace(
      CFG, num_layers=5, mixers=("full", "linear", "window"), window=(6,)
    )
    params, tokens = setup(cfg)
    out = jitted(
      transformer.apply, cfg=cfg, return_qkv=True, return_hidden=True
    )(params, tokens)
    self.assertEqual(out.qkv.q.shape, (3, 2, LENGTH, 4, 4))
    self.assertEqual(out.qkv.v.shape, (3, 2, LENGTH, 2, 4))
    rotation = layers.rope_table(jnp.arange(LENGTH), 4, cfg.rope_theta)
    # Layers 0, 2, 3: positions 0, 2, 0 of the pattern, by hand.
    for n, (layer, stack, row) in enumerate(
      ((0, "0", 0), (2, "2", 0), (3, "0", 1))
    ):

      @jitted
      def by_hand(params, hidden, stack=stack, row=row):
        p = jax.tree.map(lambda x: x[row], params["layers"][stack])
        heads = block.project(block.norm(hidden, p, cfg), p, cfg)
        return block.rotate(heads, rotation)

      got = jax.tree.map(lambda x, n=n: x[n], out.qkv)
      want = by_hand(params, out.hidden[layer])
      jax.tree.map(assert_close, got, want)
    plain = jax.eval_shape(jitted(transformer.apply, cfg=cfg), params, tokens)
    self.assertIsNone(plain.qkv)


class LongTest(parameterized.TestCase):
  def test_long_texts_take_chunks_of_keys(self):
    params, tokens = setup()
    want = jitted(transformer.apply, cfg=CFG)(params, tokens).logits
    with mock.patch.object(attention, "_LONG", LENGTH):
      got = jitted(transformer.apply, cfg=CFG)(params, tokens).logits
    assert_close(got, want)


if __name__ == "__main__":
  absltest.main()
