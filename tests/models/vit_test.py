"""The vision transformer against numpy float64, and what optimizers see."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_ext import labels, specs
from models import vit

CFG = vit.Config(
  input_shape=(8, 12, 3),
  patch=(2, 3),
  d_model=16,
  num_layers=2,
  num_heads=2,
  mlp_ratio=1.5,
  num_classes=3,
)


def reference(params, image, cfg):
  """One image's logits and residual streams, in raster order, float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  h, w = cfg.patch
  places = list(np.ndindex(*cfg.grid))
  y = np.stack(
    [image[i * h : i * h + h, j * w : j * w + w].ravel() for i, j in places]
  )
  y = y @ p["patch_embed"]
  norm = lambda a, gain: (
    a / np.sqrt(np.mean(a**2, -1, keepdims=True) + cfg.norm_eps) * gain
  )
  size, pairs = cfg.key_size, cfg.key_size // 2
  # Half of the pairs turn with the row, half with the column.
  own = pairs // 2
  rates = cfg.rope_theta ** (-np.arange(own) / own)
  angle = np.stack([np.concatenate([i * rates, j * rates]) for i, j in places])

  def rotated(a):
    z = (a[:, :pairs] + 1j * a[:, pairs:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)

  states = [y]
  for n in range(cfg.num_layers):
    own = {name: leaf[n] for name, leaf in p["layers"].items()}
    z = norm(y, own["attn_norm"])
    heads = []
    for head in range(cfg.num_heads):
      part = slice(head * size, (head + 1) * size)
      q, k, v = ((z @ own[name])[:, part] for name in "qkv")
      scores = np.exp(rotated(q) @ rotated(k).T / math.sqrt(size))
      heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    y = y + np.concatenate(heads, -1) @ own["o"]
    z = norm(y, own["mlp_norm"])
    gate = z @ own["gate"]
    y = y + (gate / (1 + np.exp(-gate)) * (z @ own["up"])) @ own["down"]
    states.append(y)
  return norm(y, p["final_norm"]).mean(0) @ p["head"], np.stack(states)


def test_against_numpy():
  """Also the gains away from one; in tiles the states are permuted."""
  leaves, tree = jax.tree.flatten(specs.abstract(vit.param_specs(CFG)))
  rng = np.random.default_rng(0)
  params = tree.unflatten(
    [jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype) for a in leaves]
  )
  x = rng.normal(size=(2, *CFG.input_shape))
  pixels = jnp.asarray(x, jnp.float32)
  apply = lambda cfg: jax.jit(
    lambda p, a: vit.apply(p, a, cfg=cfg, return_hidden=True)
  )(params, pixels)
  got = apply(CFG)
  tiled = apply(dataclasses.replace(CFG, tile=(2, 2), scan_layers=False))
  assert got.logits.dtype == jnp.float32 and got.hidden.shape == (3, 2, 16, 16)
  for i, image in enumerate(x):
    logits, states = reference(params, image, CFG)
    # Float32 sums of at most 24 terms, through two layers.
    close = dict(rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got.logits[i], logits, **close)
    np.testing.assert_allclose(got.hidden[:, i], states, **close)
    np.testing.assert_allclose(tiled.logits[i], logits, **close)


def test_sizes_and_labels():
  params = specs.abstract(vit.param_specs(CFG))
  assert params["layers"]["gate"].shape == (2, 16, 24)
  found = labels.label_params(params)
  assert found["patch_embed"] == "embedding" and found["head"] == "head"
  kinds = found["layers"]
  assert {n for n, kind in kinds.items() if kind == "vector"} == {
    "attn_norm",
    "mlp_norm",
  }
  assert kinds["down"] == "matrix"


def test_bad_input():
  params = specs.abstract(vit.param_specs(CFG))
  with pytest.raises(ValueError, match="x: got shape .*8, 12, 3"):
    vit.apply(params, jnp.zeros((1, 12, 8, 3)), cfg=CFG)
  for field, value in (("num_classes", 0), ("context", True)):
    cfg = dataclasses.replace(CFG, **{field: value})
    with pytest.raises(ValueError, match=field):
      vit.param_specs(cfg)
