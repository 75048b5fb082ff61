"""The steps that a forward pass and a decode step share.

`p` holds one layer's parameters, `params` the whole model's. Dimensions: B
batch, T length, V vocabulary, D width, H query heads, G key/value heads, K
head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_ext import meshes
from models import config as config_lib
from models import ids, layers

Config = config_lib.Config
Rotation = tuple[jax.Array, jax.Array]


class Heads(NamedTuple):
  """Queries, keys and values.

  Attributes:
    q: `[B, T, H, K]`.
    k: `[B, T, G, K]`.
    v: `[B, T, G, K]`.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array


def embed(params: Any, tokens: jax.Array, cfg: Config) -> jax.Array:
  """What the first layer reads, [B, T, D] in the compute dtype.

  Raises:
    ValueError: a token that is not in the vocabulary, where it is known.
  """
  ids.check("tokens", tokens, cfg.vocab_size)
  dtype = jnp.dtype(cfg.compute_dtype)
  x = ids.rows(layers.weight(params["embed"], dtype), tokens).astype(dtype)
  if cfg.embed_projection:
    x = layers.matmul(x, layers.weight(params["proj_in"], dtype))
  return x


def final_norm(x: jax.Array, params: Any, cfg: Config) -> jax.Array:
  """What the head reads of the last layer's states [..., D]."""
  x = layers.rms_norm(x, params["final_norm"], cfg.norm_eps)
  if cfg.embed_projection:
    x = layers.matmul(x, layers.weight(params["proj_out"], x.dtype))
  return x


def head(params: Any, dtype: Any, cfg: Config) -> jax.Array:
  """The output head [D, V], of the parameter's own dtype if an array."""
  if cfg.tie_embeddings:
    return layers.weight(params["embed"], dtype).T
  return layers.weight(params["head"], dtype)


def vocab_axes(params: Any, tokens: jax.Array, cfg: Config) -> Any:
  """Returns the explicit mesh axes that divide the logits' last dimension.

  They are those of the head, unless one of them divides the tokens already.
  """
  table = params["embed"] if cfg.tie_embeddings else params["head"]
  if hasattr(table, "dequantize"):
    table = table.codes
  own = meshes.spec(table)[0 if cfg.tie_embeddings else -1]
  taken = {name for entry in meshes.spec(tokens) for name in _names(entry)}
  return None if taken.intersection(_names(own)) else own


def _names(entry):
  """The mesh axes of one entry of a `PartitionSpec`."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def logits(x: jax.Array, params: Any, cfg: Config) -> jax.Array:
  """Float32 logits [..., V] of what `final_norm` gave, [..., D]."""
  w = head(params, x.dtype, cfg).astype(x.dtype)
  return layers.dot(x, w, x.ndim - 1, 0)


def norm(x: jax.Array, p: Any, cfg: Config) -> jax.Array:
  """What a layer's mixer reads of the residual stream, [B, T, D]."""
  return layers.rms_norm(x, p["attn_norm"], cfg.norm_eps)


def project(y: jax.Array, p: Any, cfg: Config) -> Heads:
  """The heads of one layer from normed states [B, T, D], not rotated."""
  shape = (*y.shape[:2], -1, cfg.key_size)
  return Heads(
    *(
      layers.matmul(y, layers.weight(p[n], y.dtype)).reshape(shape)
      for n in "qkv"
    )
  )


def rotate(heads: Heads, rotation: Rotation) -> Heads:
  """Heads with q and k rotated by (cosines, sines) of their positions."""
  rope = lambda x: layers.rope(x, *rotation)
  return heads._replace(q=rope(heads.q), k=rope(heads.k))


def merge_heads(y: jax.Array, p: Any) -> jax.Array:
  """The attention branch's output [B, T, D] from heads [B, T, H, K]."""
  w = layers.weight(p["o"], y.dtype)
  return layers.matmul(y.reshape(*y.shape[:2], -1), w)


def feed_forward(x: jax.Array, p: Any, cfg: Config) -> jax.Array:
  """The normed SwiGLU branch of one layer, [B, T, D] to [B, T, D]."""
  y = layers.rms_norm(x, p["mlp_norm"], cfg.norm_eps)
  gate = layers.matmul(y, layers.weight(p["gate"], x.dtype))
  up = layers.matmul(y, layers.weight(p["up"], x.dtype))
  return layers.matmul(
    layers.swiglu(gate, up), layers.weight(p["down"], x.dtype)
  )
