"""A decoder-only transformer as pure functions of a nested dict of arrays.

A LLaMA, or one whose attention some or all layers replace by sparse or linear
attention (`Config.mixers`). Dimensions: B batch, T length, V vocabulary, L
layers, D width, H query heads, G key/value heads, K head size, F feed-forward
width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_ext import meshes, specs
from models import (
  attention,
  block,
  decode,
  layers,
  losses,
  mixers,
  presets,
  stack,
)
from models import config as config_lib

Config = config_lib.Config
llama = presets.llama
mdn = presets.mdn
preset = presets.preset
longgen_mixers = presets.longgen_mixers
init_cache = decode.init_cache
decode_step = decode.decode_step
Params = Any


class Output(NamedTuple):
  """What `apply` returns.

  Attributes:
    logits: float32 `[B, T, V]`.
    hidden: None, or on request `[L + 1, B, T, D]`: the residual stream as the
      embedding gives it and after each layer, before the final norm.
    qkv: None, or on request the rotated queries, keys and values
      `[N, B, T, ., K]` of the N layers with softmax attention.
    max_logits: None, or on request float32 `[N, H]` of those layers: the
      largest score before the softmax, 1/√K included, of the pairs of
      positions that may attend (`attention.max_logits`), over the batch.
  """

  logits: jax.Array
  hidden: jax.Array | None = None
  qkv: block.Heads | None = None
  max_logits: jax.Array | None = None


def param_specs(cfg: Config) -> dict[str, Any]:
  """The parameters: a nested dict of `ParamSpec`, layers stacked in front.

  Matrices are (in, out). With tied embeddings there is no "head"; only with
  `cfg.embed_projection` are there "proj_in" and "proj_out". Layers of
  one mixer are one stack, those of a pattern a stack "0", "1", ... for each
  of its positions (`models.stack`).
  """
  dtype = jnp.dtype(cfg.param_dtype)
  normal = jax.nn.initializers.normal(cfg.init_std)
  ones = jax.nn.initializers.ones
  if cfg.norm == "single_rms":
    gain = specs.ParamSpec((), (), ones, dtype)
  else:
    gain = specs.ParamSpec((cfg.d_model,), (None,), ones, dtype)

  def stacked(position, mixer):
    if mixer in config_lib.LINEAR:
      own = mixers.param_specs(mixer, cfg)
    else:
      own = _attention_specs(cfg)
    layer = {
      "attn_norm": gain,
      **own,
      "mlp_norm": gain,
      **_feed_forward_specs(cfg),
    }
    n = cfg.layers_at(position)
    return {
      name: specs.ParamSpec(
        (n, *spec.shape), ("layers", *spec.axes), spec.init, spec.dtype
      )
      for name, spec in layer.items()
    }

  tree = {
    "embed": specs.ParamSpec(
      (cfg.vocab_size, cfg.d_model), ("vocab", "embed"), normal, dtype
    ),
    "layers": stack.join(
      [stacked(*entry) for entry in enumerate(cfg.pattern)], cfg
    ),
    "final_norm": gain,
  }
  if not cfg.tie_embeddings:
    tree["head"] = specs.ParamSpec(
      (cfg.d_model, cfg.vocab_size), ("embed", "vocab"), normal, dtype
    )
  if cfg.embed_projection:
    square = specs.ParamSpec(
      (cfg.d_model, cfg.d_model), ("embed", None), _orthogonal, dtype
    )
    tree |= {"proj_in": square, "proj_out": square}
  return tree


def _orthogonal(key, shape, dtype):
  # A factorisation, which bfloat16 has none of.
  draw = jax.nn.initializers.orthogonal()
  return draw(key, shape, jnp.float32).astype(dtype)


def _matrix(cfg, d_in, d_out, axes, *, residual=False):
  std = cfg.init_std * ((2 * cfg.num_layers) ** -0.5 if residual else 1.0)
  init = jax.nn.initializers.normal(std)
  return specs.ParamSpec((d_in, d_out), axes, init, jnp.dtype(cfg.param_dtype))


def _attention_specs(cfg):
  d = cfg.d_model
  q, kv = cfg.num_heads * cfg.key_size, cfg.kv_heads * cfg.key_size
  return {
    "q": _matrix(cfg, d, q, ("embed", "heads")),
    "k": _matrix(cfg, d, kv, ("embed", "kv_heads")),
    "v": _matrix(cfg, d, kv, ("embed", "kv_heads")),
    "o": _matrix(cfg, q, d, ("heads", "embed"), residual=True),
  }


def _feed_forward_specs(cfg):
  d, f = cfg.d_model, cfg.d_ff
  return {
    "gate": _matrix(cfg, d, f, ("embed", "mlp")),
    "up": _matrix(cfg, d, f, ("embed", "mlp")),
    "down": _matrix(cfg, f, d, ("mlp", "embed"), residual=True),
  }


def init(key: jax.Array, cfg: Config) -> Params:
  """Draws the parameters; jit it with `out_shardings` to draw them sharded."""
  return specs.init(key, param_specs(cfg))


def _output_specs(*, params, tokens, cfg, **_):
  rows = meshes.spec(tokens)
  states = PartitionSpec(None, *rows)
  vocab = block.vocab_axes(params, tokens, cfg)
  return Output(PartitionSpec(*rows, vocab), states, states, PartitionSpec())


@meshes.automatic(
  "params", "tokens", "segment_ids", batch="tokens", out_specs=_output_specs
)
def apply(
  params: Params,
  tokens: jax.Array,
  *,
  cfg: Config,
  segment_ids: jax.Array | None = None,
  return_hidden: bool = False,
  return_qkv: bool = False,
  return_max_logits: bool = False,
  residual_sharding: jax.sharding.Sharding | None = None,
) -> Output:
  """Logits of the next token at every position.

  Args:
    params: as `param_specs` describes; a leaf may be a `QTensor`, which is
      dequantized where it is used, one layer at a time.
    tokens: int `[B, T]`, 0 to V - 1. The row of a traced one out of range is
      NaN.
    cfg: the model.
    segment_ids: int `[B, T]`; a position attends only to its own segment.
      Linear mixers start afresh where the id changes, so a segment that is
      to be one must be contiguous.
    return_hidden: also return the residual stream.
    return_qkv: also return what softmax attention is given; needs a layer
      that has it.
    return_max_logits: also return what `optim.apply_qk_clip` needs; so too.
    residual_sharding: how to divide the residual stream `[B, T, D]` where
      the parameters are divided; without it the compiler may divide D and do
      the work of a smaller batch several times.

  Returns:
    An `Output`.

  Raises:
    ValueError: a token that is not in the vocabulary, where it is known.
  """
  x, *others = _trunk(
    params,
    tokens,
    cfg,
    segment_ids,
    residual_sharding,
    return_hidden=return_hidden,
    return_qkv=return_qkv,
    return_max_logits=return_max_logits,
  )
  with jax.named_scope("head"):
    logits = block.logits(x, params, cfg)
  return Output(logits, *others)


@meshes.automatic(
  "params",
  "tokens",
  "targets",
  "segment_ids",
  "weights",
  batch="tokens",
  out_specs=lambda **_: PartitionSpec(),
)
def loss(
  params: Params,
  tokens: jax.Array,
  targets: jax.Array,
  *,
  cfg: Config,
  segment_ids: jax.Array | None = None,
  weights: jax.Array | None = None,
  return_max_logits: bool = False,
  residual_sharding: jax.sharding.Sharding | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean cross-entropy per token in nats, plus the z-loss.

  Args:
    params: as for `apply`.
    tokens: int `[B, T]`.
    targets: int `[B, T]`, the token that follows each; -1 and -100 have no
      part in the mean.
    cfg: the model.
    segment_ids: as for `apply`.
    weights: float `[B, T]`, the weight of each target in the mean; None is
      one each.
    return_max_logits: add the metric "max_logits", as in `Output`.
    residual_sharding: as for `apply`.

  Returns:
    The float32 loss to differentiate, and metrics: "nll" (the loss without
    z-loss), "z_loss" (already weighted by `cfg.z_loss`). All are NaN where a
    traced token or target is not in the vocabulary.

  Raises:
    ValueError: a token or target that is not in the vocabulary, where its
      value is known.
  """
  x, _, _, top = _trunk(
    params,
    tokens,
    cfg,
    segment_ids,
    residual_sharding,
    return_max_logits=return_max_logits,
  )
  with jax.named_scope("loss"):
    total, metrics = losses.linear_cross_entropy(
      x,
      block.head(params, x.dtype, cfg),
      targets,
      weights=weights,
      z_loss=cfg.z_loss,
    )
  return total, metrics if top is None else {**metrics, "max_logits": top}


