"""The Hugging Face layout, against logits that `transformers` computed.

`testdata/hf_llama` is a random model saved by transformers 5.23.0 (torch
2.13.0), with the float32 logits its LlamaForCausalLM gave.
"""

from __future__ import annotations

import dataclasses
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
import tokenizers as hf
from absl.testing import absltest, parameterized

from models import convert, transformer

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"
SMALL = transformer.Config(
  vocab_size=20,
  d_model=8,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=4,
  d_ff=8,
)
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
      {"model_type": None, "architectures": ["MistralForCausalLM"]},
      "model_type: got None",
    ),
    ({"architectures": ["LlamaModel"]}, r"architectures: got \['LlamaModel'\]"),
    ({"sliding_window": 4096}, "sliding_window: got 4096; allowed: None"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: got"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
    ({"hidden_size": "32"}, "hidden_size: got '32'; allowed: int"),
    ({"num_hidden_layers": True}, "num_hidden_layers: got True; allowed: int"),
    ({"vocab_size": 96.0}, "vocab_size: got 96.0; allowed: int"),
    ({"rms_norm_eps": []}, r"rms_norm_eps: got \[\]; allowed: int or float"),
    ({"rope_parameters": [1]}, r"rope_scaling: got \[1\]; allowed: an object"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings: got 'no'"),
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

  @parameterized.parameters(
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"architectures": []}, "architectures, model_type: both are missing"),
  )
  def test_configs_without_a_model_type(self, fields, message):
    directory = copy(self.folder(), **fields)
    config = json.loads((directory / "config.json").read_text())
    del config["model_type"]
    (directory / "config.json").write_text(json.dumps(config))
    with self.assertRaisesRegex(ValueError, message):
      convert.load_hf(directory)

  def test_a_tied_config_with_another_head_is_untied(self):
    directory = copy(self.folder(), tie_word_embeddings=True)
    want_cfg, want = convert.load_hf(GOLDEN)
    got_cfg, got = convert.load_hf(directory)
    self.assertEqual(got_cfg, want_cfg)
    self.assertFalse(got_cfg.tie_embeddings)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with self.assertRaisesRegex(ValueError, "'lm_head.weight' is not the emb"):
      convert.load_hf(directory, tie_embeddings=True)

  def test_a_tied_config_with_the_same_head_is_tied(self):
    directory = copy(self.folder(), tie_word_embeddings=True)
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, file)
    cfg, params = convert.load_hf(directory)
    self.assertTrue(cfg.tie_embeddings)
    self.assertNotIn("head", params)

  @parameterized.parameters(
    ({}, FileNotFoundError, "no weights at .*model.safetensors"),
    ({"pytorch_model.bin": "x"}, FileNotFoundError, "_model.bin is a pickle"),
    ({"model.safetensors": "x"}, ValueError, "is no safetensors file: "),
    ({"config.json": "{"}, ValueError, "config.json: not JSON: "),
    ({"config.json": "[" * 99999}, ValueError, "config.json: nested more"),
    ({"config.json": "[]"}, ValueError, r"config.json: got \[\]; allowed"),
    ({INDEX: "[]"}, ValueError, r"index.json: got \[\]"),
    ({INDEX: "{}"}, ValueError, "has no field 'weight_map'"),
    ({INDEX: '{"weight_map": {}}'}, ValueError, "got no files"),
    ({INDEX: '{"weight_map": {"a": 1}}'}, ValueError, "a: got 1"),
    ({INDEX: '{"weight_map": {"a": "../b"}}'}, ValueError, "got '../b'; all"),
    ({INDEX: '{"weight_map": {"a": "/b"}}'}, ValueError, "got '/b'; allowed"),
    ({INDEX: '{"weight_map": {"a": ".."}}'}, ValueError, "got '..'; allowed"),
    ({INDEX: '{"weight_map": {"a": "b"}}'}, FileNotFoundError, "at .*/b"),
  )  # fmt: skip
  def test_damaged_directories(self, files, kind, message):
    directory = copy(self.folder())
    os.remove(directory / "model.safetensors")
    for name, content in files.items():
      (directory / name).write_text(content)
    with self.assertRaisesRegex(kind, message) as e:
      convert.load_hf(directory)
    self.assertNotIn("\n", str(e.exception))

  def test_what_is_no_file(self):
    directory = pathlib.Path(self.folder())
    with self.assertRaisesRegex(FileNotFoundError, "config.json"):
      convert.load_hf(directory)
    os.mkfifo(directory / "config.json")
    with self.assertRaisesRegex(ValueError, "config.json: got a pipe"):
      convert.load_hf(directory)
    with self.assertRaisesRegex(FileNotFoundError, "nowhere' does not"):
      convert.load_hf(directory / "nowhere")

  # With files as below, transformers 5.24.0 gave the ids of our tokenizers for
  # text, logits within 2e-7 of ours, and stopped at id 0.
  @parameterized.parameters(
    ({}, (0, None, None), "<|endoftext|>", None),
    ({"eos": 5, "bos": 0, "max_length": 64}, (5, 0, 64), "%", "<|endoftext|>"),
  )
  def test_files_that_generate_reads(self, options, values, eos, bos):
    directory = pathlib.Path(self.folder())
    own = directory / "run.json"
    own.write_text(json.dumps({
      "version": "1.0",
      "added_tokens": [{"id": 0, "content": "<|endoftext|>"}],
      "model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "%": 5}},
    }))  # fmt: skip
    params = transformer.init(jax.random.key(0), SMALL)
    convert.save_hf(directory, params, SMALL, tokenizer=own, **options)
    read = lambda name: json.loads((directory / name).read_text())
    config, generation = read("config.json"), read("generation_config.json")
    end, begin, length = values
    self.assertEqual(generation, {"eos_token_id": end, "bos_token_id": begin})
    self.assertEqual(config["eos_token_id"], end)
    self.assertEqual(config["bos_token_id"], begin)
    self.assertEqual(config.get("max_position_embeddings"), length)
    self.assertEqual(read("tokenizer.json"), json.loads(own.read_text()))
    tokenizer = read("tokenizer_config.json")
    self.assertEqual(tokenizer["tokenizer_class"], "PreTrainedTokenizerFast")
    self.assertEqual(tokenizer.get("eos_token"), eos)
    self.assertEqual(tokenizer.get("bos_token"), bos)
    self.assertEqual(tokenizer.get("model_max_length"), length)
    self.assertEqual(convert.load_hf(directory)[0], SMALL)

  def test_the_byte_tokenizer_is_written_as_a_vocabulary(self):
    directory = pathlib.Path(self.folder())
    own = directory / "run.json"
    own.write_text('{"model": {"type": "bytes"}}')
    cfg = dataclasses.replace(SMALL, vocab_size=256)
    params = transformer.init(jax.random.key(0), cfg)
    convert.save_hf(directory, params, cfg, tokenizer=own)
    made = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "größe Ā 日本\t\n 'tis 12ab"
    ids = made.encode(text).ids
    self.assertEqual(ids, list(text.encode()))
    self.assertEqual(made.decode(ids), text)
    self.assertEqual(made.token_to_id("<|endoftext|>"), 0)

  @parameterized.parameters(
    ({"eos": 20}, "eos: got 20; allowed: 0 to 19, or None"),
    ({"bos": -1}, "bos: got -1"),
    ({"max_length": 0}, "max_length: got 0; allowed: at least 1"),
    ({"tokenizer": "BYTES"}, "has 256 ids; allowed: at most vocab_size=20"),
    ({"tokenizer": "SMALL", "eos": 7}, "eos: got 7; allowed: an id of the tok"),
    ({"tokenizer": "BAD"}, "BAD is no tokenizer.json"),
  )
  def test_save_refuses(self, options, message):
    directory = pathlib.Path(self.folder())
    (directory / "BYTES").write_text('{"model": {"type": "bytes"}}')
    (directory / "SMALL").write_text('{"model": {"vocab": {"a": 3}}}')
    (directory / "BAD").write_text('{"model": {"vocab": {"a": "b"}}}')
    if "tokenizer" in options:
      options = {**options, "tokenizer": directory / options["tokenizer"]}
    with self.assertRaisesRegex(ValueError, message):
      convert.save_hf(directory / "new", {}, SMALL, **options)


if __name__ == "__main__":
  absltest.main()
