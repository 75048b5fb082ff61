"""The statistic of QK-Clip against every score written down."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from models import attention, transformer
from tests.common import jitted

CFG = transformer.Config(
  vocab_size=13,
  d_model=8,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  d_ff=8,
  init_std=1.0,
)


def explicit(qkv, cfg, segments=None):
  """The maxima [N, H], in float64."""
  q = np.asarray(qkv.q, np.float64)
  k = np.repeat(np.asarray(qkv.k, np.float64), q.shape[3] // 2, axis=3)
  scores = np.einsum("lbthk,lbshk->lbhts", q, k) / np.sqrt(q.shape[-1])
  row, column = np.indices(scores.shape[-2:])
  mask = np.broadcast_to(column <= row, scores.shape).copy()
  for layer, mixer in enumerate(cfg.mixers * cfg.num_layers):
    if mixer == "window" and layer < len(mask):
      window = np.array(cfg.window_at(layer))[:, None, None]
      mask[layer] &= (row - column < window) | (column < cfg.sink)
  if segments is not None:
    mask &= (segments[:, :, None] == segments[:, None])[None, :, None]
  return np.where(mask, scores, -np.inf).max((1, 3, 4))


class MaxLogitsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("full", {}, False),
    ("segments", {"scan_layers": False, "num_layers": 2}, True),
    ("blocks_of_queries", {"num_layers": 1}, False),
    (
      "windows",
      {
        "mixers": ("window", "full", "window"),
        "window": (3, 5, 1, 4, 30, 2, 2, 9),
        "sink": 2,
        "block_size": 4,
      },
      False,
    ),
  )
  def test_is_the_largest_score_that_counts(self, fields, with_segments):
    cfg = dataclasses.replace(CFG, **fields)
    params = jitted(transformer.init, cfg=cfg)(jax.random.key(0))
    rng = np.random.default_rng(0)
    length = 131 if fields == {"num_layers": 1} else 11
    tokens = jnp.asarray(rng.integers(13, size=(2, length)))
    segments = np.sort(rng.integers(3, size=tokens.shape))
    segments = segments if with_segments else None
    out = jitted(
      transformer.apply, cfg=cfg, return_max_logits=True, return_qkv=True
    )(params, tokens, segment_ids=segments)
    self.assertEqual(out.max_logits.dtype, jnp.float32)
    want = explicit(out.qkv, cfg, segments)
    # Products of two terms; their sum may be smaller than they are.
    np.testing.assert_allclose(out.max_logits, want, rtol=1e-5, atol=1e-5)
    if with_segments:
      self.assertTrue(np.any(want != explicit(out.qkv, cfg)))

  def test_layers_of_linear_attention_are_left_out(self):
    cfg = dataclasses.replace(
      CFG, mixers=("linear", "full"), num_layers=2, num_kv_heads=4
    )
    params = jitted(transformer.init, cfg=cfg)(jax.random.key(0))
    shapes = jax.eval_shape(
      functools.partial(transformer.apply, cfg=cfg, return_max_logits=True),
      params,
      jnp.zeros((1, 5), int),
    )
    self.assertEqual(shapes.max_logits.shape, (1, 4))

  def test_the_loss_gives_it_as_a_metric_without_a_gradient(self):
    cfg = dataclasses.replace(CFG, remat="full", num_layers=2)
    params = jitted(transformer.init, cfg=cfg)(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(13, size=(2, 9)))

    def loss(params, asked):
      total, metrics = transformer.loss(
        params, tokens, tokens, cfg=cfg, return_max_logits=asked
      )
      return total + jnp.sum(metrics.get("max_logits", 0.0)), metrics

    step = functools.partial(jitted, jax.grad(loss, has_aux=True))
    got, metrics = step(asked=True)(params)
    want, plain = step(asked=False)(params)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
      got,
      want,
    )
    self.assertEqual(metrics["max_logits"].shape, (2, 4))
    self.assertNotIn("max_logits", plain)

  def test_memory_is_that_of_a_block_of_queries(self):
    length = 8192
    shape = jax.ShapeDtypeStruct((1, length, 1, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(
      functools.partial(attention.max_logits, cfg=CFG, position=0)
    )(shape, shape)
    largest = max(
      np.prod(v.aval.shape) for e in jaxpr.jaxpr.eqns for v in e.outvars
    )
    self.assertLessEqual(largest, 512 * length)


if __name__ == "__main__":
  absltest.main()
