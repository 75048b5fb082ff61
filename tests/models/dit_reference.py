"""A diffusion transformer in numpy float64, one example at a time."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from models import dit


def velocity(
  params: Any, x: Any, t: float, label: int, context: Any, cfg: dit.Config
) -> np.ndarray:
  """What `dit.apply` gives, token by token in raster order.

  Args:
    params: as `dit.param_specs` describes.
    x: `input_shape`.
    t: share of the noise.
    label: of the class.
    context: like x.
    cfg: the model.
  """
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  silu = lambda a: a / (1 + np.exp(-a))
  places = list(np.ndindex(*cfg.grid))

  def patches(image):
    image = np.asarray(image, np.float64)
    cut = lambda place: image[
      tuple(
        slice(i * n, (i + 1) * n) for i, n in zip(place, cfg.patch, strict=True)
      )
    ]
    return np.stack([cut(place).ravel() for place in places])

  def normed(y, shift, scale):
    y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + cfg.norm_eps)
    return y * (1 + scale) + shift

  def rotated(heads):
    """Complex numbers turned by angles; [S, H, K]."""
    pairs, axes = cfg.key_size // 2, len(cfg.grid)
    z = heads[..., :pairs] + 1j * heads[..., pairs:]
    for s, place in enumerate(places * 2):
      first = 0
      for axis, position in enumerate(place):
        own = (pairs + axis) // axes
        for i in range(own):
          angle = position * cfg.rope_theta ** (-i / own)
          z[s, :, first + i] *= np.exp(1j * angle)
        first += own
    return np.concatenate([z.real, z.imag], -1)

  y = patches(x) @ p["patch_embed"]
  other = patches(context) @ p["patch_embed"] + p["context_embed"]
  y = np.concatenate([y, other])
  angle = 1000 * float(t) * 1e4 ** (-np.arange(128) / 128)
  c = np.concatenate([np.cos(angle), np.sin(angle)])
  c = silu(c @ p["time_in"]) @ p["time_out"] + p["label_embed"][label]
  c = silu(c)
  for i in range(cfg.num_layers):
    own = {name: leaf[i] for name, leaf in p["layers"].items()}
    m = np.split(c @ own["modulation"] + own["modulation_bias"], 6)
    z = normed(y, m[0], m[1])
    heads = (len(y), cfg.num_heads, cfg.key_size)
    q, k, v = ((z @ own[name]).reshape(heads) for name in "qkv")
    q, k = rotated(q), rotated(k)
    scores = np.einsum("thk,shk->hts", q, k) / math.sqrt(cfg.key_size)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    z = np.einsum("hts,shk->thk", weights, v).reshape(y.shape)
    y = y + m[2] * (z @ own["o"])
    z = normed(y, m[3], m[4]) @ own["up"]
    cubic = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    y = y + m[5] * (0.5 * z * (1 + np.tanh(cubic)) @ own["down"])
  shift, scale = np.split(
    c @ p["final_modulation"] + p["final_modulation_bias"], 2
  )
  y = normed(y[: len(places)], shift, scale) @ p["head"]
  out = np.zeros(cfg.input_shape)
  for place, patch in zip(places, y, strict=True):
    where = tuple(
      slice(i * n, (i + 1) * n) for i, n in zip(place, cfg.patch, strict=True)
    )
    out[where] = patch.reshape(*cfg.patch, -1)
  return out
