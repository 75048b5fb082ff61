"""The Hugging Face layout, against logits that `transformers` computed.

`testdata/hf_llama` is a random model saved by transformers 5.23.0 (torch
2.13.0), with the float32 logits its LlamaForCausalLM gave.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from models import convert, transformer

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parent / "testdata" / "hf_llama"


def copy(directory, **fields):
  """A copy of the golden model with fields of config.json changed."""
  directory = pathlib.Path(directory)
  shutil.copy(GOLDEN / "model.safetensors", directory)
  config = json.loads((GOLDEN / "config.json").read_text())
  config.update(fields)
  (directory / "config.json").write_text(json.dumps(config))
  return directory


class ConvertTest(parameterized.TestCase):
  def folder(self):
    return self.enterContext(tempfile.TemporaryDirectory())

  def test_logits_are_those_of_transformers(self):
    cfg, params = convert.load_hf(GOLDEN)
    self.assertEqual((cfg.num_kv_heads, cfg.rope_theta), (2, 5000.0))
    expected = np.load(GOLDEN / "expected.npz")
    got = transformer.apply(params, expected["tokens"], cfg=cfg).logits
    want = expected["logits"]
    # Two float32 programs, each a chain of about 40 roundings.
    atol = 64 * 2.0**-24 * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)

  @parameterized.parameters(False, True)
  def test_round_trip(self, tied):
    cfg = transformer.Config(
      vocab_size=20,
      d_model=16,
      num_layers=2,
      num_kv_heads=2,
      head_dim=6,
      d_ff=24,
      tie_embeddings=tied,
    )
    params = transformer.init(jax.random.key(0), cfg)
    directory = os.path.join(self.folder(), "new")
    convert.save_hf(directory, params, cfg)
    for path in (directory, os.path.join(directory, "model.safetensors")):
      got_cfg, got = convert.load_hf(path)
      self.assertEqual(got_cfg, cfg)
      jax.tree.map(np.testing.assert_array_equal, got, params)

  def test_bfloat16_round_trip_and_overrides(self):
    cfg = transformer.Config(vocab_size=8, d_model=8, d_ff=8, num_kv_heads=4,
                             head_dim=2, param_dtype="bfloat16")  # fmt: skip
    params = transformer.init(jax.random.key(0), cfg)
    directory = self.folder()
    convert.save_hf(directory, params, cfg)
    got_cfg, got = convert.load_hf(directory, compute_dtype="bfloat16")
    self.assertEqual(got_cfg.compute_dtype, "bfloat16")
    self.assertEqual(got["head"].dtype, jnp.float32)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
      got,
      params,
    )

  def test_shards(self):
    directory = copy(self.folder())
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    os.remove(directory / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in shards.items():
      safetensors.numpy.save_file(
        {n: tensors[n] for n in own}, directory / file
      )
    index = {n: file for file, own in shards.items() for n in own}
    (directory / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": index})
    )
    got, want = convert.load_hf(directory)[1], convert.load_hf(GOLDEN)[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    os.remove(directory / "b.safetensors")
    with self.assertRaisesRegex(FileNotFoundError, "b.safetensors"):
      convert.load_hf(directory)

  @parameterized.parameters(
    ({"model_type": "gpt2"}, "model_type: got 'gpt2'; allowed: 'llama'"),
    ({"attention_bias": True}, "attention_bias: got True"),
    (
      {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
      "rope_scaling: got 'llama3'",
    ),
    (
      {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
      "rope_scaling: got 'linear'",
    ),
    ({"num_hidden_layers": 3}, "missing tensor 'model.layers.2."),
    ({"num_hidden_layers": 1}, "unexpected tensors.*model.layers.1."),
    ({"vocab_size": 97}, r"embed_tokens.*got shape \(96, 32\)"),
  )
  def test_what_is_not_this_model_is_refused(self, fields, message):
    directory = copy(self.folder(), **fields)
    with self.assertRaisesRegex(ValueError, message):
      convert.load_hf(directory)

  def test_the_rotary_base_of_older_configs(self):
    directory = copy(self.folder(), rope_parameters=None, rope_theta=123.0)
    self.assertEqual(convert.load_hf(directory)[0].rope_theta, 123.0)


if __name__ == "__main__":
  absltest.main()
