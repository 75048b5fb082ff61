"""Divides the orthogonalisation of many matrices over a mesh's devices.

Parameters are divided within their matrices (fsdp, tensor) and repeated over
the rest (data); a chain of products of such pieces moves or repeats work at
every product. Whole matrices need one exchange before the chain and one after
it: each device gets some of the matrices, and no product is done twice.

`division` says which matrices go at once and which are cut into strips.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxlib_ext import sharding


def take(
  parts: Sequence[jax.Array], start: int, stop: int
) -> tuple[list[int], list[jax.Array]]:
  """Matrices start ... stop of a concatenation: which arrays, what of them."""
  which, out = [], []
  for i, x in enumerate(parts):
    low, high = max(start, 0), min(stop, x.shape[0])
    if low < high:
      which.append(i)
      out.append(x[low:high])
    start, stop = start - x.shape[0], stop - x.shape[0]
  return which, out


# Mesh axes, as an entry of a `PartitionSpec`, of a matrix's rows and columns;
# None where they are not known.
Partition = tuple[Any, Any] | None


class _Sides(NamedTuple):
  """Mesh axes by what they do to a parameter's matrices.

  Attributes:
    repeated: nothing: each of their devices holds the same.
    rows: divide the short side.
    columns: divide the long side.
  """

  repeated: tuple[str, ...]
  rows: tuple[str, ...]
  columns: tuple[str, ...]


def mesh_of(xs: Sequence[jax.Array]) -> AbstractMesh | None:
  """The mesh in context (`jax.set_mesh`), or the one that arrays live on.

  Under `jax.jit` an argument's mesh is part of its type.

  Args:
    xs: arrays or tracers.

  Returns:
    None where there is no mesh, one device only, or an axis that the caller
    handles by itself (`jax.shard_map`).
  """
  meshes = [jax.sharding.get_abstract_mesh()]
  meshes += [jax.typeof(x).sharding.mesh for x in xs]
  mesh = next((mesh for mesh in meshes if not mesh.empty), None)
  if mesh is None or mesh.size == 1:
    return None
  return None if AxisType.Manual in mesh.axis_types else mesh


def common_side(shapes: Sequence[tuple[int, ...]]) -> int:
  """The side that most of the matrices' numbers have: a model's width.

  Args:
    shapes: of arrays [..., m, n]; of none it is 0.
  """
  votes = collections.Counter()
  for shape in shapes:
    for side in set(shape[-2:]):
      votes[side] += math.prod(shape)
  return min(votes, key=lambda side: (-votes[side], side), default=0)


def _sides(
  mesh: AbstractMesh,
  xs: Sequence[jax.Array],
  partitions: Sequence[Partition],
  width: int | None,
) -> _Sides:
  """How most of the arrays' numbers are divided.

  Where the mesh's axes are explicit, types say it, and `partitions` hold it.
  Over automatic axes it is not known while tracing, and guessed, as in the
  default `sharding.Rules`: parameters are repeated over the axes that divide
  the batch only (data); of the others the last (tensor) divides the side that
  is not the model's width and those before it (fsdp) the width, or a single
  one the width: up, gate, down and q are so, and o if it is known by its name
  (`labels.leads_back`). What is divided otherwise gives the same result, for
  one more exchange.
  """
  names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
  if None in partitions:
    rules = sharding.Rules()
    dividing = [
      name for name in names if name == rules.embed or name not in rules.batch
    ]
    rows = tuple(dividing[:-1] or dividing)
    columns = tuple(dividing[-1:] if len(dividing) > 1 else ())
    shapes = {x.shape[1:] for x in xs}
    if any(width == n != m for m, n in shapes):
      rows, columns = columns, rows
  else:
    votes = collections.Counter()
    for x, sides in zip(xs, partitions, strict=True):
      votes[tuple(_names(side) for side in sides)] += x.size
    rows, columns = votes.most_common(1)[0][0]
  repeated = tuple(name for name in names if name not in rows + columns)
  return _Sides(repeated, rows, columns)


def _names(entry: Any) -> tuple[str, ...]:
  """The mesh axes of an entry of a `PartitionSpec`."""
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def _pad(x: jax.Array, multiples: Sequence[int]) -> jax.Array:
  pads = [(0, -size % by) for size, by in zip(x.shape, multiples, strict=True)]
  return jnp.pad(x, pads) if any(pad for _, pad in pads) else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moved(move: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """`move(x)`, a collective that only moves; as integers if in bfloat16.

  For some collectives the compiler for CPUs widens bfloat16 to float32.
  """
  if x.dtype != jnp.bfloat16:
    return move(x)
  bits = move(jax.lax.bitcast_convert_type(x, jnp.uint16))
  return jax.lax.bitcast_convert_type(bits, x.dtype)


@_moved.defjvp
def _moved_jvp(move, primals, tangents):
  return _moved(move, *primals), move(*tangents)


def spread(
  fn: Callable[..., jax.Array],
  groups: Sequence[Sequence[jax.Array]],
  strips: Sequence[int],
  mesh: AbstractMesh,
  *args: jax.Array,
  partitions: Sequence[Sequence[Partition]],
  width: int | None = None,
  **static: Any,
) -> list[list[jax.Array]]:
  """`fn` of many matrices, an equal share on each device.

  Args:
    fn: maps [s, m, n], s >= 1, to the same shape and dtype, each matrix by
      itself; rows and columns of zeros must stay zeros and change nothing
      else. Where matrices are cut, it has strips [s, m, width] and is given
      `total=`: `total(y, dtype)` sums y over the strips of a matrix and
      exchanges it in `dtype`. A function of a module, for its identity is
      part of a cache key.
    groups: arrays [b_i, m, n] of one dtype; n differs between groups only.
    strips: for each group, how many devices share one of its matrices: a
      power of 2. Several groups, or a number above 1, are possible where all
      strips together are no more than the devices.
    mesh: from `mesh_of`.
    *args: further arrays that `fn` takes after the matrices.
    partitions: for each array, how its matrices are divided.
    width: the side that the model's width is; None is m.
    **static: hashable keyword arguments of `fn`.

  Returns:
    The results, one like each array.
  """
  run = functools.partial(
    _spread,
    fn=fn,
    strips=tuple(strips),
    mesh=mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names)),
    sides=_sides(
      mesh,
      [x for xs in groups for x in xs],
      [p for ps in partitions for p in ps],
      width,
    ),
    static=tuple(sorted(static.items())),
  )
  return run([list(xs) for xs in groups], args)


@functools.partial(
  jax.jit, static_argnames=("fn", "strips", "mesh", "sides", "static")
)
def _spread(groups, args, *, fn, strips, mesh, sides, static):
  d, a, c = (math.prod(mesh.shape[name] for name in side) for side in sides)
  local = functools.partial(
    _local, fn=fn, strips=strips, sides=sides, parts=(d, a, c), static=static
  )
  spec = PartitionSpec(None, sides.rows, sides.columns)
  specs = jax.tree.map(lambda _: spec, groups)
  padded = [
    [_pad(x, (1, a, c * by)) for x in xs]
    for xs, by in zip(groups, strips, strict=True)
  ]
  ys = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, PartitionSpec()),
    out_specs=specs,
    check_vma=False,
  )(padded, args)
  return jax.tree.map(lambda y, x: y[:, : x.shape[1], : x.shape[2]], ys, groups)


def _local(groups, args, *, fn, strips, sides, parts, static):
  """One device's part: its tiles of all matrices, [b_i, m / a, n / c]."""
  d, a, c = parts
  within = sides.rows + sides.columns
  exchange = lambda x: jax.lax.all_to_all(x, within, 0, 0, tiled=True)
  if not within:
    exchange = lambda x: x
  # A tile is cut like a matrix, so that strip j of a matrix is the j-th part
  # of each of its tiles: in which order columns stand does not matter.
  cut = [
    _cut(jnp.concatenate(xs), by) for xs, by in zip(groups, strips, strict=True)
  ]
  width = max(x.shape[2] for x in cut)
  tiles = jnp.concatenate([_pad(x, (1, 1, width)) for x in cut])
  tiles = _pad(tiles, (d * a * c, 1, 1))
  _, p, q = tiles.shape
  tiles = tiles.reshape(d, -1, p, q)
  tiles = tiles[jax.lax.axis_index(sides.repeated) if sides.repeated else 0]
  # [share * a * c, p, q] -> [share, a * p, c * q]: the tiles of one matrix
  # arrive in the order of the devices they come from.
  y = _moved(exchange, tiles.reshape(a * c, -1, p, q))
  y = jnp.transpose(y.reshape(a, c, -1, p, q), (2, 0, 3, 1, 4))
  options = dict(static)
  if max(strips) > 1:
    counts = [x.shape[0] for x in cut]
    options["total"] = _total(counts, strips, sides.repeated + within)
  y = fn(y.reshape(-1, a * p, c * q), *args, **options)
  y = jnp.transpose(y.reshape(-1, a, p, c, q), (1, 3, 0, 2, 4))
  y = _moved(exchange, y.reshape(a * c, -1, p, q)).reshape(-1, p, q)
  if sides.repeated:
    gather = lambda y: jax.lax.all_gather(y, sides.repeated, tiled=True)
    y = _moved(gather, y)
  out = []
  for xs, by, x in zip(groups, strips, cut, strict=True):
    mine, y = y[: x.shape[0], :, : x.shape[2]], y[x.shape[0] :]
    ends = np.cumsum([x.shape[0] for x in xs])[:-1]
    out.append(jnp.split(_uncut(mine, by), ends))
  return out


