"""Calls whose arrays are divided over a mesh, without communication.

Axes of `AxisType.Explicit`, what `jax.make_mesh` makes, put an array's division
into its type, and every operation must say what becomes of it. A kernel is
independent for each member of the batch and each head, so a public function
runs as it is on each device's part, in a `jax.shard_map` over the Explicit
axes of its arrays' mesh. Auto axes stay the compiler's.

An array's axes are named by letters: "BTGK". Which of them may be divided is
up to the function; an axis that one array leaves whole and another divides is
divided in both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The letters of a function's arrays, and what may be divided.

  Attributes:
    arrays: the letters of each array (or of each of a tuple's) by the name
      of its argument.
    out: letters, in the structure of what the function returns.
    divisible: letters that may be divided.
    shared: a letter of which several members of another one share each
      member: {"G": "H"} for key heads that G divides H.
    hints: what to do instead of dividing a letter.
  """

  arrays: Mapping[str, str]
  out: Any
  divisible: str = "BH"
  shared: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {"G": "H"}
  )
  hints: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run(
  f: Callable[[dict[str, Any]], Any], arrays: dict[str, Any], layout: Layout
) -> Any:
  """`f(arrays)`, on each device's part where the arrays' mesh is Explicit.

  Args:
    f: takes a dict like `arrays` and returns what `layout.out` describes.
    arrays: arrays, tuples of arrays or None by name.
    layout: their letters.

  Returns:
    What `f` does, divided as its letters are.

  Raises:
    ValueError: for a divided axis that may not be, for one that two arrays
      divide over different mesh axes, and for shared heads that neither
      divide the parts nor are divided by them.
  """
  mesh = _mesh(arrays)
  if mesh is None:
    return f(arrays)
  axes = _axes(arrays, layout)
  parts = lambda letter: math.prod(mesh.shape[n] for n in axes.get(letter, ()))
  sizes = {
    letter: size
    for name, x in arrays.items()
    for leaf in jax.tree.leaves(x)
    for letter, size in zip(layout.arrays[name], leaf.shape, strict=True)
  }
  # Fewer shared heads than parts: each device takes the one that it needs.
  picked = {}
  for letter, owner in layout.shared.items():
    if letter not in sizes or not axes.get(owner):
      continue
    if sizes[letter] % parts(owner) == 0:
      axes[letter] = axes[owner]
    elif parts(owner) % sizes[letter] == 0:
      picked[letter] = axes[owner], parts(owner) // sizes[letter]
    else:
      raise ValueError(
        f"{owner} is divided over {parts(owner)} devices (mesh axes "
        f"{list(axes[owner])}), so {letter} = {sizes[letter]} must divide "
        "that number or be a multiple of it"
      )

  def spec(letters):
    entries = (axes.get(letter) or None for letter in letters)
    return PartitionSpec(*entries)

  specs = {}
  for name, x in arrays.items():
    one = spec(layout.arrays[name])
    specs[name] = jax.tree.map(lambda _, one=one: one, x)

  def body(arrays):
    return f({name: pick(name, x) for name, x in arrays.items()})

  def pick(name, x):
    for axis, letter in enumerate(layout.arrays[name]):
      if letter in picked:
        names, share = picked[letter]
        start = jax.lax.axis_index(names) // share
        cut = lambda leaf, start=start, axis=axis: jax.lax.dynamic_slice_in_dim(
          leaf, start, 1, axis
        )
        x = jax.tree.map(cut, x)
    return x

  place = lambda x, spec: _place(x, mesh, spec)
  return jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(specs,),
    out_specs=jax.tree.map(spec, layout.out),
    axis_names=set(mesh.explicit_axes),
  )(jax.tree.map(place, arrays, specs))


def vary_alike(tree: Any) -> Any:
  """Arrays of one `jax.shard_map` that vary over the same of its axes.

  Under its default `check_vma`, a scan's carry keeps the axes over which it
  varies, and so does what a rule for derivatives returns.

  Args:
    tree: arrays; integers and None stay what they are.

  Returns:
    The same values.
  """
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  every = frozenset().union(*map(varying, jax.tree.leaves(tree)))

  def cast(x):
    missing = tuple(sorted(every - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, tree)


def _mesh(arrays):
  """The arrays' mesh, concrete where one is known, if it has Explicit axes."""
  leaves = jax.tree.leaves(arrays)
  meshes = [jax.typeof(x).sharding.mesh for x in leaves]
  mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
  if mesh is None or not jax.sharding.get_abstract_mesh().empty:
    return mesh
  for x in leaves:
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
      if getattr(x.sharding, "mesh", None) and x.sharding.mesh.explicit_axes:
        return x.sharding.mesh
  return mesh


def _axes(arrays, layout) -> dict[str, Axes]:
  """The mesh axes that divide each letter."""
  found: dict[str, tuple[str, Axes]] = {}
  for name, x in arrays.items():
    for leaf in jax.tree.leaves(x):
      letters = layout.arrays[name]
      for letter, axes in zip(letters, _spec(leaf), strict=True):
        if not axes:
          continue
        owner = layout.shared.get(letter, letter)
        if owner not in layout.divisible:
          hint = layout.hints.get(letter, "jax.reshard it first")
          raise ValueError(
            f"{name} [{', '.join(letters)}] is divided along {letter} over the "
            f"mesh axes {list(axes)}; only {' and '.join(layout.divisible)} "
            f"may be divided: {hint}"
          )
        other, known = found.setdefault(owner, (name, axes))
        if known != axes:
          raise ValueError(
            f"{name} is divided along {letter} over the mesh axes "
            f"{list(axes)}, but {other} over {list(known)}: jax.reshard one"
          )
  axes = {letter: axes for letter, (_, axes) in found.items()}
  names = [n for entry in axes.values() for n in entry]
  twice = sorted({n for n in names if names.count(n) > 1})
  if twice:
    raise ValueError(
      f"the mesh axes {twice} divide more than one of {sorted(axes)}: "
      "jax.reshard an argument"
    )
  return axes


def _spec(x) -> tuple[Axes, ...]:
  """The Explicit mesh axes of each axis of an array."""
  sharding = jax.typeof(x).sharding
  explicit = set(sharding.mesh.explicit_axes)
  out = []
  for entry in sharding.spec:
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    out.append(tuple(n for n in names if n in explicit))
  return tuple(out) + ((),) * (x.ndim - len(out))


def _place(x, mesh, spec):
  """`x` divided as `spec` says, which moves nothing where it is so."""
  sharding = NamedSharding(mesh, spec)
  known = isinstance(mesh, Mesh) and not isinstance(x, jax.core.Tracer)
  return jax.device_put(x, sharding) if known else jax.reshard(x, sharding)
