"""Linear attention as the token mixer of a layer.

Every mixer is a function of the normed residual stream and of one layer's
parameters, and gives the branch that is added to it. A layer keeps a `State`
instead of keys and values: the last tokens that its short convolutions need
and the recurrent memory, whatever the length of the text.

  mdn     Momentum DeltaNet (arXiv:2605.05838)
  gdn     Gated DeltaNet (arXiv:2412.06464)
  kda     Kimi Delta Attention (arXiv:2510.26692)
  gla     Gated linear attention (arXiv:2312.06635), here with convolutions
  linear  linear attention without a decay
  mamba2  Mamba-2 (arXiv:2405.21060), without biases in its convolution

Dimensions: B batch, T length, D width, H value heads, G query/key heads, K
key size, V value size, W convolution width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kernels_pallas as ops
from models import block, gates, layers, mixer_specs
from models import config as config_lib

Config = config_lib.Config
param_specs = mixer_specs.param_specs

_KDA = (ops.kda, ops.kda_step)
_DELTA = (ops.gated_delta_rule, ops.gated_delta_rule_step)
_LINEAR = (ops.linear_attention, ops.linear_attention_step)
_MOMENTUM = (ops.momentum_delta_rule, ops.momentum_delta_rule_step)

# The root that keeps GLA's decay near 1 (arXiv:2312.06635, section 4.4).
_GLA_ROOT = 16.0


class State(NamedTuple):
  """What a layer remembers of the tokens so far.

  Attributes:
    tails: by projection, its last `[B, W - 1, .]` values before the
      convolution, in the compute dtype.
    memory: float32 `[B, H, K, V]`, or `kernels_pallas.MomentumState`.
  """

  tails: dict[str, jax.Array]
  memory: Any


def init_state(mixer: str, cfg: Config, batch: int) -> State:
  """The state before the first token, all zeros."""
  size = cfg.linear_sizes
  dtype = jnp.dtype(cfg.compute_dtype)
  memory = jnp.zeros((batch, size.heads, size.key, size.value), jnp.float32)
  tails = {
    name.removesuffix("_conv1d"): jnp.zeros(
      (batch, spec.shape[0] - 1, spec.shape[1]), dtype
    )
    for name, spec in param_specs(mixer, cfg).items()
    if name.endswith("_conv1d")
  }
  if mixer == "mdn":
    memory = ops.MomentumState(memory, memory)
  return State(tails, memory)


def apply(
  mixer: str,
  y: jax.Array,
  p: Any,
  cfg: Config,
  *,
  state: State | None = None,
  segments: jax.Array | None = None,
) -> tuple[jax.Array, State]:
  """Mixes tokens.

  Args:
    mixer: a name of `config.MIXERS` other than "full".
    y: `[B, T, D]`, the normed residual stream.
    p: one layer's parameters.
    cfg: the model.
    state: of the tokens before; None is none.
    segments: int32 `[B, T]`, the number of each contiguous segment; neither
      memory nor convolutions cross from one to the next.

  Returns:
    The branch `[B, T, D]` in y's dtype, and the state after y.
  """
  return _MIXERS[mixer](y, p, cfg, state, segments)


def _project(y, p, name):
  return layers.matmul(y, layers.weight(p[name], y.dtype))


def _heads(x, size):
  """[B, T, heads * size] to [B, T, heads, size]."""
  return x.reshape(*x.shape[:2], -1, size)


def _convolved(y, p, names, state, segments):
  """Projections after their convolution and SiLU, and the new tails."""
  out, tails = [], {}
  for name in names:
    x, tails[name] = layers.short_convolution(
      _project(y, p, name),
      p[name + "_conv1d"],
      tail=None if state is None else state.tails[name],
      segments=segments,
    )
    out.append(x)
  return out, tails


def _qkv(y, p, cfg, state, segments):
  (q, k, v), tails = _convolved(y, p, "qkv", state, segments)
  size = cfg.linear_sizes
  return _heads(q, size.key), _heads(k, size.key), _heads(v, size.value), tails


def _logits(y, p, names):
  """Gate logits `[B, T, H]` of each name, in float32 throughout."""
  w = [layers.weight(p[n], jnp.float32).astype(jnp.float32) for n in names]
  joined = layers.matmul(y.astype(jnp.float32), jnp.concatenate(w, axis=1))
  return jnp.split(joined, len(names), axis=-1)


def _low_rank(y, p, name, size):
  x = _project(y, p, name + "_down")
  return _heads(_project(x, p, name + "_up"), size)


def _recur(op, qkv, gate, state, segments, scale=None):
  """The memory's output `[B, T, H, V]` and the memory after the last token."""
  parallel, step = op
  if state is not None and qkv[0].shape[1] == 1:
    first = [x[:, 0] for x in (*qkv, *gate)]
    o, memory = step(state.memory, *first, scale=scale)
    return o[:, None], memory
  return parallel(
    *qkv,
    *gate,
    scale=scale,
    initial_state=None if state is None else state.memory,
    segment_ids=segments,
  )


