"""Functions that also work under explicit meshes and inside `jax.shard_map`.

`jax.make_mesh` makes `AxisType.Explicit` axes by default: shardings are then
part of an array's type, and an operation whose result could be divided in
several ways raises. `run_automatic` leaves those decisions to the compiler
within one function. Inside `jax.shard_map`, types say which mesh axes a value
varies over, and a loop must start with a carry that varies as its result does;
`vary_like` and `vary_alike` see to that.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

F = TypeVar("F", bound=Callable[..., Any])

# Inside `run_automatic`: the axes that divide the batch, which types of arrays
# there no longer tell.
_batch_axes = contextvars.ContextVar("batch_axes", default=None)


def explicit_mesh(tree: Any) -> AbstractMesh | None:
  """Returns the mesh over whose explicit axes some array may be divided.

  Args:
    tree: pytree of arrays.

  Returns:
    The mesh of the arrays' types, or None where no array's type has one with
    an explicit axis.
  """
  for leaf in jax.tree.leaves(tree):
    mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
    if mesh is not None and explicit_axes(mesh):
      return mesh
  return None


def explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
  """Returns the names of the mesh's axes that are part of arrays' types."""
  return tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Explicit
  )


def batch_spec(x: Any, *, leading: int = 0) -> PartitionSpec:
  """Returns a spec whose batch dimension is divided as the first of `x`.

  Args:
    x: an array `[B, ...]`.
    leading: dimensions before the batch, which are not divided.
  """
  return PartitionSpec(*(None,) * leading, spec(x)[0])


def spec(x: Any) -> tuple[Any, ...]:
  """Returns the explicit mesh axes of each dimension of an array.

  Args:
    x: an array.

  Returns:
    One entry per dimension: None, the name of a mesh axis, or a tuple of
    names. All are None where the type has no explicit mesh.
  """
  kind = jax.typeof(x)
  entries = tuple(kind.sharding.spec) if explicit_mesh(x) else ()
  return entries + (None,) * (len(kind.shape) - len(entries))


def partitions(xs: Sequence[jax.Array]) -> list[tuple[Any, ...] | None]:
  """Returns for each array how it is divided, as far as types say it.

  Args:
    xs: arrays.

  Returns:
    Per array its `spec`; None for all where there is no explicit mesh, or one
    that has automatic axes too.
  """
  mesh = explicit_mesh(xs)
  if mesh is None or AxisType.Auto in mesh.axis_types:
    return [None] * len(xs)
  return [spec(x) for x in xs]


def run_automatic(
  f: Callable[..., Any], *args: Any, out_specs: Any, batch: Any = None
) -> Any:
  """Calls `f(*args)` with the compiler free to divide what is in between.

  Where no argument is an array of an explicit mesh, this is `f(*args)`. All
  arrays that `f` computes with must be among `args`, not closed over.

  Args:
    f: function of arrays.
    *args: pytrees of arrays.
    out_specs: pytree of `PartitionSpec`, a prefix of the result: its type
      under an explicit mesh. An axis that does not divide its dimension
      raises.
    batch: an array `[B, ...]`; what `f` gives to `divide_batch` is divided as
      its batch is.

  Returns:
    The result of `f`.
  """
  mesh = explicit_mesh(args)
  if mesh is None:
    return f(*args)
  shardings = jax.tree.map(
    lambda entry: NamedSharding(mesh, entry),
    out_specs,
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
  axes = None if batch is None else spec(batch)[0]

  def run(*args):
    token = _batch_axes.set(axes)
    try:
      return f(*args)
    finally:
      _batch_axes.reset(token)

  names = explicit_axes(mesh)
  return jax.sharding.auto_axes(run, axes=names, out_sharding=shardings)(*args)


def automatic(
  *arrays: str, batch: str, out_specs: Callable[..., Any]
) -> Callable[[F], F]:
  """Makes a function run automatically: a decorator for `run_automatic`.

  Args:
    *arrays: names of the function's arguments that are pytrees of arrays.
    batch: the one whose batch others are divided as.
    out_specs: function of all arguments, by name, that gives the `out_specs`;
      called only where an array is of an explicit mesh.
  """

  def decorate(f):
    signature = inspect.signature(f)

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
      bound = signature.bind(*args, **kwargs)
      given = {n: x for n, x in bound.arguments.items() if n in arrays}
      if explicit_mesh(given) is None:
        return f(*args, **kwargs)
      rest = {n: x for n, x in bound.arguments.items() if n not in arrays}
      bound.apply_defaults()
      return run_automatic(
        lambda given: f(**given, **rest),
        given,
        out_specs=out_specs(**bound.arguments),
        batch=given[batch],
      )

    return wrapped

  return decorate


def batch_is_divided() -> bool:
  """Returns whether `run_automatic` was given a batch that is divided.

  A loop over a divided batch would gather it.
  """
  return _batch_axes.get() is not None


def divide_batch(x: jax.Array) -> jax.Array:
  """Divides `[B, ...]` as the batch that `run_automatic` was given.

  Left to itself, the compiler may divide another dimension of what comes from
  a divided parameter, and gather. Outside `run_automatic` it returns `x`.
  """
  axes = _batch_axes.get()
  if axes is None:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def constraint(
  sharding: jax.sharding.Sharding | None,
) -> Callable[[jax.Array], jax.Array]:
  """Returns a function that divides an array so, for `run_automatic`.

  Args:
    sharding: where its array is to lie; its mesh may have explicit axes. None
      is `divide_batch`.
  """
  if sharding is None:
    return divide_batch
  if isinstance(sharding, NamedSharding) and explicit_axes(sharding.mesh):
    return lambda x: jax.lax.with_sharding_constraint(x, sharding.spec)
  return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def varying_axes(tree: Any) -> frozenset[str]:
  """Returns the manual mesh axes that some array of a pytree varies over."""
  return frozenset().union(
    *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
  )


def vary_like(tree: Any, *others: Any) -> Any:
  """Marks the arrays of a pytree as varying over all axes that `others` do.

  Outside `jax.shard_map`, and with its `check_vma=False`, it returns `tree`.

  Args:
    tree: pytree of arrays.
    *others: pytrees of arrays.
  """
  axes = varying_axes((tree, others))

  def mark(x):
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

  return jax.tree.map(mark, tree) if axes else tree


def vary_alike(*trees: Any) -> tuple[Any, ...]:
  """Marks all arrays as varying over the axes that any of them varies over.

  A `jax.custom_vjp` function whose arguments vary alike may return cotangents
  that do; differentiation then sums those of arguments that did not.

  Args:
    *trees: pytrees of arrays.
  """
  return vary_like(trees)
