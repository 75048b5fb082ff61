"""Optimizer arithmetic in at least float32, whatever the parameters are in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def at_least_float32(dtype: Any) -> Any:
  """float32 for anything narrower, else the dtype itself."""
  return jnp.promote_types(dtype, jnp.float32)


def widen(tree: Any) -> Any:
  """Casts the floating leaves narrower than float32 to float32."""

  def cast(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return x.astype(at_least_float32(x.dtype))
    return x

  return jax.tree.map(cast, tree)


def cast_like(tree: Any, like: Any) -> Any:
  """Casts each leaf to the dtype of its counterpart."""
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def zeros_like(params: Any, dtype: Any = None) -> Any:
  """Zero moments: `dtype`, or at least float32 where it is None."""
  return jax.tree.map(
    lambda p: jnp.zeros_like(p, dtype=dtype or at_least_float32(p.dtype)),
    params,
  )


def average(decay: Any, old: jax.Array, new: Any) -> jax.Array:
  """decay old + (1 - decay) new, computed in and of the dtype of `old`.

  The same average of ones, from 0 on, is the sum of the weights so far: what
  to divide by for the bias correction, whatever the decay did on the way. It
  has the rounding of `decay` in it just as the moment does.
  """
  if isinstance(decay, jax.Array):
    decay = decay.astype(old.dtype)
  return (decay * old + (1 - decay) * new).astype(old.dtype)


def nonzero(x: jax.Array) -> jax.Array:
  """A divisor for what is 0 where x is; NaN stays NaN.

  Not the smallest number, for compilers multiply divisors with each other.
  """
  return jnp.where(x == 0, 1, x)


def sign(x: jax.Array) -> jax.Array:
  """The sign of finite numbers, else NaN: an infinity has to be seen."""
  return jnp.where(jnp.isfinite(x), jnp.sign(x), jnp.nan)


def in_range(
  x: jax.Array,
  axis: int | tuple[int, ...],
  least: jax.Array | float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Divides by the largest magnitude along axes, so that squares stay in range.

  Args:
    x: real floating array.
    axis: one axis or several.
    least: the smallest divisor; None for the smallest normal number. Zeros
      stay zeros.

  Returns:
    The quotient, and the root of the divisor's reciprocal, the axes kept: to
    multiply by twice, because compilers make divisions multiplications by a
    reciprocal, which may underflow.
  """
  least = jnp.finfo(x.dtype).tiny if least is None else least
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
  root = jax.lax.rsqrt(jnp.maximum(largest, least))
  return (x * root) * root, root


# The squares of as large numbers, and of sums of them, are in float32's range.
_LARGEST = 2.0**48


def limited(
  x: jax.Array, axis: int | tuple[int, ...], largest: float = _LARGEST
) -> jax.Array:
  """Scales down what has a magnitude above `largest`, to that.

  One huge gradient then leaves moments that are finite and decay. Infinities
  become NaN and so stay visible.

  Args:
    x: real floating array.
    axis: of what is scaled together, one axis or several; () for each entry.
    largest: a float32 of at least 4.

  Returns:
    Array like x.
  """
  top = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
  return x * jnp.where(top > largest, largest / top, 1)


def in_float32(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Runs `inner` on float32 copies of narrower parameters.

  Its state is then float32 too: a bfloat16 second moment with a decay of
  0.999, which rounds to 1, would only ever grow. Gradients are taken to the
  dtypes of these copies, whether narrower or wider, so that an update leaves
  the state's dtypes as they are. The updates come back in the gradients'
  dtypes.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return inner.init(widen(params))

  def update(grads, state, params=None, **extra_args):
    wide, taken = None, widen(grads)
    if params is not None:
      wide = widen(params)
      taken = cast_like(taken, wide)
    updates, state = inner.update(taken, state, wide, **extra_args)
    return cast_like(updates, grads), state

  return optax.GradientTransformationExtraArgs(init, update)
