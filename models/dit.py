"""A diffusion transformer as pure functions of a nested dict of arrays.

The blocks are those of DiT (arXiv:2212.09748): adaptive layer norm whose
scales, shifts and gates start at zero. The positions are rotary along each
axis of the grid, and the model predicts the velocity of a rectified flow
(`models.dit_flow`). A second image or video may condition it in context: its
tokens follow the target's in one sequence. Dimensions: B batch, T tokens of
the target, S of the sequence (T, or 2T with a context), D width, H heads, K
head size, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_ext import meshes, specs
from kernels_pallas.sparse import tiling
from models import dit_block, dit_config, dit_flow, ids, layers

Config = dit_config.Config
Params = Any

# Of t, in [0, 1], whose angles are 1000 t times 1 to 1/10000.
_TIME_FEATURES = 256
_TIME_SCALE = 1000.0


def param_specs(cfg: Config) -> dict[str, Any]:
  """The parameters: a nested dict of `ParamSpec`, layers stacked in front.

  Matrices are (in, out). With classes there is a "label_embed" whose last row
  is of no class, with a context a "context_embed" that its tokens add.
  """
  d, f = cfg.d_model, cfg.d_ff
  normal = jax.nn.initializers.normal(cfg.init_std)
  residual = jax.nn.initializers.normal(
    cfg.init_std * (2 * cfg.num_layers) ** -0.5
  )
  zeros = jax.nn.initializers.zeros
  spec = specs.ParamSpec
  layer = {
    "modulation": spec((d, 6 * d), ("embed", "mlp"), zeros),
    "modulation_bias": spec((6 * d,), ("mlp",), zeros),
    "q": spec((d, d), ("embed", "heads"), normal),
    "k": spec((d, d), ("embed", "heads"), normal),
    "v": spec((d, d), ("embed", "heads"), normal),
    "o": spec((d, d), ("heads", "embed"), residual),
    "up": spec((d, f), ("embed", "mlp"), normal),
    "down": spec((f, d), ("mlp", "embed"), residual),
  }
  if cfg.coarse_residual:
    layer["coarse"] = spec((d,), ("embed",), zeros)
  tree = {
    "patch_embed": spec((cfg.patch_size, d), (None, "embed"), normal),
    "time_in": spec((_TIME_FEATURES, d), (None, "embed"), normal),
    "time_out": spec((d, d), ("embed", "mlp"), normal),
    "layers": {
      name: spec((cfg.num_layers, *s.shape), ("layers", *s.axes), s.init)
      for name, s in layer.items()
    },
    "final_modulation": spec((d, 2 * d), ("embed", "mlp"), zeros),
    "final_modulation_bias": spec((2 * d,), ("mlp",), zeros),
    "head": spec((d, cfg.patch_size), ("embed", None), zeros),
  }
  if cfg.num_classes:
    shape = (cfg.num_classes + 1, d)
    tree["label_embed"] = spec(shape, (None, "embed"), normal)
  if cfg.context:
    tree["context_embed"] = spec((d,), (None,), normal)
  return tree


def init(key: jax.Array, cfg: Config) -> Params:
  """Draws the parameters; the velocity they give is zero."""
  return specs.init(key, param_specs(cfg))


def patchify(x: jax.Array, cfg: Config) -> jax.Array:
  """Pixels `[B, *input_shape]` to patches `[B, T, patch_size]`, in order."""
  pixels = x.reshape(x.shape[0], -1, x.shape[-1])
  pixels = tiling.tile(pixels, cfg.input_shape[:-1], cfg.patch)
  return pixels.reshape(x.shape[0], cfg.num_tokens, cfg.patch_size)


def unpatchify(patches: jax.Array, cfg: Config) -> jax.Array:
  """The inverse of `patchify`."""
  batch, channels = patches.shape[0], cfg.input_shape[-1]
  pixels = patches.reshape(batch, -1, channels)
  pixels = tiling.untile(pixels, cfg.input_shape[:-1], cfg.patch)
  return pixels.reshape(batch, *cfg.input_shape)


def _apply_specs(*, x, return_qkv, **_):
  velocity = meshes.batch_spec(x)
  if return_qkv:
    return velocity, meshes.batch_spec(x, leading=1)
  return velocity


@meshes.automatic(
  "params", "x", "t", "labels", "context", batch="x", out_specs=_apply_specs
)
def apply(
  params: Params,
  x: jax.Array,
  t: jax.Array,
  labels: jax.Array | None = None,
  *,
  cfg: Config,
  context: jax.Array | None = None,
  return_qkv: bool = False,
) -> jax.Array | tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  """The velocity at x and t.

  Args:
    params: as `param_specs` describes.
    x: float `[B, *input_shape]`, what has noise.
    t: float `[B]`, the share of the noise, in [0, 1].
    labels: int `[B]`, `num_classes` for no class; None is no class in any.
    cfg: the model; any attention, whatever the parameters were trained with.
    context: float like x, without noise; its tokens follow x's and have the
      same positions.
    return_qkv: also return what every layer's attention got.

  Returns:
    float32, x's shape; on request also q, k and v, each `[L, B, S, H, K]`,
    rotated, the target's and then the context's tokens each in the order of
    `cfg.tile`.

  Raises:
    ValueError: shapes that are not the model's, labels or a context that it
      does not take, or in-context attention without a context.
  """
  _check_inputs(x, labels, context, cfg)
  dtype = jnp.dtype(cfg.compute_dtype)
  with jax.named_scope("embed"):
    y = tokens(params, x, cfg)
    if context is not None:
      own = tokens(params, context, cfg)
      own = own + params["context_embed"].astype(dtype)
      y = jnp.concatenate([y, own], axis=1)
    condition = _condition(params, t, labels, cfg)
    rotation = dit_block.rotation(cfg, 1 if context is None else 2)

  def body(attention, y, layer):
    y, qkv = dit_block.layer(attention, y, layer, condition, rotation, cfg)
    return y, (qkv if return_qkv else None)

  y, qkv = walk(body, y, params["layers"], cfg)
  with jax.named_scope("head"):
    shift, scale = dit_block.modulations(
      condition,
      params["final_modulation"],
      params["final_modulation_bias"],
      2,
    )
    y = dit_block.norm(y[:, : cfg.num_tokens], shift, scale, cfg)
    y = layers.dot(y, params["head"].astype(dtype), 2, 0)
    if cfg.tile:
      y = tiling.untile(y, cfg.grid, cfg.tile)
    velocity = unpatchify(y, cfg)
  return (velocity, qkv) if return_qkv else velocity


@meshes.automatic(
  "params",
  "key",
  "x",
  "labels",
  "context",
  batch="x",
  out_specs=lambda **_: PartitionSpec(),
)
def loss(
  params: Params,
  key: jax.Array,
  x: jax.Array,
  labels: jax.Array | None = None,
  *,
  cfg: Config,
  context: jax.Array | None = None,
  times: str = "logit_normal",
  label_dropout: float = 0.0,
) -> jax.Array:
  """Mean squared error of the velocity at random times, float32.

  Args:
    params: as for `apply`.
    key: of the times, the noise and the labels that are dropped.
    x: float `[B, *input_shape]`, the data.
    labels: as for `apply`.
    cfg: the model.
    context: as for `apply`.
    times: the distribution of t: one of `dit_flow.TIMES`.
    label_dropout: share of the labels replaced by no class, which guidance
      in `sample` needs.
  """
  key_t, key_noise, key_labels = jax.random.split(key, 3)
  t = dit_flow.draw_times(key_t, x.shape[0], times)
  noise = jax.random.normal(key_noise, x.shape, jnp.float32)
  if labels is not None and label_dropout:
    dropped = jax.random.bernoulli(key_labels, label_dropout, labels.shape)
    labels = jnp.where(dropped, cfg.num_classes, labels)
  noisy, target = dit_flow.interpolate(x.astype(jnp.float32), noise, t)
  velocity = apply(params, noisy, t, labels, cfg=cfg, context=context)
  return jnp.mean(jnp.square(velocity - target))


@meshes.automatic(
  "params",
  "noise",
  "labels",
  "context",
  batch="noise",
  out_specs=lambda *, noise, **_: meshes.batch_spec(noise),
)
def sample(
  params: Params,
  noise: jax.Array,
  labels: jax.Array | None = None,
  *,
  cfg: Config,
  steps: int,
  context: jax.Array | None = None,
  guidance: float = 1.0,
  full_steps: int = 0,
) -> jax.Array:
  """Integrates the flow from noise to data by Euler's method.

  Args:
    params: as for `apply`.
    noise: float `[B, *input_shape]`, standard normal. The same noise gives
      comparable samples under different attention.
    labels: as for `apply`.
    cfg: the model.
    steps: of equal length.
    context: as for `apply`.
    guidance: of the class, `v0 + guidance (v - v0)` with v0 the velocity
      without a class (arXiv:2207.12598); 1 is none and costs half.
    full_steps: so many steps in front attend fully whatever `cfg` says.

  Returns:
    float32, noise's shape.

  Raises:
    ValueError: as `apply`; guidance without labels, or steps out of range.
  """
  if guidance != 1.0 and labels is None:
    raise ValueError(f"guidance: got {guidance}; allowed: 1.0 without labels")
  if not 0 <= full_steps <= steps:
    raise ValueError(f"full_steps: got {full_steps}; allowed: 0 to {steps}")

  def velocity(cfg, x, t):
    t = jnp.broadcast_to(t, x.shape[:1])
    if guidance == 1.0:
      return apply(params, x, t, labels, cfg=cfg, context=context)
    twice = lambda a: None if a is None else jnp.concatenate([a, a])
    both = jnp.concatenate([labels, jnp.full_like(labels, cfg.num_classes)])
    v, free = jnp.split(
      apply(params, twice(x), twice(t), both, cfg=cfg, context=twice(context)),
      2,
    )
    return free + guidance * (v - free)

  times = dit_flow.euler_times(steps)
  x = noise.astype(jnp.float32)
  if full_steps:
    full = dataclasses.replace(cfg, attention="full")
    run = functools.partial(velocity, full)
    x = dit_flow.euler(run, x, times[: full_steps + 1])
  if full_steps < steps:
    run = functools.partial(velocity, cfg)
    x = dit_flow.euler(run, x, times[full_steps:])
  return x


def _check_inputs(x, labels, context, cfg):
  if x.shape[1:] != cfg.input_shape:
    raise ValueError(
      f"x: got shape {x.shape}; allowed: (batch, *{cfg.input_shape})"
    )
  if labels is not None and not cfg.num_classes:
    raise ValueError("labels: got some; allowed: None where num_classes is 0")
  if labels is not None:
    ids.check("labels", labels, cfg.num_classes + 1)
  if context is not None and not cfg.context:
    raise ValueError("context: got one; allowed: None where cfg.context is not")
  if context is not None and context.shape != x.shape:
    raise ValueError(
      f"context: got shape {context.shape}; allowed: x's, {x.shape}"
    )
  if context is None and cfg.attention == "in_context":
    raise ValueError(
      "context: got None; allowed: an array where attention is 'in_context'"
    )


def tokens(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
  """Embedded patches `[B, T, D]` of pixels, in the order of the tiles.

  Args:
    params: with a "patch_embed" `[patch_size, D]`.
    x: float `[B, *input_shape]`.
    cfg: the model.
  """
  patches = patchify(x.astype(jnp.dtype(cfg.compute_dtype)), cfg)
  if cfg.tile:
    patches = tiling.tile(patches, cfg.grid, cfg.tile)
  return meshes.divide_batch(layers.matmul(patches, params["patch_embed"]))


def _condition(params, t, labels, cfg):
  """What modulates every layer, [B, D] in the compute dtype."""
  half = _TIME_FEATURES // 2
  rates = jnp.exp(-math.log(1e4) * jnp.arange(half) / half)
  angle = _TIME_SCALE * t.astype(jnp.float32)[:, None] * rates
  features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
  dtype = jnp.dtype(cfg.compute_dtype)
  y = jax.nn.silu(layers.matmul(features.astype(dtype), params["time_in"]))
  y = layers.matmul(y, params["time_out"])
  if cfg.num_classes:
    if labels is None:
      labels = jnp.full(t.shape, cfg.num_classes)
    y = y + ids.rows(params["label_embed"], labels).astype(dtype)
  return jax.nn.silu(y)


def walk(
  body: Callable[[str, jax.Array, Any], tuple[jax.Array, Any]],
  y: jax.Array,
  stack: Any,
  cfg: Config,
) -> tuple[jax.Array, Any]:
  """Takes y through all layers; those in front may attend fully.

  Args:
    body: `(attention, y, layer) -> (y, out)`, attention a name of
      `dit_config.ATTENTION`.
    y: the residual stream.
    stack: the layers' parameters, stacked.
    cfg: the model.

  Returns:
    The residual stream, and the layers' outs, stacked.
  """
  outs = []
  split = 0 if cfg.attention == "full" else cfg.dense_layers
  for attention, first, last in (
    ("full", 0, split),
    (cfg.attention, split, cfg.num_layers),
  ):
    if first < last:
      part = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], stack)
      y, out = jax.lax.scan(
        lambda y, layer, name=attention: body(name, y, layer),
        y,
        part,
        unroll=not cfg.scan_layers,
      )
      outs.append(out)
  return y, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outs)
