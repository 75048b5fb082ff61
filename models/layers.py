"""The parts of a transformer layer, as functions of arrays.

Dimensions: B batch, T query length, S key length, D width, H query heads,
G key/value heads, K head size, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_ext import meshes


def weight(leaf: Any, dtype: Any) -> jax.Array:
  """A parameter as an array: itself, or dequantized to `dtype`."""
  return leaf.dequantize(dtype) if hasattr(leaf, "dequantize") else leaf


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """`x @ w`, accumulated in float32, of x's dtype.

  Args:
    x: `[..., D]`, float32 or bfloat16.
    w: `[D, F]` of any float dtype; it is cast to x's, while its gradient
      keeps its own, so a float32 weight under bfloat16 compute gets a
      gradient that was never rounded to bfloat16.

  Returns:
    `[..., F]` in `x.dtype`.
  """
  if x.dtype == jnp.float32:
    # As a product of matrices: the gradient of a batched product contracts
    # two axes, for which XLA:CPU copies an operand element by element, with
    # the activation function computed again in that strided order.
    rows = x.reshape(-1, x.shape[-1]) @ w.astype(jnp.float32)
    return rows.reshape(*x.shape[:-1], w.shape[-1])
  return _low_precision_matmul(*meshes.vary_alike(x, w))


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
  """Contracts one axis of each of two arrays, accumulating in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((a_axis,), (b_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


# Differentiating a dot with float32 output multiplies a float32 cotangent
# with a bfloat16 operand, which XLA runs at float32 speed; written by hand,
# all three products have bfloat16 operands.
@jax.custom_vjp
def _low_precision_matmul(x, w):
  return _matmul_fwd(x, w)[0]


def _matmul_fwd(x, w):
  # Not by the function above: this is what a second derivative goes through.
  return dot(x, w.astype(x.dtype), x.ndim - 1, 0).astype(x.dtype), (x, w)


def _matmul_bwd(residuals, g):
  x, w = residuals
  dx = dot(g, w.astype(x.dtype), g.ndim - 1, 1).astype(x.dtype)
  return dx, dot_rows(x, g).astype(w.dtype)


_low_precision_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def dot_rows(x: jax.Array, g: jax.Array) -> jax.Array:
  """`x^T g` summed over all leading axes: the gradient of a weight.

  Args:
    x: `[..., D]`.
    g: `[..., F]`, of x's dtype.

  Returns:
    float32 `[D, F]`.
  """
  rows = g.reshape(-1, g.shape[-1])
  # Blocks within a sequence: a divided batch stays divided.
  block = block_size(x.shape[-2])
  x = x.reshape(-1, x.shape[-1])
  if x.dtype == jnp.float32:
    return dot(x, rows, 0, 0)
  return dot(transpose(x, block), rows, 1, 0)


def transpose(x: jax.Array, block: int | None = None) -> jax.Array:
  """Swaps the last two axes by a copy that XLA does not fold into a dot.

  XLA:CPU has fast bfloat16 products (4 to 8 times float32 where the CPU has
  AMX) only for operands whose contracted axis is last on the left; a plain
  transpose is folded into the product, which is then computed in float32.

  Args:
    x: `[..., rows, columns]`.
    block: rows that are copied together, a divisor of their number; None is
      `block_size` of it.
  """
  *batch, rows, columns = x.shape
  block = block or block_size(rows)
  x = x.reshape(*batch, rows // block, block, columns)
  return jnp.moveaxis(x, -1, -3).reshape(*batch, columns, rows)


def block_size(rows: int) -> int:
  """Of the two axes that `transpose` splits an axis of `rows` into."""
  return next((b for b in (32, 16, 8, 4, 2) if rows % b == 0), rows)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
  """RMSNorm over the last axis (arXiv:1910.07467, eq. 4), `[..., D]`.

  The gain is `[D]` or a scalar. The statistics and the product are float32;
  the result has x's dtype.
  """
  y = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return (y * scale * gain.astype(jnp.float32)).astype(x.dtype)


def rope_table(
  positions: jax.Array, size: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotary angles (arXiv:2104.09864, eq. 34).

  Args:
    positions: int32 `[...]`.
    size: K, the head size (even).
    theta: base of the wavelengths.

  Returns:
    Two float32 arrays `[..., K / 2]`.
  """
  frequency = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + K/2) of every head.

  Args:
    x: `[B, T, H, K]`.
    cos: from `rope_table`, `[T, K / 2]` or `[B, T, K / 2]`.
    sin: likewise.

  Returns:
    `[B, T, H, K]` in x's dtype; the rotation is computed in float32.
  """
  # A roll of the head and two products: XLA:CPU writes the concatenation of
  # the two rotated halves element by element.
  cos = jnp.concatenate([cos, cos], axis=-1)[..., None, :]
  sin = jnp.concatenate([-sin, sin], axis=-1)[..., None, :]
  y = x.astype(jnp.float32)
  return (y * cos + jnp.roll(y, y.shape[-1] // 2, axis=-1) * sin).astype(
    x.dtype
  )


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up` (arXiv:2002.05202), in float32, of gate's dtype."""
  y = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  return y.astype(gate.dtype)


def l2_norm(x: jax.Array) -> jax.Array:
  """`x / sqrt(|x|^2 + 1e-6)` over the last axis, in float32, of x's dtype.

  A row of zeros stays zero, and its gradient is finite.
  """
  y = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(y), axis=-1, keepdims=True)
  return (y * jax.lax.rsqrt(square + 1e-6)).astype(x.dtype)


def short_convolution(
  x: jax.Array,
  kernel: jax.Array,
  *,
  tail: jax.Array | None = None,
  segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Causal convolution of every channel with its own kernel, then SiLU.

  Args:
    x: `[B, T, D]`.
    kernel: `[W, D]`, its last row for the token itself.
    tail: `[B, W - 1, D]`, the tokens before x; None is zeros.
    segments: int32 `[B, T]`, a number for each contiguous segment; no token
      sees another segment.

  Returns:
    `[B, T, D]` in x's dtype (sums are float32), and the tail for the tokens
    after x.
  """
  batch, length, size = x.shape
  width = kernel.shape[0]
  if tail is None:
    tail = jnp.zeros((batch, width - 1, size), x.dtype)
  padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
  total = 0.0
  for i, row in enumerate(kernel.astype(jnp.float32)):
    back = width - 1 - i
    tap = padded[:, i : i + length].astype(jnp.float32) * row
    if segments is not None and back:
      before = ((0, 0), (back, 0))
      source = jnp.pad(segments, before, constant_values=-1)[:, :length]
      tap = jnp.where((segments == source)[..., None], tap, 0.0)
    total = total + tap
  return jax.nn.silu(total).astype(x.dtype), padded[:, length:]
