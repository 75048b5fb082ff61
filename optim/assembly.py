"""Directions from gradients, under any mesh and for leaves of any size.

What methods compute of a matrix (projections, factors, sorts) leaves open how
its result is divided over a mesh, which raises where shardings are part of
types, and is not defined for arrays without entries. Every transformation of
ours that is more than elementwise is therefore assembled here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_ext import meshes, sharding


def is_empty(x: Any) -> bool:
  """Whether an array has no entries."""
  return 0 in x.shape


def places(leaves: Sequence[Any]) -> list[int]:
  """For each leaf, how many with entries come before it.

  What random numbers are drawn by, so that arrays without entries change none.
  """
  counts = itertools.accumulate((not is_empty(x) for x in leaves), initial=0)
  return list(counts)[:-1]


def mask_empty(tree: Any) -> Any:
  """`optax.MaskedNode` in the place of arrays without entries."""
  return jax.tree.map(lambda x: optax.MaskedNode() if is_empty(x) else x, tree)


def direction(
  init: Callable[[Any], Any],
  update: Callable[..., tuple[Any, Any]],
  *,
  takes_partitions: bool = False,
) -> optax.GradientTransformation:
  """Assembles a transformation that needs no parameters to update.

  Leaves without entries do not reach `init` and `update`, so that they change
  nothing for the others (their number, statistics over all leaves); they are
  their own updates, and have no state.

  Under a mesh with explicit axes the compiler divides what is in between.
  Updates have the gradients' types. The state is divided as
  `jaxlib_ext.sharding.state_shardings` says, by the types of the parameters,
  and keeps its types.

  Args:
    init: maps parameters to a state; it depends on shapes and dtypes only.
    update: maps gradients and a state to directions and a new state.
    takes_partitions: whether `update` has an argument `partitions`, which are
      `meshes.partitions` of the gradients' leaves.

  Returns:
    The transformation.
  """

  def init_any(params):
    params = mask_empty(params)
    mesh = meshes.explicit_mesh(params)
    return init(params) if mesh is None else _init_on(mesh, init, params)

  def update_any(updates, state, params=None):
    del params
    grads = mask_empty(updates)
    run = update
    if takes_partitions:
      found = meshes.partitions(jax.tree.leaves(grads))
      run = functools.partial(update, partitions=found)
    out, state = meshes.run_automatic(
      run, grads, state, out_specs=jax.tree.map(_spec, (grads, state))
    )
    out = jax.tree.map(lambda g, u: g if is_empty(g) else u, updates, out)
    return out, state

  return optax.GradientTransformation(init_any, update_any)


def _init_on(mesh, init, params):
  """`init` whose result is divided like the parameters."""
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  places = sharding.state_shardings(
    optax.GradientTransformation(init, None),
    shapes,
    jax.tree.map(lambda x: NamedSharding(mesh, _spec(x)), params),
  )
  # The arrays only say which devices to use; zeros of full size are not made.
  arrays = [
    x
    for x in jax.tree.leaves(params)
    if not isinstance(x, jax.ShapeDtypeStruct)
  ]
  make = jax.jit(lambda _: jax.sharding.reshard(init(shapes), places))
  return make(arrays)


def _spec(x: jax.Array) -> PartitionSpec:
  return PartitionSpec(*meshes.spec(x))