def _cut(x: jax.Array, by: int) -> jax.Array:
  """[b, p, q] -> [b * by, p, q / by]."""
  b, p, _ = x.shape
  y = jnp.swapaxes(x.reshape(b, p, by, -1), 1, 2)
  return y.reshape(b * by, p, -1)


def _uncut(x: jax.Array, by: int) -> jax.Array:
  _, p, q = x.shape
  return jnp.swapaxes(x.reshape(-1, by, p, q), 1, 2).reshape(-1, p, by * q)


def _total(
  counts: Sequence[int], strips: Sequence[int], names: tuple[str, ...]
) -> Callable[[jax.Array, Any], jax.Array]:
  """Sums over runs of `strips[i]` devices, after `counts[i]` devices each.

  In every round, devices 1, 2, 4, ... apart exchange sums; who has no partner
  receives zeros. Both sides add the same two rounded numbers.
  """
  rounds = []
  for bit in range(max(strips).bit_length() - 1):
    start, pairs = 0, []
    for count, by in zip(counts, strips, strict=True):
      if by > 1 << bit:
        pairs += [(start + i, start + (i ^ (1 << bit))) for i in range(count)]
      start += count
    rounds.append(pairs)

  def total(x, dtype):
    for pairs in rounds:
      mine = x.astype(dtype)
      send = functools.partial(jax.lax.ppermute, axis_name=names, perm=pairs)
      x = mine.astype(x.dtype) + _moved(send, mine).astype(x.dtype)
    return x

  return total
