"""Meshes, logical-axis rules, and shardings of parameters and optimizer state.

A jitted `tx.init(params)` replicates its state: `zeros_like` has no data
dependence for the compiler to follow. `state_shardings` says where each leaf
of the state belongs, and is passed as `out_shardings`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlib_ext import labels, paths, specs

MeshAxes = str | tuple[str, ...] | None


def make_mesh(
  axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes a mesh whose axes the compiler may use freely (`AxisType.Auto`).

  Args:
    axes: size of each mesh axis, in order: `{"data": 2, "fsdp": 4}`.
    devices: the devices to use, all of this run's by default; the first
      ones are taken where the mesh needs fewer.

  Raises:
    ValueError: a size below 1, or more devices asked for than there are.
  """
  for name, size in axes.items():
    if size < 1:
      raise ValueError(f"mesh axis {name!r} must be at least 1, got {size}")
  devices = jax.devices() if devices is None else list(devices)
  needed = math.prod(axes.values())
  if needed > len(devices):
    raise ValueError(
      f"the mesh {dict(axes)} needs {needed} devices, there are {len(devices)}"
    )
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    devices=devices[:needed],
    axis_types=(AxisType.Auto,) * len(axes),
  )


@dataclasses.dataclass(frozen=True)
class Rules:
  """Maps each logical axis to the mesh axes it is divided over, or None.

  Mesh axes that a mesh does not have count as size 1. The defaults divide
  the batch over data and fsdp, the model's width over fsdp (ZeRO-3) and
  heads, hidden units and vocabulary over tensor.
  """

  batch: MeshAxes = ("data", "fsdp")
  embed: MeshAxes = "fsdp"
  heads: MeshAxes = "tensor"
  kv_heads: MeshAxes = "tensor"
  mlp: MeshAxes = "tensor"
  vocab: MeshAxes = "tensor"
  layers: MeshAxes = None
  length: MeshAxes = None

  def spec(
    self, axes: Sequence[str | None], mesh: Mesh | None = None
  ) -> PartitionSpec:
    """The `PartitionSpec` of an array with these logical axes.

    Raises:
      ValueError: an unknown logical axis, or a mesh axis used twice.
    """
    entries, used = [], set()
    allowed = [f.name for f in dataclasses.fields(self)]
    for axis in axes:
      if axis is not None and axis not in allowed:
        raise ValueError(f"unknown logical axis {axis!r}; allowed: {allowed}")
      entry = None if axis is None else getattr(self, axis)
      names = (entry,) if isinstance(entry, str) else tuple(entry or ())
      if mesh is not None:
        names = tuple(n for n in names if n in mesh.shape)
      for name in names:
        if name in used:
          raise ValueError(
            f"mesh axis {name!r} would divide two dimensions of an array "
            f"with logical axes {tuple(axes)}"
          )
        used.add(name)
      entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
  """Gives each `ParamSpec` of a tree its `NamedSharding`.

  Raises:
    ValueError: a dimension that its mesh axes do not divide, named with the
      parameter; or as `Rules.spec`.
  """
  rules = rules or Rules()

  def one(path, spec):
    partition = rules.spec(spec.axes, mesh)
    for axis, size, entry in zip(spec.axes, spec.shape, partition, strict=True):
      parts = _parts(entry, mesh)
      if size % parts:
        raise ValueError(
          f"parameter {paths.leaf_name(path)!r} of shape {spec.shape}: its "
          f"{axis!r} dimension ({size}) is not divisible by the {parts} parts "
          f"of mesh axes {entry!r}"
        )
    return NamedSharding(mesh, partition)

  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=specs.is_spec)


def parts(
  axes: Sequence[str | None], mesh: Mesh, rules: Rules | None = None
) -> int:
  """Counts the pieces that an array with these logical axes is divided into.

  Raises:
    ValueError: as `Rules.spec`.
  """
  spec = (rules or Rules()).spec(axes, mesh)
  return math.prod(_parts(entry, mesh) for entry in spec)


def _parts(entry: MeshAxes, mesh: Mesh) -> int:
  names = (entry,) if isinstance(entry, str) else tuple(entry or ())
  return math.prod(mesh.shape[n] for n in names)


def fit(sharding: NamedSharding, shape, like) -> NamedSharding:
  """Carries the sharding of an array of shape `like` over to `shape`.

  A dimension keeps its mesh axes where it has the same size, or (the scales
  of quantized groups) a size they divide; others are replicated.
  """
  if len(shape) != len(like):
    return NamedSharding(sharding.mesh, PartitionSpec())
  entries = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
  keep = [
    entry if size % _parts(entry, sharding.mesh) == 0 else None
    for size, entry in zip(shape, entries, strict=True)
  ]
  while keep and keep[-1] is None:
    keep.pop()
  return NamedSharding(sharding.mesh, PartitionSpec(*keep))


def expand(params: Any, param_shardings: Any) -> Any:
  """One sharding per array: those of `QTensor` leaves follow their parameter.

  Args:
    params: parameters or abstract values, `QTensor`s among them.
    param_shardings: one `NamedSharding` per parameter.
  """
  return jax.tree.map(
    lambda p, s: jax.tree.map(lambda leaf: fit(s, leaf.shape, p.shape), p),
    params,
    param_shardings,
    is_leaf=labels.is_param,
  )


def state_shardings(tx: Any, params_or_specs: Any, param_shardings: Any) -> Any:
  """Shardings of an optimizer's state, for any optax transformation.

  A state leaf belongs to the parameter whose path ends its own path (the
  longest such path) and whose rank it has; it is divided like that parameter.
  All else, counters and factored statistics, is replicated.

  Args:
    tx: the `optax.GradientTransformation`.
    params_or_specs: parameters, abstract values, or a tree of `ParamSpec`.
    param_shardings: one `NamedSharding` per parameter.

  Returns:
    A pytree of `NamedSharding` like `tx.init(params)`.
  """
  params = params_or_specs
  if any(
    specs.is_spec(s) for s in jax.tree.leaves(params, is_leaf=specs.is_spec)
  ):
    params = specs.abstract(params)
  flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=labels.is_param)
  owners = {
    _names(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      flat[0], jax.tree.leaves(param_shardings), strict=True
    )
  }
  mesh = jax.tree.leaves(param_shardings)[0].mesh
  replicated = NamedSharding(mesh, PartitionSpec())

  def one(path, leaf):
    names = _names(path)
    tails = (names[start:] for start in range(len(names) + 1))
    tail = next((tail for tail in tails if tail in owners), None)
    if tail is None:
      return jax.tree.map(lambda _: replicated, leaf)
    shape, sharding = owners[tail]
    return jax.tree.map(lambda a: fit(sharding, a.shape, shape), leaf)

  return jax.tree_util.tree_map_with_path(
    one, jax.eval_shape(tx.init, params), is_leaf=labels.is_param
  )


def _names(path) -> tuple[str, ...]:
  return tuple(paths.leaf_name((key,)) for key in path)
