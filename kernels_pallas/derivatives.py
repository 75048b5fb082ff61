"""Derivatives that an operation with a backward pass of its own lacks.

Such an operation is a `jax.custom_vjp`: JAX differentiates it in reverse, once.
Derivatives of that derivative are those of its two passes, which are ordinary
code but for loops and kernels that have none: `differentiable_as` gives a loop
those of slower code, and `once` says of a kernel that there are none. What is
in forward mode from the start has no way through; `reverse_only` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(tree: Any, remedy: str) -> Any:
  """The same arrays, whose derivatives may be taken in reverse mode only.

  All arguments of an operation go through one call, right before it.

  Args:
    tree: pytree of arrays.
    remedy: what to do instead.

  Returns:
    `tree`. Evaluating a tangent that went through it, as `jax.jvp` and
    `jax.linearize` do, raises NotImplementedError with the remedy.
  """
  leaves, structure = jax.tree.flatten(tree)
  inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

  @jax.custom_jvp
  def same(*xs):
    return xs

  @same.defjvp
  def _(primals, tangents):
    return primals, tuple(_tangents.bind(*tangents, remedy=remedy))

  marked = iter(
    same(*(x for x, is_one in zip(leaves, inexact, strict=True) if is_one))
  )
  leaves = [
    next(marked) if is_one else x
    for x, is_one in zip(leaves, inexact, strict=True)
  ]
  return jax.tree.unflatten(structure, leaves)


def differentiable_as(
  fast: Callable[..., Any], slow: Callable[..., Any]
) -> Callable[..., Any]:
  """`fast`, with the derivatives of `slow`, which computes the same.

  Args:
    fast: function of pytrees of arrays, such as one with a loop whose length
      is computed, which has no reverse mode.
    slow: likewise; JAX can differentiate it.
  """

  @jax.custom_jvp
  def f(*args):
    return fast(*args)

  @f.defjvp
  def _(primals, tangents):
    return jax.jvp(slow, primals, tangents)

  return f


def once(f: Callable[..., Any], name: str) -> Callable[..., Any]:
  """`f`, of which derivatives raise NotImplementedError.

  Args:
    f: one of the two passes of an operation, function of pytrees of arrays.
    name: of the implementation.
  """

  @jax.custom_jvp
  def g(*args):
    return f(*args)

  @g.defjvp
  def _(primals, tangents):
    raise NotImplementedError(
      f"{name} has first derivatives only, in reverse mode; others have "
      "implementation='xla' and 'reference'"
    )

  return g


# Passes tangents on to be transposed, and cannot be evaluated.
_tangents = Primitive("reverse_mode_only")
_tangents.multiple_results = True


def _refuse(*_, remedy: str, **__):
  raise NotImplementedError(
    "this operation has a derivative in reverse mode only (jax.grad, jax.vjp, "
    f"and jax.jvp of these); for jax.jvp and jax.linearize {remedy}"
  )


def _transpose(cotangents, *operands, remedy):
  del remedy
  return [
    ct if ad.is_undefined_primal(x) else None
    for ct, x in zip(cotangents, operands, strict=True)
  ]


def _batch(args, dims, *, remedy):
  return _tangents.bind(*args, remedy=remedy), dims


_tangents.def_abstract_eval(lambda *avals, remedy: list(avals))
_tangents.def_impl(_refuse)
ad.primitive_jvps[_tangents] = _refuse
ad.primitive_transposes[_tangents] = _transpose
batching.primitive_batchers[_tangents] = _batch
mlir.register_lowering(_tangents, _refuse)
