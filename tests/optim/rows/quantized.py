"""Rows of the optimizers of quantized parameters."""

import functools

import jax.numpy as jnp

import optim
from jaxlib_ext import quantization
from tests.optim.rows.row import Row

ROWS: dict[str, Row] = {
  "eco": Row(
    optim.eco,
    rate=0.3,
    prepare=functools.partial(quantization.quantize_tree, fmt="int8"),
    view=lambda params: quantization.dequantize_tree(params),
    apply=optim.apply_updates,
    dtypes=(jnp.float32,),
  ),
  "q_galore": Row(
    functools.partial(optim.q_galore, rank=0.5, update_interval=5),
    rate=0.4,
    prepare=functools.partial(quantization.quantize_tree, fmt="int8:256"),
    view=lambda params: quantization.dequantize_tree(params),
    apply=optim.apply_updates,
    dtypes=(jnp.float32,),
    static_args=("rank",),
  ),
}
