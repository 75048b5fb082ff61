"""Functions whose gradients are written by hand, and what else they have.

A `jax.custom_vjp` has no forward mode, and its message about that names nothing
that a user of this package knows. A `Rule` here has the same hand-written
gradient and both modes: its tangents are one linear primitive, which is the
rule's `tangent` where it is evaluated (`jax.jvp`, `jax.linearize`) and its
`backward` where it is transposed (`jax.grad`). A rule whose code JAX can
differentiate again has derivatives of every order; one of Pallas kernels says
by NotImplementedError what it lacks.

`kernel` makes one operation of a function that calls Pallas. JAX's own
`pallas_call` fails without a reason where a derivative of it is asked for, and
where arrays vary over the axes of a `jax.shard_map` with its default check.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

from kernels_pallas import platforms


@dataclasses.dataclass(frozen=True)
class Rule:
  """A function of pytrees of arrays with its derivatives.

  `statics` is anything hashable. What is not floating is not differentiated.

  Attributes:
    primal: `(statics, *args)` to the outputs.
    forward: of the same to the outputs and what `backward` wants.
    backward: `(statics, kept, cotangents)` to a tuple like `args`, of
      cotangents; at what is not floating, of anything.
    plain: as `primal`, of code that JAX differentiates; or None, and then
      there is no forward mode.
    name: of the implementation, for messages.
  """

  primal: Callable[..., Any]
  forward: Callable[..., tuple[Any, Any]]
  backward: Callable[[Any, Any, Any], Any]
  plain: Callable[..., Any] | None
  name: str

  def __call__(self, statics: Any, *args: Any) -> Any:
    """The outputs."""
    return _call(self, statics, args)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call(rule, statics, args):
  return rule.primal(statics, *args)


@_call.defjvp
def _call_jvp(rule, statics, primals, tangents):
  (args,), (tangents,) = primals, tangents
  leaves, tree = jax.tree.flatten(args)
  moving = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
  some = lambda xs: [x for x, ok in zip(xs, moving, strict=True) if ok]
  out, kept = rule.forward(statics, *args)

  def tangent(fixed, linear):
    if rule.plain is None:
      raise NotImplementedError(
        f"{rule.name} has no forward-mode derivative (jax.jvp, "
        "jax.linearize, jax.jacfwd): use implementation='reference'"
      )
    leaves, _ = fixed

    def f(*floating):
      floating = iter(floating)
      each = zip(leaves, moving, strict=True)
      args = [next(floating) if ok else x for x, ok in each]
      return rule.plain(statics, *jax.tree.unflatten(tree, args))

    return jax.jvp(f, tuple(some(leaves)), tuple(linear))[1]

  def transpose(fixed, cotangents):
    results = rule.backward(statics, fixed[1], cotangents)
    return some(tree.flatten_up_to(tuple(results)))

  linear = some(tree.flatten_up_to(tangents))
  return out, _linear_call(tangent, transpose, (leaves, kept), linear, out)


def _linear_call(tangent, transpose, fixed, linear, out):
  """`tangent(fixed, linear)`, with its transpose; `out` is like the result."""
  fixed, fixed_tree = jax.tree.flatten(fixed)
  linear, linear_tree = jax.tree.flatten(linear)
  out, out_tree = jax.tree.flatten(out)
  count = len(fixed)

  def split(args):
    return (
      jax.tree.unflatten(fixed_tree, args[:count]),
      args[count:],
    )

  def flat_tangent(*args):
    fixed, linear = split(args)
    linear = jax.tree.unflatten(linear_tree, linear)
    return jax.tree.leaves(tangent(fixed, linear))

  def flat_transpose(*args):
    fixed, cotangents = split(args)
    cotangents = jax.tree.unflatten(out_tree, cotangents)
    return jax.tree.leaves(transpose(fixed, cotangents))

  results = _linear_p.bind(
    *fixed,
    *linear,
    tangent=flat_tangent,
    transpose=flat_transpose,
    count=count,
    avals=tuple(jax.typeof(x) for x in out),
  )
  return jax.tree.unflatten(out_tree, results)


_linear_p = core.Primitive("linear_rule")
_linear_p.multiple_results = True


@_linear_p.def_impl
def _linear_impl(*args, tangent, **params):
  del params
  return tangent(*args)


@_linear_p.def_abstract_eval
def _linear_abstract_eval(*args, avals, **params):
  del args, params
  return list(avals)


def _linear_jvp(primals, tangents, *, tangent, **params):
  out = _linear_p.bind(*primals, tangent=tangent, **params)
  moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

  def f(*some):
    args = list(primals)
    for i, x in zip(moving, some, strict=True):
      args[i] = x
    return tangent(*args)

  some = lambda xs: tuple(xs[i] for i in moving)
  return out, jax.jvp(f, some(primals), some(tangents))[1]


def _linear_transpose(cotangents, *args, transpose, count, **params):
  del params
  cotangents = map(ad.instantiate_zeros, cotangents)
  results = transpose(*args[:count], *cotangents)
  wanted = map(ad.is_undefined_primal, args[count:])
  results = zip(wanted, results, strict=True)
  return [None] * count + [x if ok else None for ok, x in results]


def _linear_batch(axes, args, dims, *, tangent, transpose, count, avals):
  # What is linear is batched throughout: transposed, it is summed where it
  # was broadcast.
  size = axes.size
  lead = lambda x, d: batching.bdim_at_front(x, d, size)
  linear = [lead(x, d) for x, d in zip(args[count:], dims[count:], strict=True)]
  fixed = args[:count]
  mapped = dims[:count]
  vmap = functools.partial(jax.vmap, axis_size=size)
  if axes.spmd_name is not None:
    vmap = functools.partial(vmap, spmd_axis_name=axes.spmd_name)
  out = _linear_p.bind(
    *fixed,
    *linear,
    tangent=vmap(tangent, in_axes=(*mapped, *(0,) * len(linear))),
    transpose=vmap(transpose, in_axes=(*mapped, *(0,) * len(avals))),
    count=count,
    avals=tuple(core.unmapped_aval(size, 0, aval) for aval in avals),
  )
  return out, [0] * len(out)


ad.primitive_jvps[_linear_p] = _linear_jvp
ad.primitive_transposes[_linear_p] = _linear_transpose
batching.fancy_primitive_batchers[_linear_p] = _linear_batch
mlir.register_lowering(
  _linear_p, mlir.lower_fun(_linear_impl, multiple_results=True)
)


def out_shape(
  shape: Sequence[int], dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
  """A result of a `pallas_call` that is inside a `kernel`."""
  return jax.ShapeDtypeStruct(
    tuple(shape), dtype, manual_axis_type=ManualAxisType()
  )


def kernel(f: Callable[..., Any], *args: Any, name: str) -> Any:
  """`f(*args)` as one operation, without derivatives.

  Args:
    f: calls Pallas.
    *args: pytrees of arrays.
    name: the implementation's: "pallas_tpu" or "pallas_gpu".

  Returns:
    What `f` does, varying over the axes of an enclosing `jax.shard_map` over
    which any argument varies.
  """
  flat, tree = jax.tree.flatten(args)
  out_tree = None

  def flat_f(*flat):
    nonlocal out_tree
    out, out_tree = jax.tree.flatten(f(*jax.tree.unflatten(tree, flat)))
    return out

  plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
  jaxpr = jax.make_jaxpr(flat_f)(*plain)
  return jax.tree.unflatten(
    out_tree, _kernel_p.bind(*flat, jaxpr=jaxpr, name=name)
  )


_kernel_p = core.Primitive("pallas_kernel")
_kernel_p.multiple_results = True


def _kernel_run(*args, jaxpr, name):
  del name
  return core.jaxpr_as_fun(jaxpr)(*args)


@_kernel_p.def_impl
def _kernel_impl(*args, **params):
  return jax.jit(functools.partial(_kernel_p.bind, **params))(*args)


@_kernel_p.def_effectful_abstract_eval
def _kernel_abstract_eval(*args, jaxpr, name):
  del name
  varying = frozenset().union(*(x.manual_axis_type.varying for x in args))
  mesh = args[0].sharding.mesh

  def one(x):
    if mesh.empty:
      return x
    return jax.core.ShapedArray(
      x.shape,
      x.dtype,
      sharding=NamedSharding(mesh, PartitionSpec(*(None,) * x.ndim)),
      manual_axis_type=ManualAxisType(varying=varying),
    )

  return [one(x) for x in jaxpr.out_avals], jaxpr.effects


def _kernel_jvp(primals, tangents, *, jaxpr, name):
  del primals, tangents, jaxpr
  raise NotImplementedError(
    f"{name} has only first derivatives in reverse mode (jax.grad): for others "
    "use implementation='reference'"
  )


def _kernel_batch(axes, args, dims, *, jaxpr, name):
  mapped = jax.vmap(
    core.jaxpr_as_fun(jaxpr), in_axes=tuple(dims), axis_size=axes.size
  )
  plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
  jaxpr = jax.make_jaxpr(mapped)(*plain)
  out = _kernel_p.bind(*args, jaxpr=jaxpr, name=name)
  return out, [0] * len(out)


def _kernel_lowering(ctx, *args, **params):
  # A branch for one platform of several: Pallas lowers for all that it sees.
  module = ctx.module_context
  here = [p for p in module.platforms if p in platforms.PALLAS[params["name"]]]
  if here:
    module = module.replace(platforms=tuple(here[:1]))
  plain = lambda avals: [jax.core.ShapedArray(x.shape, x.dtype) for x in avals]
  inner = ctx.replace(
    module_context=module,
    avals_in=plain(ctx.avals_in),
    avals_out=plain(ctx.avals_out),
  )
  run = mlir.lower_fun(_kernel_run, multiple_results=True)
  out = run(inner, *args, **params)
  if inner.tokens_out is not None:
    ctx.set_tokens_out(inner.tokens_out)
  return out


ad.primitive_jvps[_kernel_p] = _kernel_jvp
batching.fancy_primitive_batchers[_kernel_p] = _kernel_batch
mlir.register_lowering(_kernel_p, _kernel_lowering)
