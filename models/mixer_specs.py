"""The parameters of the linear mixers.

Shapes are one layer's. Matrices are (in, out); what gates and norms need is
vectors. Dimensions: D width, H value heads, G query/key heads, K key size, V
value size, W convolution width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlib_ext import specs
from models import config as config_lib
from models import gates

Config = config_lib.Config
Specs = dict[str, specs.ParamSpec]

# The width between GLA's two gate matrices (arXiv:2312.06635, section 4.4).
_GLA_RANK = 16


def param_specs(mixer: str, cfg: Config) -> Specs:
  """The parameters of one layer's mixer, its input norm apart."""
  return _SPECS[mixer](cfg)


def _matrix(cfg, d_in, d_out, axes) -> specs.ParamSpec:
  init = jax.nn.initializers.normal(cfg.init_std)
  return specs.ParamSpec((d_in, d_out), axes, init, jnp.dtype(cfg.param_dtype))


def _vector(cfg, shape, init) -> specs.ParamSpec:
  axes = (None,) * len(shape)
  return specs.ParamSpec(shape, axes, init, jnp.dtype(cfg.param_dtype))


def _convolved_specs(cfg, widths) -> Specs:
  """Projections of given names, and the convolution that follows each.

  Args:
    cfg: the model.
    widths: by name, the output's width and logical axis.
  """
  # As a convolution of W inputs per output starts in the usual libraries.
  bound = cfg.conv_width**-0.5
  uniform = lambda key, shape, dtype: jax.random.uniform(
    key, shape, dtype, -bound, bound
  )
  tree = {}
  for name, (width, axis) in widths.items():
    tree[name] = _matrix(cfg, cfg.d_model, width, ("embed", axis))
    tree[name + "_conv1d"] = specs.ParamSpec(
      (cfg.conv_width, width), (None, axis), uniform, tree[name].dtype
    )
  return tree


def _output_specs(cfg, norm) -> Specs:
  size = cfg.linear_sizes
  width = size.heads * size.value
  residual = jax.nn.initializers.normal(
    cfg.init_std * (2 * cfg.num_layers) ** -0.5
  )
  dtype = jnp.dtype(cfg.param_dtype)
  return {
    "o_norm": _vector(cfg, (norm,), jax.nn.initializers.ones),
    "o": specs.ParamSpec(
      (width, cfg.d_model), ("heads", "embed"), residual, dtype
    ),
  }


def _qkv_specs(cfg, *, gated=True) -> Specs:
  """Of everything but the gates: q, k, v, the output norm, its gate and o."""
  size = cfg.linear_sizes
  width = size.heads * size.value
  keys = (size.key_heads * size.key, "kv_heads")
  tree = _convolved_specs(cfg, {"q": keys, "k": keys, "v": (width, "heads")})
  if gated:
    tree["g"] = _matrix(cfg, cfg.d_model, width, ("embed", "heads"))
  return tree | _output_specs(cfg, size.value)


def _gate_specs(cfg, names) -> Specs:
  heads = cfg.linear_sizes.heads
  return {n: _matrix(cfg, cfg.d_model, heads, ("embed", None)) for n in names}


def _low_rank_specs(cfg, name, rank, width) -> Specs:
  return {
    name + "_down": _matrix(cfg, cfg.d_model, rank, ("embed", None)),
    name + "_up": _matrix(cfg, rank, width, (None, "heads")),
  }


def _mdn_specs(cfg) -> Specs:
  size = cfg.linear_sizes
  rates = gates.log_uniform_init(0.0, 16.0)
  heads = (2, size.heads)
  return {
    **_qkv_specs(cfg),
    **_gate_specs(cfg, "abme"),
    # Rows: of the decay and of the momentum.
    "a_log": _vector(cfg, heads, rates),
    "dt_bias": _vector(cfg, heads, gates.shared_step_bias_init),
    "factor_log": _vector(cfg, (size.heads,), gates.log_uniform_init(0.0, 4.0)),
    "d_log": _vector(cfg, (size.key_heads,), gates.log_uniform_init(0.0, 1.0)),
  }


def _gdn_specs(cfg) -> Specs:
  heads = (cfg.linear_sizes.heads,)
  return {
    **_qkv_specs(cfg),
    **_gate_specs(cfg, "ab"),
    "a_log": _vector(cfg, heads, gates.log_uniform_init(0.0, 16.0)),
    "dt_bias": _vector(cfg, heads, gates.step_bias_init),
  }


def _kda_specs(cfg) -> Specs:
  size = cfg.linear_sizes
  return {
    **_qkv_specs(cfg, gated=False),
    **_gate_specs(cfg, "b"),
    **_low_rank_specs(cfg, "f", size.value, size.heads * size.key),
    **_low_rank_specs(cfg, "g", size.value, size.heads * size.value),
    "a_log": _vector(cfg, (size.heads,), gates.log_uniform_init(1.0, 16.0)),
    "dt_bias": _vector(cfg, (size.heads, size.key), gates.step_bias_init),
  }


def _gla_specs(cfg) -> Specs:
  size = cfg.linear_sizes
  return {
    **_qkv_specs(cfg),
    **_low_rank_specs(cfg, "f", _GLA_RANK, size.heads * size.key),
    "f_bias": _vector(cfg, (size.heads, size.key), jax.nn.initializers.zeros),
  }


def _mamba2_specs(cfg) -> Specs:
  size = cfg.linear_sizes
  width = size.heads * size.value
  shared = (size.key_heads * size.key, "kv_heads")
  heads = (size.heads,)
  return {
    **_convolved_specs(cfg, {"x": (width, "heads"), "b": shared, "c": shared}),
    "z": _matrix(cfg, cfg.d_model, width, ("embed", "heads")),
    **_gate_specs(cfg, ("dt",)),
    "a_log": _vector(cfg, heads, gates.log_uniform_init(1.0, 16.0)),
    "dt_bias": _vector(cfg, heads, gates.step_bias_init),
    "d_skip": _vector(cfg, heads, jax.nn.initializers.ones),
    **_output_specs(cfg, width),
  }


_SPECS = {
  "mdn": _mdn_specs,
  "gdn": _gdn_specs,
  "kda": _kda_specs,
  "gla": _gla_specs,
  "linear": _qkv_specs,
  "mamba2": _mamba2_specs,
}
