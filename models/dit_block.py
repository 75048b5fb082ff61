"""One layer of a diffusion transformer: modulation, positions, attention.

Dimensions: B batch, T tokens of one image or video, S of the sequence, D
width, H heads, K head size. `p` holds one layer's parameters.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

import kernels_pallas
from jaxlib_ext import meshes
from kernels_pallas.sparse import dense, tiling
from models import dit_config, layers

Config = dit_config.Config


def rotation(cfg: Config, images: int) -> list[jax.Array]:
  """Cosines and sines [images T, K / 2] of the axes' angles side by side.

  Every axis has as many pairs of channels as the others; the last axes have
  those that are left over.
  """
  axes = len(cfg.grid)
  places = jnp.indices(cfg.grid).reshape(axes, -1)
  if cfg.tile:
    places = tiling.tile(places, cfg.grid, cfg.tile)
  pairs = cfg.key_size // 2
  tables = [
    layers.rope_table(place, 2 * ((pairs + axis) // axes), cfg.rope_theta)
    for axis, place in enumerate(places)
  ]
  return [
    jnp.tile(jnp.concatenate(parts, axis=-1), (images, 1))
    for parts in zip(*tables, strict=True)
  ]


def layer(
  attention: str,
  y: jax.Array,
  p: Any,
  condition: jax.Array,
  rotation: list[jax.Array],
  cfg: Config,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  """One layer `[B, S, D]` to `[B, S, D]`, and its q, k and v.

  Args:
    attention: a name of `dit_config.ATTENTION`.
    y: the residual stream.
    p: the parameters.
    condition: `[B, D]`, of the modulations.
    rotation: of the positions, from `rotation`.
    cfg: the model.
  """
  shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulations(
    condition, p["modulation"], p["modulation_bias"], 6
  )
  with jax.named_scope("attention"):
    z = norm(y, shift, scale, cfg)
    heads = (*z.shape[:2], cfg.num_heads, cfg.key_size)
    q, k, v = (layers.matmul(z, p[name]).reshape(heads) for name in "qkv")
    q, k = (layers.rope(a, *rotation) for a in (q, k))
    share = None
    if cfg.coarse_residual and attention == "in_context":
      share = layers.matmul(z, p["coarse"][:, None])
    z = ATTENTION[attention](q, k, v, cfg, share).reshape(y.shape)
    y = y + gate * layers.matmul(z, p["o"])
  with jax.named_scope("mlp"):
    z = norm(y, mlp_shift, mlp_scale, cfg)
    z = jax.nn.gelu(layers.matmul(z, p["up"]), approximate=True)
    y = y + mlp_gate * layers.matmul(z, p["down"])
  return y, (q, k, v)


def modulations(
  condition: jax.Array, weight: jax.Array, bias: jax.Array, count: int
) -> list[jax.Array]:
  """`count` vectors, each `[B, 1, D]`, of the condition `[B, D]`."""
  y = layers.matmul(condition, weight) + bias.astype(condition.dtype)
  return jnp.split(y[:, None], count, axis=-1)


def norm(
  y: jax.Array, shift: jax.Array, scale: jax.Array, cfg: Config
) -> jax.Array:
  """Layer norm without a gain of its own, then the condition's."""
  z = y.astype(jnp.float32)
  z = z - jnp.mean(z, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(z), axis=-1, keepdims=True)
  z = z * jax.lax.rsqrt(variance + cfg.norm_eps)
  z = z * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
  return z.astype(y.dtype)


def _full(q, k, v, cfg, share=None):
  """Softmax over all keys."""
  del cfg, share

  def one_by_one(q, k, v):
    """On a CPU the scores of an example stay in a cache, a batch's do not."""
    attend = lambda example: dense.full_attention(*(x[None] for x in example))
    return jax.lax.map(attend, (q, k, v))[:, 0]

  if meshes.batch_is_divided():
    return dense.full_attention(q, k, v)
  return jax.lax.platform_dependent(
    q, k, v, cpu=one_by_one, default=dense.full_attention
  )


def _piecewise(q, k, v, cfg, share=None):
  del share
  return kernels_pallas.piecewise_attention(
    q,
    k,
    v,
    density=cfg.density,
    block_size=math.prod(cfg.tile),
    tail=cfg.tail,
  )


def _in_context(q, k, v, cfg, share=None):
  return kernels_pallas.in_context_attention(
    q,
    k,
    v,
    context_length=cfg.num_tokens,
    keep=cfg.keep,
    sharp=cfg.sharp,
    density=cfg.density,
    block_size=math.prod(cfg.tile),
    residual=share,
  )


ATTENTION = {
  "full": _full,
  "piecewise": _piecewise,
  "in_context": _in_context,
}