def _finish(o, gate, p, cfg, own):
  """Normed heads, gated by `gate` `[B, T, H, V]`, through the output matrix."""
  name = own if cfg.output_gate == "own" else cfg.output_gate
  activation = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[name]
  o = layers.rms_norm(o, p["o_norm"], cfg.norm_eps)
  gated = o.astype(jnp.float32) * activation(gate.astype(jnp.float32))
  return block.merge_heads(gated.astype(o.dtype), p)


def _gate(y, p, cfg):
  return _heads(_project(y, p, "g"), cfg.linear_sizes.value)


def _mdn(y, p, cfg, state, segments):
  q, k, v, tails = _qkv(y, p, cfg, state, segments)
  gate = gates.momentum_gates(
    *_logits(y, p, "abme"),
    rate_log=p["a_log"],
    bias=p["dt_bias"],
    factor_log=p["factor_log"],
    tau=(cfg.d_model / cfg.tau_factor) ** 0.5,
    min_log_mu=cfg.min_log_mu,
  )
  # The output correction of Comba (arXiv:2506.02475), of a key not yet normed.
  correction = jnp.exp(p["d_log"].astype(jnp.float32))[:, None]
  q = (q.astype(jnp.float32) - correction * k.astype(jnp.float32)).astype(
    q.dtype
  )
  qkv = layers.l2_norm(q), layers.l2_norm(k), v
  o, memory = _recur(_MOMENTUM, qkv, gate, state, segments)
  o = _finish(o, _gate(y, p, cfg), p, cfg, "sigmoid")
  return o, State(tails, memory)


def _gdn(y, p, cfg, state, segments):
  q, k, v, tails = _qkv(y, p, cfg, state, segments)
  a, b = _logits(y, p, "ab")
  gate = gates.log_decay(a, p["a_log"], p["dt_bias"]), jax.nn.sigmoid(b)
  qkv = layers.l2_norm(q), layers.l2_norm(k), v
  o, memory = _recur(_DELTA, qkv, gate, state, segments)
  o = _finish(o, _gate(y, p, cfg), p, cfg, "silu")
  return o, State(tails, memory)


def _kda(y, p, cfg, state, segments):
  q, k, v, tails = _qkv(y, p, cfg, state, segments)
  size = cfg.linear_sizes
  (b,) = _logits(y, p, "b")
  a = _low_rank(y, p, "f", size.key)
  decay = gates.log_decay(a, p["a_log"][:, None], p["dt_bias"])
  qkv = layers.l2_norm(q), layers.l2_norm(k), v
  o, memory = _recur(_KDA, qkv, (decay, jax.nn.sigmoid(b)), state, segments)
  gate = _low_rank(y, p, "g", size.value)
  return _finish(o, gate, p, cfg, "sigmoid"), State(tails, memory)


def _gla(y, p, cfg, state, segments):
  q, k, v, tails = _qkv(y, p, cfg, state, segments)
  logits = _low_rank(y, p, "f", cfg.linear_sizes.key).astype(jnp.float32)
  decay = jax.nn.log_sigmoid(logits + p["f_bias"].astype(jnp.float32))
  gate = (decay / _GLA_ROOT,)
  o, memory = _recur(_LINEAR, (q, k, v), gate, state, segments)
  o = _finish(o, _gate(y, p, cfg), p, cfg, "silu")
  return o, State(tails, memory)


def _linear(y, p, cfg, state, segments):
  q, k, v, tails = _qkv(y, p, cfg, state, segments)
  o, memory = _recur(_LINEAR, (q, k, v), (), state, segments)
  o = _finish(o, _gate(y, p, cfg), p, cfg, "silu")
  return o, State(tails, memory)


def _mamba2(y, p, cfg, state, segments):
  (x, b, c), tails = _convolved(y, p, "xbc", state, segments)
  size = cfg.linear_sizes
  x, b, c = _heads(x, size.value), _heads(b, size.key), _heads(c, size.key)
  (dt,) = _logits(y, p, ("dt",))
  dt = jax.nn.softplus(dt + p["dt_bias"].astype(jnp.float32))
  decay = -jnp.exp(p["a_log"].astype(jnp.float32)) * dt
  x32 = x.astype(jnp.float32)
  v = (dt[..., None] * x32).astype(x.dtype)
  o, memory = _recur(_LINEAR, (c, b, v), (decay,), state, segments, scale=1.0)
  o = o.astype(jnp.float32) + p["d_skip"].astype(jnp.float32)[:, None] * x32
  z = _project(y, p, "z").astype(jnp.float32)
  # Unlike the others, Mamba-2 gates first and norms all heads as one.
  o = (o.reshape(z.shape) * jax.nn.silu(z)).astype(y.dtype)
  o = layers.rms_norm(o, p["o_norm"], cfg.norm_eps)
  return layers.matmul(o, layers.weight(p["o"], o.dtype)), State(tails, memory)


_MIXERS = {
  "mdn": _mdn,
  "gdn": _gdn,
  "kda": _kda,
  "gla": _gla,
  "linear": _linear,
  "mamba2": _mamba2,
}
