"""What may be lowered where.

Which platform a function is for is known when it is lowered, and not when it
is traced: a CPU host exports and compiles for TPUs. Then is when
`jax.lax.platform_dependent` chooses between programs, and `only` refuses.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from kernels_pallas import meshes

# Where Pallas implementations run.
PALLAS = {"pallas_tpu": ("tpu",), "pallas_gpu": ("cuda", "rocm")}


def only(tree: Any, allowed: tuple[str, ...], reason: str) -> Any:
  """`tree`, which cannot be lowered for a platform that is not allowed.

  Args:
    tree: arrays, of which at least one is used.
    allowed: platforms, as JAX names them for lowering.
    reason: of the NotImplementedError, which adds the platform.

  Returns:
    The same arrays.
  """
  leaves, structure = jax.tree.flatten(tree)
  leaves[0] = _only_p.bind(leaves[0], allowed=allowed, reason=reason)
  return jax.tree.unflatten(structure, leaves)


def refused(like: Any, tree: Any, reason: str) -> Any:
  """A program that cannot be lowered for any platform.

  Args:
    like: shapes and dtypes of what it would return.
    tree: its arguments.
    reason: of the NotImplementedError.
  """
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  zeros, _ = meshes.vary_alike((only(zeros, (), reason), tree))
  return zeros


def _check(platforms, allowed, reason):
  for platform in platforms:
    if platform not in allowed:
      raise NotImplementedError(f"{reason}, and not on {platform}")


_only_p = core.Primitive("only_on_platforms")


@_only_p.def_impl
def _only_impl(x, *, allowed, reason):
  names = {"gpu": "cuda"}
  found = {device.platform for device in jnp.asarray(x).devices()}
  _check([names.get(p, p) for p in found], allowed, reason)
  return x


@_only_p.def_abstract_eval
def _only_abstract_eval(x, *, allowed, reason):
  del allowed, reason
  return x


def _only_jvp(primals, tangents, **params):
  return _only_p.bind(*primals, **params), tangents[0]


def _only_batch(args, dims, **params):
  return _only_p.bind(*args, **params), dims[0]


def _only_lowering(ctx, x, *, allowed, reason):
  _check(ctx.module_context.platforms, allowed, reason)
  return [x]


ad.primitive_jvps[_only_p] = _only_jvp
batching.primitive_batchers[_only_p] = _only_batch
mlir.register_lowering(_only_p, _only_lowering)
