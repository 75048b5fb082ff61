"""Models with linear mixers: patterns, parameters, packing and decoding."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxlib_ext import config as config_lib
from jaxlib_ext import labels, sharding, specs
from models import config, convert, decode, sampling, transformer
from tests.common import assert_close

pytestmark = pytest.mark.slow

LINEAR = config.LINEAR
# Two whole periods and one layer more.
CFG = transformer.Config(
  vocab_size=29,
  d_model=16,
  num_layers=5,
  num_heads=2,
  d_ff=24,
  mixers=("mdn", "full"),
  linear_heads=2,
  linear_key_dim=4,
  linear_value_dim=6,
  init_std=0.3,
)


def setup(cfg, *, length=11, batch=2):
  params = transformer.init(jax.random.key(0), cfg)
  tokens = jax.random.randint(
    jax.random.key(1), (batch, length), 0, cfg.vocab_size
  )
  return params, tokens


def apply(cfg, **kwargs):
  return jax.jit(functools.partial(transformer.apply, cfg=cfg, **kwargs))


class PatternTest(parameterized.TestCase):
  def test_layers_have_the_mixers_of_the_pattern_in_order(self):
    cfg = dataclasses.replace(CFG, num_layers=7, mixers=("gdn",) * 3 + ("kda",))
    self.assertEqual([cfg.layers_at(i) for i in range(4)], [2, 2, 2, 1])
    tree = transformer.param_specs(cfg)["layers"]
    self.assertEqual(sorted(tree), ["0", "1", "2", "3"])
    self.assertEqual(tree["0"]["q"].shape, (2, 16, 8))
    self.assertIn("a", tree["2"])
    self.assertIn("f_up", tree["3"])

  @parameterized.parameters(
    (("full", "full"), 5, ("full",)),
    (("mdn", "mdn", "full"), 2, ("mdn",)),
    (("mdn", "full"), 1, ("mdn",)),
    (("mdn", "full"), 3, ("mdn", "full")),
  )
  def test_one_mixer_is_one_stack(self, mixers, layers, pattern):
    cfg = dataclasses.replace(CFG, mixers=mixers, num_layers=layers)
    self.assertEqual(cfg.pattern, pattern)
    tree = transformer.param_specs(cfg)["layers"]
    self.assertEqual("q" in tree, len(pattern) == 1)

  def test_the_program_may_change_the_function_not(self):
    params, tokens = setup(CFG)
    results = []
    for fields in ({}, {"scan_layers": False}, {"remat": "full"}):
      cfg = dataclasses.replace(CFG, **fields)
      loss = lambda p, cfg=cfg: transformer.loss(
        p, tokens[:, :-1], tokens[:, 1:], cfg=cfg
      )[0]
      results.append(jax.jit(jax.value_and_grad(loss))(params))
    for value, grads in results[1:]:
      assert_close(value, results[0][0], 64)
      jax.tree.map(
        functools.partial(assert_close, units=1024), grads, results[0][1]
      )

  def test_hidden_states_are_in_the_order_of_the_layers(self):
    params, tokens = setup(CFG)
    got = apply(CFG, return_hidden=True)(params, tokens)
    self.assertEqual(got.hidden.shape, (6, 2, 11, 16))
    # The first layers alone, as a model of its own.
    short = dataclasses.replace(CFG, num_layers=3)
    layers = {
      "0": jax.tree.map(lambda x: x[:2], params["layers"]["0"]),
      "1": jax.tree.map(lambda x: x[:1], params["layers"]["1"]),
    }
    want = apply(short, return_hidden=True)(
      {**params, "layers": layers}, tokens
    )
    assert_close(got.hidden[:4], want.hidden, 64)

  def test_packed_sequences_are_separate_runs(self):
    cfg = dataclasses.replace(CFG, mixers=("kda", "full", "mamba2"))
    params, tokens = setup(cfg, length=70, batch=1)
    run = apply(cfg)
    # Ids that go down are still segments.
    ids = jnp.repeat(jnp.array([4, 5, 1]), jnp.array([3, 50, 17]))[None]
    got = run(params, tokens, segment_ids=ids).logits
    for start, stop in ((0, 3), (3, 53), (53, 70)):
      want = run(params, tokens[:, start:stop]).logits
      assert_close(got[:, start:stop], want, 256)

  def test_without_information_the_loss_is_log_vocab(self):
    cfg = dataclasses.replace(
      CFG, num_layers=len(LINEAR), mixers=LINEAR, init_std=0.02
    )
    params, tokens = setup(cfg)
    loss, metrics = jax.jit(functools.partial(transformer.loss, cfg=cfg))(
      params, tokens, (tokens + 1) % 29
    )
    self.assertLess(abs(float(loss) - np.log(29)), 0.1)
    self.assertEqual(float(loss), float(metrics["nll"]))

  def test_divided_over_a_mesh_it_is_the_same_function(self):
    cfg = dataclasses.replace(CFG, vocab_size=30)
    params, tokens = setup(cfg)
    want = apply(cfg)(params, tokens).logits
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    where = sharding.shardings(transformer.param_specs(cfg), mesh)
    self.assertFalse(where["layers"]["0"]["v_conv1d"].is_fully_replicated)
    got = apply(cfg)(jax.device_put(params, where), tokens).logits
    assert_close(got, want, 64)


class DecodeTest(parameterized.TestCase):
  def test_prefill_and_steps_are_the_full_forward(self):
    params, tokens = setup(CFG)
    want = apply(CFG)(params, tokens).logits
    cache = transformer.init_cache(CFG, 2, 11)
    logits, cache = jax.jit(functools.partial(decode.prefill, cfg=CFG))(
      params, cache, tokens[:, :7]
    )
    assert_close(logits, want[:, 6], 64)
    step = jax.jit(functools.partial(transformer.decode_step, cfg=CFG))
    for t in range(7, 11):
      logits, cache = step(params, cache, tokens[:, t])
      assert_close(logits, want[:, t], 64)
    self.assertEqual(int(cache.length), 11)

  def test_the_state_does_not_grow(self):
    cfg = dataclasses.replace(CFG, mixers=("mdn",), num_layers=1)
    small, large = (
      jax.eval_shape(lambda n=n: transformer.init_cache(cfg, 2, n))
      for n in (1, 10**6)
    )
    self.assertEqual(small, large)
    # Past max_length too: greedy continuations of any split agree.
    params, tokens = setup(cfg, length=4)
    got = sampling.sample(
      jax.random.key(0), params, tokens, cfg=cfg, steps=6, temperature=0.0
    )
    text = jnp.concatenate([tokens, got], axis=1)
    logits = apply(cfg)(params, text).logits
    np.testing.assert_array_equal(jnp.argmax(logits, -1)[:, 3:-1], got)


class ParameterTest(parameterized.TestCase):
  def test_labels(self):
    cfg = dataclasses.replace(CFG, num_layers=6, mixers=LINEAR)
    tree = labels.label_params(specs.abstract(transformer.param_specs(cfg)))
    got = {}
    for layer in tree["layers"].values():
      for name, label in layer.items():
        self.assertEqual(got.setdefault(name, label), label, name)
    vectors = {
      *("attn_norm", "mlp_norm", "o_norm", "d_skip", "dt_bias", "f_bias"),
      *("a_log", "factor_log", "d_log"),
      *(f"{name}_conv1d" for name in "qkvxbc"),
    }
    matrices = {
      *"qkvogabmexcz",
      *("dt", "f_down", "f_up", "g_down", "g_up", "gate", "up", "down"),
    }
    self.assertEqual(
      got,
      dict.fromkeys(vectors, "vector") | dict.fromkeys(matrices, "matrix"),
    )

  # 2 V D + D + 21 (2 D H K + 3 D H V + 4 (2 H K + H V) + 4 D H
  #   + 2 H + 2 H + H + H + V + 2 D + 3 D F), by hand.
  @parameterized.parameters(
    ("400M", 2816, 417_537_012), ("1.3B", 5632, 1_462_646_004)
  )
  def test_presets(self, size, d_ff, parameters):
    cfg = transformer.mdn(size)
    self.assertEqual(
      (cfg.d_ff, cfg.num_layers, cfg.mixers), (d_ff, 21, ("mdn",))
    )
    self.assertEqual(specs.count(transformer.param_specs(cfg)), parameters)
    self.assertEqual(transformer.preset(f"mdn-{size}"), cfg)
    hybrid = transformer.mdn(size, mixers="mdn,mdn,mdn,full")
    self.assertEqual([hybrid.layers_at(i) for i in range(4)], [6, 5, 5, 5])
    transformer.param_specs(hybrid)

  def test_unknown_preset(self):
    with self.assertRaisesRegex(ValueError, "size: got '1.4B'.*nearest.*1.3B"):
      transformer.mdn("1.4B")

  @parameterized.parameters(
    ({"mixers": ("mdm",)}, "mixers: got 'mdm'; allowed: names among.*mdn"),
    ({"mixers": ()}, "mixers: got .*at least one"),
    ({"mixers": 3}, "mixers: got 3 of type int; allowed: tuple"),
    ({"linear_heads": -1}, "linear_heads: got -1"),
    ({"linear_key_heads": 3}, "linear_key_heads: got 3.*divisor of the 2"),
    ({"linear_value_dim": -2}, "linear_value_dim: got -2"),
    ({"conv_width": 0}, "conv_width: got 0; allowed: at least 1"),
    ({"min_log_mu": 1.0}, "min_log_mu: got 1.0.*below 0"),
    ({"tau_factor": 0.0}, "tau_factor: got 0.0"),
    ({"output_gate": "relu"}, "output_gate: got 'relu'; .*'own', 'silu'"),
  )
  def test_bad_configs(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(CFG, **fields)

  def test_a_config_is_json_and_text(self):
    values = json.loads(json.dumps(config_lib.to_dict(CFG)))
    self.assertEqual(config_lib.from_dict(transformer.Config, values), CFG)
    self.assertEqual(transformer.Config(**values), CFG)
    for text in ("mdn,full", "('mdn', 'full')", '["mdn", "full"]'):
      got = config_lib.replace(transformer.Config(), "mixers", text)
      self.assertEqual(got.mixers, ("mdn", "full"))
    self.assertEqual(
      dataclasses.replace(CFG, mixers="mdn, full").mixers, CFG.mixers
    )
    self.assertEqual(hash(CFG), hash(dataclasses.replace(CFG)))

  def test_the_hugging_face_layout_has_no_linear_mixers(self):
    with tempfile.TemporaryDirectory() as directory:
      with self.assertRaisesRegex(ValueError, "mixers: got .*'mdn'.*allowed"):
        convert.save_hf(directory, {}, CFG)


if __name__ == "__main__":
  absltest.main()
