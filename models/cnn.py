"""A small residual convolutional network as pure functions.

A stem, then stages of residual blocks on feature maps of half the side each,
then a linear classifier of the mean over positions. Norms are RMSNorm over
the channels of a position and come before the convolutions (arXiv:1603.05027,
with layers instead of batch statistics), so that an example's result depends
on no other example. Kernels are (height, width, in, out). Dimensions: B
batch, H and W of a feature map, C channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_ext import meshes, specs
from models import layers

Params = Any


@dataclasses.dataclass(frozen=True)
class Config:
  """A residual network.

  Attributes:
    input_shape: (height, width, channels) of an image.
    num_classes: of the labels.
    widths: channels of each stage; every stage but the first halves the side.
    blocks: residual blocks of every stage.
    kernel: side of the blocks' kernels.
    stem_stride: of the first convolution.
    norm_eps: added to the mean square in RMSNorm.
  """

  input_shape: tuple[int, int, int] = (32, 32, 3)
  num_classes: int = 10
  widths: tuple[int, ...] = (32, 64, 128)
  blocks: int = 1
  kernel: int = 3
  stem_stride: int = 1
  norm_eps: float = 1e-6

  def __post_init__(self):
    for name in ("input_shape", "widths"):
      value = tuple(getattr(self, name))
      object.__setattr__(self, name, value)
      if not value or min(value) < 1:
        raise ValueError(f"{name}: got {value}; allowed: numbers of at least 1")
    if len(self.input_shape) != 3:
      raise ValueError(
        f"input_shape: got {self.input_shape}; allowed: (height, width, "
        "channels)"
      )
    for name in ("num_classes", "blocks", "kernel", "stem_stride"):
      value = getattr(self, name)
      if value < 1:
        raise ValueError(f"{name}: got {value}; allowed: at least 1")
    if not self.norm_eps > 0:
      raise ValueError(f"norm_eps: got {self.norm_eps}; allowed: above 0")


class Output(NamedTuple):
  """What `apply` returns.

  Attributes:
    logits: float32 `[B, num_classes]`.
    hidden: None, or on request the feature maps `[B, H, W, C]` after the stem
      and after each stage, before the final norm.
  """

  logits: jax.Array
  hidden: tuple[jax.Array, ...] | None = None


def param_specs(cfg: Config) -> dict[str, Any]:
  """The parameters: a nested dict of `ParamSpec`, "stage0" and so on.

  The first convolution is "pixel_embed": it reads pixels as an embedding reads
  tokens, and `jaxlib_ext.labels` labels it so. A stage's kernels are stacked
  by block: `[blocks, height, width, in, out]`.
  """
  tree = {
    "pixel_embed": _kernel(cfg, cfg.input_shape[-1], cfg.widths[0]),
    "final_norm": _gain(cfg.widths[-1]),
    "head": specs.ParamSpec(
      (cfg.widths[-1], cfg.num_classes),
      ("embed", None),
      jax.nn.initializers.normal(cfg.widths[-1] ** -0.5),
    ),
  }
  before = (None, *cfg.widths)
  # What the blocks write has, over all of them, the variance of one.
  share = (len(cfg.widths) * cfg.blocks) ** -0.5
  for i, (source, width) in enumerate(zip(before, cfg.widths, strict=False)):
    stage = {
      "norm": _gain(width, cfg.blocks),
      "up": _kernel(cfg, width, width, cfg.blocks),
      "down": _kernel(cfg, width, width, cfg.blocks, share),
    }
    if source:
      stage["shrink"] = _kernel(cfg, source, width)
    tree[f"stage{i}"] = stage
  return tree


def init(key: jax.Array, cfg: Config) -> Params:
  """Draws the parameters."""
  return specs.init(key, param_specs(cfg))


@meshes.automatic(
  "params",
  "x",
  batch="x",
  out_specs=lambda *, x, **_: Output(
    meshes.batch_spec(x), meshes.batch_spec(x)
  ),
)
def apply(
  params: Params,
  x: jax.Array,
  *,
  cfg: Config,
  return_hidden: bool = False,
) -> Output:
  """Logits of the classes.

  Args:
    params: as `param_specs` describes.
    x: float `[B, *input_shape]`, pixels around 0; computed in float32.
    cfg: the model.
    return_hidden: also return the feature maps.

  Returns:
    An `Output`.

  Raises:
    ValueError: pixels of another shape than the model's.
  """
  if x.shape[1:] != cfg.input_shape:
    raise ValueError(
      f"x: got shape {x.shape}; allowed: (batch, *{cfg.input_shape})"
    )
  with jax.named_scope("stem"):
    y = convolve(x.astype(jnp.float32), params["pixel_embed"], cfg.stem_stride)
  maps = [y]
  for i in range(len(cfg.widths)):
    stage = params[f"stage{i}"]
    with jax.named_scope(f"stage{i}"):
      if "shrink" in stage:
        y = convolve(y, stage["shrink"], 2)
      for j in range(cfg.blocks):
        z = layers.rms_norm(y, stage["norm"][j], cfg.norm_eps)
        z = jax.nn.relu(convolve(z, stage["up"][j]))
        y = y + convolve(z, stage["down"][j])
    maps.append(y)
  with jax.named_scope("head"):
    y = layers.rms_norm(y, params["final_norm"], cfg.norm_eps)
    pooled = jnp.mean(y, axis=(1, 2))
    logits = layers.dot(pooled, params["head"], 1, 0)
  return Output(logits, tuple(maps) if return_hidden else None)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Cross-correlation with zeros around, `ceil(side / stride)` positions.

  Args:
    x: `[B, H, W, in]`.
    kernel: `[height, width, in, out]`.
    stride: along both sides.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), out]` of x's dtype.
  """
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _gain(width, blocks=0):
  stack = (blocks,) if blocks else ()
  return specs.ParamSpec(
    (*stack, width),
    (*("layers" for _ in stack), None),
    jax.nn.initializers.ones,
  )


def _kernel(cfg, d_in, d_out, blocks=0, share=1.0):
  """Of variance 2 / fan-in (arXiv:1502.01852), times `share` squared."""
  std = share * math.sqrt(2 / (cfg.kernel**2 * d_in))
  stack = (blocks,) if blocks else ()
  return specs.ParamSpec(
    (*stack, cfg.kernel, cfg.kernel, d_in, d_out),
    (*("layers" for _ in stack), None, None, "embed", "mlp"),
    jax.nn.initializers.normal(std),
  )
