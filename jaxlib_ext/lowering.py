"""Computations that depend on how many devices they are lowered for.

Under automatic sharding a function sees global shapes and no mesh, so that a
constant sized for one device is wrong for a pod: a loop that bounds memory by
global sizes has as many more trips as there are devices, each with its own
collectives. The number of devices is known when the computation is lowered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def by_device_count(f: Callable[..., Any], *args: Any, **static: Any) -> Any:
  """Calls `f(n, *args, **static)` with the devices it is lowered for.

  Reverse mode does not differentiate it: call it within the rules of a
  `jax.custom_vjp`. Forward mode does, as for one device.

  Args:
    f: function of an int, the number of devices, and of arrays. What it
      returns has the same structure, shapes and dtypes for every number, and
      the same values but for rounding. It is a function of a module, since
      calls of equal functions share a compilation.
    *args: pytrees of arrays.
    **static: hashable keyword arguments of `f`.

  Returns:
    The result of `f`. Within `jax.shard_map` arrays are one device's, and the
    number is 1.
  """
  if jax.sharding.get_abstract_mesh().manual_axes:
    return f(1, *args, **static)
  leaves, treedef = jax.tree.flatten(args)
  run = _Run(f, tuple(sorted(static.items())), treedef)
  one = functools.partial(f, 1, **static)
  out = jax.tree.structure(jax.eval_shape(one, *args))
  return out.unflatten(_by_device_count.bind(*leaves, run=run))


class _Run:
  """`f` on flat arrays, hashable by what it computes."""

  def __init__(self, f, static, treedef):
    self._parts = f, static, treedef

  def __call__(self, n, *leaves):
    f, static, treedef = self._parts
    return jax.tree.leaves(f(n, *treedef.unflatten(leaves), **dict(static)))

  def __eq__(self, other):
    return isinstance(other, _Run) and self._parts == other._parts

  def __hash__(self):
    return hash(self._parts)


_by_device_count = core.Primitive("by_device_count")
_by_device_count.multiple_results = True


@functools.lru_cache(maxsize=64)
def _jitted(run):
  return jax.jit(lambda *leaves: _by_device_count.bind(*leaves, run=run))


@_by_device_count.def_impl
def _impl(*leaves, run):
  return _jitted(run)(*leaves)


@_by_device_count.def_abstract_eval
def _abstract_eval(*avals, run):
  structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
  out = jax.eval_shape(functools.partial(run, 1), *structs)
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in out]


def _lower(ctx, *operands, run):
  count = getattr(ctx.module_context.axis_context, "num_devices", 1)
  lower = mlir.lower_fun(functools.partial(run, count), multiple_results=True)
  return lower(ctx, *operands)


def _jvp(primals, tangents, *, run):
  tangents = (
    ad.instantiate_zeros(t) if isinstance(t, ad.Zero) else t for t in tangents
  )
  return jax.jvp(functools.partial(run, 1), tuple(primals), tuple(tangents))


def _batch(args, dims, *, run):
  mapped = jax.vmap(functools.partial(run, 1), in_axes=tuple(dims))
  out = mapped(*args)
  return out, [0] * len(out)


mlir.register_lowering(_by_device_count, _lower)
ad.primitive_jvps[_by_device_count] = _jvp
batching.primitive_batchers[_by_device_count] = _batch
