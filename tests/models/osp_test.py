"""Single-scale norms, embedding projections, and the measure of outliers."""

from __future__ import annotations

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxlib_ext import labels, quantization, sharding, specs
from models import convert, osp, sampling, transformer
from tests.models import reference
from tests.models.transformer_test import assert_close

OSP = transformer.Config(
  vocab_size=29,
  d_model=24,
  num_layers=2,
  num_heads=4,
  d_ff=40,
  norm_eps=1e-5,
  init_std=0.3,
  norm="single_rms",
  embed_projection=True,
)
HYBRID = dataclasses.replace(
  OSP, num_layers=3, mixers=("gdn", "full"), linear_key_dim=6
)


def setup(cfg):
  """Random parameters, gains around one, and tokens."""
  rng = np.random.default_rng(1)

  def draw(path, spec):
    name = jax.tree_util.keystr(path)
    x = 0.3 * rng.standard_normal(spec.shape)
    return jnp.asarray(x + ("norm" in name), spec.dtype)

  params = jax.tree_util.tree_map_with_path(
    draw, specs.abstract(transformer.param_specs(cfg))
  )
  return params, jnp.asarray(rng.integers(0, cfg.vocab_size, (2, 9)))


def apply(params, tokens, cfg, **kwargs):
  f = functools.partial(transformer.apply, cfg=cfg, **kwargs)
  return jax.jit(f)(params, tokens)


def logits(params, tokens, cfg):
  return apply(params, tokens, cfg).logits


class ToLlamaTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("untied", OSP),
    ("tied", dataclasses.replace(OSP, tie_embeddings=True)),
    ("norm_only", dataclasses.replace(OSP, embed_projection=False)),
    ("projections_only", dataclasses.replace(OSP, norm="rms")),
    ("hybrid", HYBRID),
  )
  def test_is_the_same_function(self, cfg):
    params, tokens = setup(cfg)
    plain_cfg, plain = osp.to_llama(params, cfg)
    self.assertEqual(plain_cfg.norm, "rms")
    self.assertFalse(plain_cfg.embed_projection)
    self.assertEqual(
      jax.tree.map(lambda x: (x.shape, x.dtype), plain),
      jax.tree.map(
        lambda s: (s.shape, s.dtype),
        specs.abstract(transformer.param_specs(plain_cfg)),
      ),
    )
    got = logits(params, tokens, cfg)
    # Two products in another order, beside the chain that assert_close's
    # units are counted for.
    assert_close(logits(plain, tokens, plain_cfg), got, 128)

  def test_is_the_float64_llama(self):
    params, tokens = setup(OSP)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    wide = lambda gain: np.asarray(gain)[..., None] * np.ones(24)
    layer = p["layers"] | {
      n: wide(p["layers"][n]) for n in ("attn_norm", "mlp_norm")
    }
    plain = {
      "embed": p["embed"] @ p["proj_in"],
      "layers": layer,
      "final_norm": wide(p["final_norm"]),
      "head": p["proj_out"] @ p["head"],
    }
    want = reference.logits(plain, tokens, OSP)
    assert_close(logits(params, tokens, OSP), want, 128)

  def test_loss_is_of_these_logits(self):
    params, tokens = setup(OSP)
    loss = jax.jit(functools.partial(transformer.loss, cfg=OSP))
    got, _ = loss(params, tokens[:, :-1], tokens[:, 1:])
    rows = np.asarray(logits(params, tokens, OSP), np.float64)[:, :-1]
    log_z = np.log(np.sum(np.exp(rows), axis=-1))
    picked = np.take_along_axis(rows, np.asarray(tokens)[:, 1:, None], -1)
    assert_close(got, np.mean(log_z - picked[..., 0]), 64)

  def test_quantized_projections(self):
    params, _ = setup(OSP)
    q = jax.jit(lambda p: quantization.quantize_tree(p, "int8"))(params)
    self.assertTrue(hasattr(q["proj_in"], "dequantize"))
    _, got = osp.to_llama(q, OSP)
    _, want = osp.to_llama(quantization.dequantize_tree(q, jnp.float32), OSP)
    for name in ("embed", "head"):
      np.testing.assert_array_equal(got[name], want[name])

  def test_hugging_face_layout_is_for_the_plain_model(self):
    params, _ = setup(OSP)
    with tempfile.TemporaryDirectory() as folder:
      with self.assertRaisesRegex(ValueError, "norm, embed_proj.*to_llama"):
        convert.save_hf(folder, params, OSP)
      cfg, plain = osp.to_llama(params, OSP)
      convert.save_hf(folder, plain, cfg)
      again, loaded = convert.load_hf(folder)
    self.assertEqual(again.norm, "rms")
    jax.tree.map(np.testing.assert_array_equal, loaded, plain)


