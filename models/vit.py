"""A vision transformer as pure functions of a nested dict of arrays.

The tokens, their rotary positions along both axes and the ways to attend are
those of `models.dit`, the layers those of `models.transformer` (RMSNorm,
SwiGLU, no biases) without a mask; the classifier reads the mean of the normed
tokens, where arXiv:2010.11929 has a token of its own for it. Dimensions: B
batch, T tokens, D width, L layers, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_ext import meshes, specs
from models import block, dit, dit_block, dit_config, layers

# A diffusion transformer's: labels are what it predicts, not what it is told,
# so `num_classes` is at least 1 and `context` false.
Config = dit_config.Config
Params = Any


class Output(NamedTuple):
  """What `apply` returns.

  Attributes:
    logits: float32 `[B, C]`.
    hidden: None, or on request `[L + 1, B, T, D]`: the residual stream as the
      embedding gives it and after each layer, before the final norm.
  """

  logits: jax.Array
  hidden: jax.Array | None = None


def param_specs(cfg: Config) -> dict[str, Any]:
  """The parameters: a nested dict of `ParamSpec`, layers stacked in front.

  Matrices are (in, out).

  Raises:
    ValueError: a config without classes or with a context.
  """
  _check(cfg)
  d, f = cfg.d_model, cfg.d_ff
  normal = jax.nn.initializers.normal(cfg.init_std)
  residual = jax.nn.initializers.normal(
    cfg.init_std * (2 * cfg.num_layers) ** -0.5
  )
  spec = specs.ParamSpec
  gain = spec((d,), (None,), jax.nn.initializers.ones)
  layer = {
    "attn_norm": gain,
    "q": spec((d, d), ("embed", "heads"), normal),
    "k": spec((d, d), ("embed", "heads"), normal),
    "v": spec((d, d), ("embed", "heads"), normal),
    "o": spec((d, d), ("heads", "embed"), residual),
    "mlp_norm": gain,
    "gate": spec((d, f), ("embed", "mlp"), normal),
    "up": spec((d, f), ("embed", "mlp"), normal),
    "down": spec((f, d), ("mlp", "embed"), residual),
  }
  return {
    "patch_embed": spec((cfg.patch_size, d), (None, "embed"), normal),
    "layers": {
      name: spec((cfg.num_layers, *s.shape), ("layers", *s.axes), s.init)
      for name, s in layer.items()
    },
    "final_norm": gain,
    "head": spec((d, cfg.num_classes), ("embed", None), normal),
  }


def init(key: jax.Array, cfg: Config) -> Params:
  """Draws the parameters."""
  return specs.init(key, param_specs(cfg))


@meshes.automatic(
  "params",
  "x",
  batch="x",
  out_specs=lambda *, x, **_: Output(
    meshes.batch_spec(x), meshes.batch_spec(x, leading=1)
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
    x: float `[B, *input_shape]`, pixels around 0.
    cfg: the model; any attention, whatever the parameters were trained with.
    return_hidden: also return the residual stream.

  Returns:
    An `Output`.

  Raises:
    ValueError: pixels of another shape than the model's, or its config as for
      `param_specs`.
  """
  _check(cfg)
  if x.shape[1:] != cfg.input_shape:
    raise ValueError(
      f"x: got shape {x.shape}; allowed: (batch, *{cfg.input_shape})"
    )
  rotation = dit_block.rotation(cfg, 1)
  with jax.named_scope("embed"):
    y = dit.tokens(params, x, cfg)

  def body(attention, y, layer):
    with jax.named_scope("attention"):
      heads = block.project(block.norm(y, layer, cfg), layer, cfg)
      heads = block.rotate(heads, rotation)
      z = dit_block.ATTENTION[attention](*heads, cfg)
      y = y + block.merge_heads(z, layer)
    with jax.named_scope("mlp"):
      y = y + block.feed_forward(y, layer, cfg)
    return y, (y if return_hidden else None)

  first = y
  y, hidden = dit.walk(body, y, params["layers"], cfg)
  with jax.named_scope("head"):
    normed = layers.rms_norm(y, params["final_norm"], cfg.norm_eps)
    pooled = jnp.mean(normed.astype(jnp.float32), axis=1).astype(y.dtype)
    logits = layers.dot(pooled, params["head"].astype(y.dtype), 1, 0)
  if return_hidden:
    hidden = jnp.concatenate([first[None], hidden])
  return Output(logits, hidden)


def _check(cfg):
  if not cfg.num_classes:
    raise ValueError("num_classes: got 0; allowed: at least 1 for a classifier")
  if cfg.context:
    raise ValueError("context: got true; allowed: false for a classifier")
