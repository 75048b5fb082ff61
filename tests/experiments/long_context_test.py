"""Variants keep what they say, and a longer context begins with the weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import errors, long_context
from models import config as model_config
from models import decode, stack, transformer
from tests.experiments import runs

pytestmark = pytest.mark.slow

CFG = model_config.Config(
  vocab_size=64, d_model=32, num_layers=6, num_heads=4, d_ff=64
)


@pytest.mark.parametrize("name", ["heads", "window"])
def test_variants_keep_as_many_keys_as_the_hybrid(name):
  length = 1024

  def kept(name):
    fields = long_context.variant(name, CFG, length)
    return decode.cache_bytes(dataclasses.replace(CFG, **fields), length)

  assert kept("full") == 2 * 4 * length * 6 * 32
  # A rolling cache keeps a whole number of tokens in each layer or head.
  assert kept("window") == pytest.approx(kept("hybrid"), rel=0.01)
  fields = long_context.variant("heads", CFG, length)
  (window,) = long_context.variant("window", CFG, length)["window"]
  assert np.mean(fields["window"]) == pytest.approx(window, abs=1)
  assert kept(name) <= kept("full")


def test_regrouped_layers_are_the_same_model():
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)))
  params = transformer.init(jax.random.key(0), CFG)
  want = transformer.apply(params, tokens, cfg=CFG).logits
  # A window of the whole sequence hides nothing.
  new = dataclasses.replace(
    CFG, mixers=("window", "full", "full", "window"), window=(16,)
  )
  layers = stack.regroup(params["layers"], CFG, new)
  got = transformer.apply({**params, "layers": layers}, tokens, cfg=new).logits
  # Two orders of summation of float32, through six layers.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  back = stack.regroup(layers, new, CFG)
  jax.tree.map(np.testing.assert_array_equal, back, params["layers"])
  with pytest.raises(ValueError, match="6 layers for a model of 5"):
    stack.regroup(params["layers"], CFG, dataclasses.replace(CFG, num_layers=5))


def _options(tmp_path, corpus, **changes):
  return dataclasses.replace(
    long_context.Options(
      mixers=("hybrid",),
      workdir=tmp_path,
      record=tmp_path / "record.jsonl",
      config="smoke",
      shared=tuple(
        runs.settings(
          corpus,
          "model.num_layers=3",
          "model.num_heads=2",
          "training.checkpoint_every=0",
          "training.eval_every=0",
          "training.warmup_steps=1",
        )
      ),
      batch_tokens=128,
      short=32,
      long=128,
      short_steps=2,
      long_steps=1,
      theta=2e4,
      seeds=1,
      examples=2,
    ),
    **changes,
  )


def test_a_study_continues_and_is_not_repeated(tmp_path):
  corpus = runs.write_corpus(tmp_path / "corpus")
  options = _options(tmp_path / "runs", corpus)
  options.workdir.mkdir()
  (record,) = long_context.study(options)
  assert list(record["by_position"]) == ["64", "128"]
  assert record["model"]["mixers"] == ["window", "full", "window"]
  mean = np.mean(list(record["by_position"].values()))
  assert record["loss"] == pytest.approx(mean, abs=2e-5)
  before = options.record.read_bytes()
  assert long_context.study(options) == [json.loads(before)]
  assert options.record.read_bytes() == before
  assert "hybrid" in long_context.table([record])
  long_context.plot(options.record.with_suffix(""), [record])
  assert options.record.with_suffix(".svg").stat().st_size > 1000

  # Other weights, and none at all, are refused in one line.
  start = f"training.init_from={options.workdir / 'short_0'}"
  with pytest.raises(errors.UserError, match="has another model: its"):
    runs.run(
      tmp_path / "wide",
      [*options.shared, "training.steps=1", "model.d_ff=96", start],
    )
  with pytest.raises(errors.UserError, match="training.init_from: .* no run"):
    runs.run(
      tmp_path / "none",
      [*options.shared, f"training.init_from={tmp_path / 'nothing'}"],
    )
