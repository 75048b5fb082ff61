"""Sharpness along a step, of every mixer: second derivatives of models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim
from models import config, transformer
from tests import quick

_FIELDS = {
  "window": dict(window=(8,), sink=1, block_size=8),
  "sparse": dict(block_size=8),
  "in_context": dict(context=4, block_size=8),
}


@pytest.mark.parametrize(
  "mixer", quick.cases({name: name for name in config.MIXERS}, {"window"})
)
def test_directional_sharpness(mixer):
  """Rows that are no whole blocks; the two orders of derivatives agree."""
  cfg = transformer.Config(
    vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_ff=16,
    mixers=(mixer,), **_FIELDS.get(mixer, {}),
  )  # fmt: skip
  params = transformer.init(jax.random.key(0), cfg)
  tokens = np.random.default_rng(0).integers(0, 32, (1, 26))
  step = jax.tree.map(lambda x: 1e-2 * jnp.cos(x), params)

  def loss(params):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return transformer.loss(params, inputs, targets, cfg=cfg)[0]

  def slope(params):
    pairs = zip(
      *map(jax.tree.leaves, (jax.grad(loss)(params), step)), strict=True
    )
    return sum(jnp.vdot(g, s) for g, s in pairs)

  def both(params):
    found = optim.diagnostics.directional_sharpness(loss, params, step)
    reverse = jax.tree.leaves(jax.grad(slope)(params))
    return found.curvature, [
      jnp.vdot(h, s)
      for h, s in zip(reverse, jax.tree.leaves(step), strict=True)
    ]

  curvature, parts = jax.jit(both)(params)
  size = sum(abs(float(x)) for x in parts)
  # Sums of a few thousand float32 terms that may cancel.
  np.testing.assert_allclose(curvature, sum(parts), rtol=0, atol=1e-4 * size)