class ParameterTest(parameterized.TestCase):
  def test_shapes_and_labels(self):
    tree = specs.abstract(transformer.param_specs(OSP))
    self.assertEqual(tree["proj_in"].shape, (24, 24))
    self.assertEqual(tree["proj_out"].shape, (24, 24))
    self.assertEqual(tree["final_norm"].shape, ())
    self.assertEqual(tree["layers"]["attn_norm"].shape, (2,))
    got = labels.label_params(tree)
    self.assertEqual((got["proj_in"], got["proj_out"]), ("matrix", "matrix"))
    self.assertEqual((got["embed"], got["head"]), ("embedding", "head"))
    self.assertEqual(got["final_norm"], "vector")
    self.assertEqual(got["layers"]["mlp_norm"], "vector")

  def test_nothing_is_new_by_default(self):
    plain = dataclasses.replace(OSP, norm="rms", embed_projection=False)
    self.assertEqual(
      set(transformer.param_specs(plain)),
      {"embed", "layers", "final_norm", "head"},
    )

  @parameterized.parameters("float32", "bfloat16")
  def test_projections_start_orthogonal(self, dtype):
    cfg = dataclasses.replace(OSP, param_dtype=dtype)
    tree = transformer.param_specs(cfg)
    tree = {name: tree[name] for name in ("proj_in", "proj_out")}
    params = specs.init(jax.random.key(0), tree)
    for name in tree:
      self.assertEqual(params[name].dtype, dtype)
      q = np.asarray(params[name], np.float64)
      # 24 products of rounded entries, each of about 1 / sqrt(24).
      bound = 8 * float(jnp.finfo(dtype).eps)
      np.testing.assert_allclose(q @ q.T, np.eye(24), atol=bound)
    self.assertFalse(np.array_equal(params["proj_in"], params["proj_out"]))

  def test_shardings(self):
    cfg = dataclasses.replace(OSP, vocab_size=30)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    found = sharding.shardings(transformer.param_specs(cfg), mesh)
    self.assertFalse(found["proj_in"].is_fully_replicated)
    self.assertTrue(found["final_norm"].is_fully_replicated)

  def test_bad_norm(self):
    with self.assertRaisesRegex(ValueError, "norm: got 'layer'.*single_rms"):
      dataclasses.replace(OSP, norm="layer")


class DecodeTest(parameterized.TestCase):
  def test_steps_give_the_logits_of_the_whole(self):
    params, tokens = setup(OSP)
    want = logits(params, tokens, OSP)
    cache = transformer.init_cache(OSP, 2, 9)
    step = jax.jit(functools.partial(transformer.decode_step, cfg=OSP))
    for t in range(9):
      got, cache = step(params, cache, tokens[:, t])
      assert_close(got, want[:, t], 128)

  def test_sampling_takes_the_likeliest_token(self):
    params, tokens = setup(OSP)
    sample = functools.partial(
      sampling.sample, cfg=OSP, steps=2, temperature=0.0
    )
    got = jax.jit(sample)(jax.random.key(0), params, tokens)
    text = jnp.concatenate([tokens, got[:, :1]], axis=1)
    want = np.argmax(logits(params, text, OSP), axis=-1)[:, -2:]
    np.testing.assert_array_equal(got, want)


class ExcessKurtosisTest(parameterized.TestCase):
  def explicit(self, hidden):
    out = np.zeros(hidden.shape[:-3])
    for index in np.ndindex(out.shape):
      values = []
      for x in hidden[index].reshape(-1, hidden.shape[-1]):
        std = np.sqrt(np.sum((x - np.mean(x)) ** 2) / (len(x) - 1))
        values.append(max(np.mean(x**4) / std**4 - 3, 0))
      out[index] = np.mean(values)
    return out

  @parameterized.parameters(1e-15, 1.0, 1e15)
  def test_formula_at_any_scale(self, scale):
    x = np.random.default_rng(0).standard_t(4, (3, 2, 5, 16)) + 0.3
    x = (scale * x).astype(np.float32)
    got = osp.excess_kurtosis(jnp.asarray(x))
    self.assertEqual(got.shape, (3,))
    # Sixteen-term sums of positive numbers, to the fourth power.
    np.testing.assert_allclose(
      got, self.explicit(x.astype(np.float64)), rtol=1e-5
    )

  def test_of_one_feature_and_of_none(self):
    one = np.zeros((1, 1, 64), np.float32)
    one[..., 5] = 7.0
    np.testing.assert_allclose(
      osp.excess_kurtosis(jnp.asarray(one)), self.explicit(one), rtol=1e-5
    )
    self.assertGreater(osp.excess_kurtosis(jnp.asarray(one)), 55)
    self.assertEqual(osp.excess_kurtosis(jnp.zeros((1, 1, 8))), 0)
    self.assertEqual(osp.excess_kurtosis(jnp.ones((1, 1, 8))), np.inf)

  def test_of_a_model(self):
    params, tokens = setup(OSP)
    out = apply(params, tokens, OSP, return_hidden=True)
    table = params["embed"][tokens] @ params["proj_in"]
    assert_close(out.hidden[0], table, 32)
    got = osp.excess_kurtosis(out.hidden)
    np.testing.assert_allclose(
      got, self.explicit(np.asarray(out.hidden, np.float64)), rtol=1e-4
    )

  @parameterized.parameters((3, 4), (2, 3, 1))
  def test_refuses(self, *shape):
    with self.assertRaisesRegex(ValueError, "hidden: got the shape"):
      osp.excess_kurtosis(jnp.zeros(shape))


if __name__ == "__main__":
  absltest.main()