def _trunk(
  params,
  tokens,
  cfg,
  segment_ids,
  residual_sharding,
  *,
  return_hidden=False,
  return_qkv=False,
  return_max_logits=False,
):
  """The normed last state [B, T, D] and the optional fields of `Output`."""
  divide = meshes.constraint(residual_sharding)
  with jax.named_scope("embed"):
    x = divide(block.embed(params, tokens, cfg))
  rotation = None
  if set(config_lib.SOFTMAX) & set(cfg.pattern):
    positions = jnp.arange(tokens.shape[1])
    rotation = layers.rope_table(positions, cfg.key_size, cfg.rope_theta)
  number = None if segment_ids is None else _number_segments(segment_ids)

  def body(position, x, layer):
    mixer, heads, top = cfg.pattern[position], None, None
    with jax.named_scope("attention" if mixer == "full" else mixer):
      y = block.norm(x, layer, cfg)
      if mixer in config_lib.LINEAR:
        y, _ = mixers.apply(mixer, y, layer, cfg, segments=number)
      else:
        heads = block.rotate(block.project(y, layer, cfg), rotation)
        how = dict(cfg=cfg, position=position, segment_ids=segment_ids)
        y = attention.mix(*heads, **how)
        if return_max_logits:
          top = attention.max_logits(heads.q, heads.k, **how)
        y = block.merge_heads(y, layer)
      x = divide(x + y)
    with jax.named_scope("mlp"):
      x = divide(x + block.feed_forward(x, layer, cfg))
    state = x if return_hidden else None
    return x, (state, heads if return_qkv else None, top)

  first = x
  x, outs = stack.walk(
    _remat(body, cfg),
    x,
    stack.split(params["layers"], cfg),
    cfg,
    scan=cfg.scan_layers,
  )
  states, heads, tops = zip(*outs, strict=True)
  hidden = qkv = top = None
  if return_hidden:
    hidden = jnp.concatenate([first[None], stack.interleave(states, cfg)])
  if return_qkv:
    qkv = stack.interleave(heads, cfg)
  if return_max_logits:
    top = stack.interleave(tops, cfg)
  with jax.named_scope("final_norm"):
    x = block.final_norm(x, params, cfg)
  return x, hidden, qkv, top


def _number_segments(ids):
  """0, 1, ... for the contiguous segments of each row: int32 `[B, T]`."""
  change = (ids[:, 1:] != ids[:, :-1]).astype(jnp.int32)
  return jnp.pad(jnp.cumsum(change, axis=1), ((0, 0), (1, 0)))


def _remat(body, cfg):
  if cfg.remat == "none":
    return body
  policy = None
  if cfg.remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  # Inside scan the loop already keeps the recomputation from being merged
  # with the forward pass; the layers after the last whole period are outside.
  whole = cfg.scan_layers and cfg.num_layers % len(cfg.pattern) == 0
  return jax.checkpoint(
    body, policy=policy, prevent_cse=not whole, static_argnums=(0,)
  )
