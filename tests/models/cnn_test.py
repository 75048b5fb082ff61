"""The convolutional network against numpy float64 loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_ext import labels, specs
from models import cnn

CFG = cnn.Config(
  input_shape=(6, 5, 3), num_classes=4, widths=(4, 6), blocks=2, stem_stride=2
)


def convolved(x, kernel, stride=1):
  """`[H, W, in]`, position by position, zeros around."""
  size = kernel.shape[0]
  out = []
  for axis in range(2):
    side = x.shape[axis]
    count = -(-side // stride)
    # "SAME": the positions' windows are centred, the odd zero comes last.
    total = max((count - 1) * stride + size - side, 0)
    before = total // 2
    out.append((count, (before, total - before)))
  (rows, above), (columns, left) = out
  x = np.pad(x, (above, left, (0, 0)))
  y = np.zeros((rows, columns, kernel.shape[-1]))
  for i, j in np.ndindex(rows, columns):
    window = x[i * stride : i * stride + size, j * stride : j * stride + size]
    y[i, j] = np.einsum("hwc,hwcd->d", window, kernel)
  return y


def reference(params, image, cfg):
  """One image's logits and feature maps, float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  norm = lambda a, gain: (
    a / np.sqrt(np.mean(a**2, -1, keepdims=True) + cfg.norm_eps) * gain
  )
  y = convolved(image, p["pixel_embed"], cfg.stem_stride)
  maps = [y]
  for i in range(len(cfg.widths)):
    stage = p[f"stage{i}"]
    if i:
      y = convolved(y, stage["shrink"], 2)
    for gain, up, down in zip(
      stage["norm"], stage["up"], stage["down"], strict=True
    ):
      z = np.maximum(convolved(norm(y, gain), up), 0)
      y = y + convolved(z, down)
    maps.append(y)
  return norm(y, p["final_norm"]).mean((0, 1)) @ p["head"], maps


def test_against_numpy():
  leaves, tree = jax.tree.flatten(specs.abstract(cnn.param_specs(CFG)))
  rng = np.random.default_rng(0)
  params = tree.unflatten(
    [jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype) for a in leaves]
  )
  x = rng.normal(size=(2, *CFG.input_shape))
  got = jax.jit(
    lambda p, a: cnn.apply(p, a, cfg=CFG, return_hidden=True),
  )(params, jnp.asarray(x, jnp.float32))
  assert [h.shape[1:] for h in got.hidden] == [(3, 3, 4), (3, 3, 4), (2, 2, 6)]
  for i, image in enumerate(x):
    logits, maps = reference(params, image, CFG)
    # Float32 sums of at most 54 terms, through ten convolutions.
    close = dict(rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(got.logits[i], logits, **close)
    for a, b in zip(got.hidden, maps, strict=True):
      np.testing.assert_allclose(a[i], b, **close)


def test_initial_variance_and_labels():
  cfg = cnn.Config(widths=(16, 32))
  params = jax.jit(
    lambda key: cnn.init(key, cfg),
  )(jax.random.key(0))
  up = params["stage1"]["up"]
  assert up.shape == (1, 3, 3, 32, 32)
  # 9,216 normal numbers: their variance is known to about 1.5%.
  assert float(jnp.var(up)) == pytest.approx(2 / (9 * 32), rel=0.06)
  found = labels.label_params(params)
  assert found["pixel_embed"] == "embedding" and found["head"] == "head"
  assert found["stage1"] == dict(
    norm="vector", up="matrix", down="matrix", shrink="matrix"
  )
  assert "shrink" not in found["stage0"]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("widths", ()),
    ("input_shape", (8, 8)),
    ("blocks", 0),
    ("norm_eps", 0.0),
  ],
)
def test_bad_config(field, value):
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(CFG, **{field: value})


def test_bad_input():
  params = specs.abstract(cnn.param_specs(CFG))
  with pytest.raises(ValueError, match="x: got shape"):
    cnn.apply(params, jnp.zeros((1, 5, 6, 3)), cfg=CFG)
