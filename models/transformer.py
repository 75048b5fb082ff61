"""A LLaMA as pure functions of a nested dict of arrays.

Dimensions: B batch, T length, V vocabulary, L layers, D width, H query heads,
G key/value heads, K head size, F feed-forward width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_ext import specs
from models import attention, block, decode, layers, losses, presets
from models import config as config_lib

Config = config_lib.Config
llama = presets.llama
init_cache = decode.init_cache
decode_step = decode.decode_step
Params = Any


class Output(NamedTuple):
  """What `apply` returns.

  Attributes:
    logits: float32 `[B, T, V]`.
    hidden: None, or on request `[L + 1, B, T, D]`: the residual stream as the
      embedding gives it and after each layer, before the final norm.
  """

  logits: jax.Array
  hidden: jax.Array | None = None


def param_specs(cfg: Config) -> dict[str, Any]:
  """The parameters: a nested dict of `ParamSpec`, layers stacked in front.

  Matrices are (in, out). With tied embeddings there is no "head".
  """
  n, d, f = cfg.num_layers, cfg.d_model, cfg.d_ff
  q, kv = cfg.num_heads * cfg.key_size, cfg.kv_heads * cfg.key_size
  dtype = jnp.dtype(cfg.param_dtype)
  normal = jax.nn.initializers.normal(cfg.init_std)
  residual = jax.nn.initializers.normal(cfg.init_std * (2 * n) ** -0.5)
  ones = jax.nn.initializers.ones

  def matrix(d_in, d_out, axes, init=normal):
    return specs.ParamSpec((n, d_in, d_out), ("layers", *axes), init, dtype)

  gain = specs.ParamSpec((n, d), ("layers", None), ones, dtype)
  tree = {
    "embed": specs.ParamSpec(
      (cfg.vocab_size, d), ("vocab", "embed"), normal, dtype
    ),
    "layers": {
      "attn_norm": gain,
      "q": matrix(d, q, ("embed", "heads")),
      "k": matrix(d, kv, ("embed", "kv_heads")),
      "v": matrix(d, kv, ("embed", "kv_heads")),
      "o": matrix(q, d, ("heads", "embed"), residual),
      "mlp_norm": gain,
      "gate": matrix(d, f, ("embed", "mlp")),
      "up": matrix(d, f, ("embed", "mlp")),
      "down": matrix(f, d, ("mlp", "embed"), residual),
    },
    "final_norm": specs.ParamSpec((d,), (None,), ones, dtype),
  }
  if not cfg.tie_embeddings:
    tree["head"] = specs.ParamSpec(
      (d, cfg.vocab_size), ("embed", "vocab"), normal, dtype
    )
  return tree


def init(key: jax.Array, cfg: Config) -> Params:
  """Draws the parameters; jit it with `out_shardings` to draw them sharded."""
  return specs.init(key, param_specs(cfg))


def apply(
  params: Params,
  tokens: jax.Array,
  *,
  cfg: Config,
  segment_ids: jax.Array | None = None,
  return_hidden: bool = False,
  residual_sharding: jax.sharding.Sharding | None = None,
) -> Output:
  """Logits of the next token at every position.

  Args:
    params: as `param_specs` describes; a leaf may be a `QTensor`, which is
      dequantized where it is used, one layer at a time.
    tokens: int `[B, T]`.
    cfg: the model.
    segment_ids: int `[B, T]`; a position attends only to its own segment.
    return_hidden: also return the residual stream.
    residual_sharding: how to divide the residual stream `[B, T, D]` where
      the parameters are divided; without it the compiler may divide D and do
      the work of a smaller batch several times.

  Returns:
    An `Output`.
  """
  x, hidden = _trunk(
    params, tokens, cfg, segment_ids, return_hidden, residual_sharding
  )
  with jax.named_scope("head"):
    logits = block.logits(x, params, cfg)
  return Output(logits, hidden)


def loss(
  params: Params,
  tokens: jax.Array,
  targets: jax.Array,
  *,
  cfg: Config,
  segment_ids: jax.Array | None = None,
  weights: jax.Array | None = None,
  residual_sharding: jax.sharding.Sharding | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean cross-entropy per token in nats, plus the z-loss.

  Args:
    params: as for `apply`.
    tokens: int `[B, T]`.
    targets: int `[B, T]`, the token that follows each.
    cfg: the model.
    segment_ids: as for `apply`.
    weights: float `[B, T]`, the weight of each target in the mean; None is
      one each.
    residual_sharding: as for `apply`.

  Returns:
    The float32 loss to differentiate, and metrics: "nll" (the loss without
    z-loss), "z_loss" (already weighted by `cfg.z_loss`).
  """
  x, _ = _trunk(params, tokens, cfg, segment_ids, False, residual_sharding)
  with jax.named_scope("loss"):
    return losses.linear_cross_entropy(
      x,
      block.head(params, x.dtype, cfg),
      targets,
      weights=weights,
      z_loss=cfg.z_loss,
    )


def _trunk(params, tokens, cfg, segment_ids, return_hidden, residual_sharding):
  """The normed last state [B, T, D] and, on request, the residual stream."""
  if residual_sharding is None:
    divide = lambda x: x
  else:
    divide = lambda x: jax.lax.with_sharding_constraint(x, residual_sharding)
  with jax.named_scope("embed"):
    x = divide(block.embed(params, tokens, cfg))
  length = tokens.shape[1]
  cos, sin = layers.rope_table(jnp.arange(length), cfg.key_size, cfg.rope_theta)

  def body(x, layer):
    x = _layer(x, layer, cfg, cos, sin, segment_ids, divide)
    return x, (x if return_hidden else None)

  body = _remat(body, cfg)
  first = x
  if cfg.scan_layers:
    x, states = jax.lax.scan(body, x, params["layers"])
  else:
    states = []
    for i in range(cfg.num_layers):
      x, state = body(x, _slice(params["layers"], i))
      states.append(state)
    states = jnp.stack(states) if return_hidden else None
  hidden = None
  if return_hidden:
    hidden = jnp.concatenate([first[None], states])
  with jax.named_scope("final_norm"):
    x = layers.rms_norm(x, params["final_norm"], cfg.norm_eps)
  return x, hidden


def _slice(tree, i):
  return jax.tree.map(lambda leaf: leaf[i], tree)


def _remat(body, cfg):
  if cfg.remat == "none":
    return body
  policy = None
  if cfg.remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  # Inside scan the loop already keeps the recomputation from being merged
  # with the forward pass.
  return jax.checkpoint(body, policy=policy, prevent_cse=not cfg.scan_layers)


def _layer(x, p, cfg, cos, sin, segment_ids, divide):
  """One block: [B, T, D] to [B, T, D]."""
  with jax.named_scope("attention"):
    q, k, v = block.project(x, p, cfg, cos, sin)
    y = attention.causal_attention(q, k, v, segment_ids=segment_ids)
    x = divide(x + block.merge_heads(y, p))
  with jax.named_scope("mlp"):
    x = divide(x + block.feed_forward(x, p, cfg))
  return x
