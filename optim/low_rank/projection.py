"""Subspaces of the gradients of matrices, and what goes in and out of them.

The one place where the low-rank methods project. A matrix [d_in, d_out] is
projected along its smaller side (the fan-in of a square one), as in the
papers: with S and L the smaller and larger side and rank r, moments take
2 r L numbers and a stored basis r S. Projecting the larger side would store
less, 2 r S + r L, but keep a share of about r/L instead of r/S of whatever
part of a gradient the basis was not made for, and GaLore's published 4.38 GB
for 1B parameters are the former's figure.

Everything here takes lists of arrays [batch..., d_in, d_out], each of whose
matrices has a subspace of its own. Bases have the axes in the places of the
matrix's, so that they can be divided among devices like it:
[batch..., d_in, r] or [batch..., r, d_out].
"""

from __future__ import annotations

import collections
import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import paths, sequencing
from optim import matrices, numerics

BASES = ("eigh", "svd", "randomized")
ON_REFRESH = ("keep", "reset", "rotate")

# The range finder's extra directions and power iterations: at rank S/4 it
# keeps 0.94 to 0.99 of the best subspace's energy (0.85 to 0.97 with one
# iteration) where singular values fall like k^-0.25 to k^-0.5.
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2

_HIGHEST = jax.lax.Precision.HIGHEST


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
  """Refuses what is not one of `allowed`.

  Raises:
    ValueError: naming the argument.
  """
  if value not in allowed:
    raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the leaves of a tree are cut into stacks of matrices, and back.

  Attributes:
    treedef: of the tree.
    names: of its leaves.
    leaves: their shapes and dtypes.
    axes: what their axes mean.
    parts: shapes and dtypes of each leaf's stacks.
  """

  treedef: Any
  names: tuple[str, ...]
  leaves: tuple[jax.ShapeDtypeStruct, ...]
  axes: tuple[matrices.MatrixAxes, ...]
  parts: tuple[tuple[jax.ShapeDtypeStruct, ...], ...]

  @classmethod
  def of(
    cls, tree: Any, spec: matrices.Spec, method: str, *, warn: bool = False
  ) -> Layout:
    """The layout of parameters or gradients.

    Args:
      tree: pytree of arrays.
      spec: a factory's `matrix_axes=`.
      method: the optimizer's name, for messages.
      warn: as for `matrices.resolve`.

    Raises:
      ValueError: as `matrices.resolve`.
    """
    axes = tuple(matrices.resolve(spec, tree, method, warn=warn))
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in flat)

    def cut(leaf, axes):
      split = lambda x: matrices.split(numerics.widen(x), axes)
      return tuple(jax.eval_shape(split, leaf))

    return cls(
      treedef=treedef,
      names=tuple(paths.leaf_name(path) for path, _ in flat),
      leaves=leaves,
      axes=axes,
      parts=tuple(map(cut, leaves, axes)),
    )

  def each(self) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """Every stack's leaf name, shape and dtype (at least float32)."""
    return [
      (name, part)
      for name, parts in zip(self.names, self.parts, strict=True)
      for part in parts
    ]

  def split(
    self, tree: Any, like: Sequence[Any] | None = None
  ) -> list[jax.Array]:
    """The stacks [batch..., d_in, d_out].

    Args:
      tree: pytree of arrays like the layout's.
      like: for each stack, an array of the dtype to take it to: that of the
        state, which gradients of a wider one must not change. None is at
        least float32.
    """
    leaves = self.treedef.flatten_up_to(tree)
    parts = [
      part
      for leaf, axes in zip(numerics.widen(leaves), self.axes, strict=True)
      for part in matrices.split(leaf, axes)
    ]
    return parts if like is None else numerics.cast_like(parts, list(like))

  def join(self, parts: Sequence[jax.Array]) -> Any:
    """Inverse of `split`, in the leaves' dtypes."""
    return self.treedef.unflatten(
      matrices.join(group, leaf.shape, axes).astype(leaf.dtype)
      for group, leaf, axes in zip(
        self._grouped(parts), self.leaves, self.axes, strict=True
      )
    )

  def pack(self, parts: Sequence[jax.Array]) -> Any:
    """A state like the tree, with one array in the place of each leaf.

    Where leaves are cut into several stacks, a tuple of such trees: the first
    of the leaves' first stacks, and so on, with `optax.MaskedNode` where a
    leaf has no more. Wrappers that keep a box for each parameter, as
    `flax.nnx.Optimizer` does, take one array in it and no tuple.
    """
    groups = self._grouped(parts)
    trees = tuple(
      self.treedef.unflatten(
        group[i] if i < len(group) else optax.MaskedNode() for group in groups
      )
      for i in range(self._depth)
    )
    return trees[0] if self._depth == 1 else trees

  def unpack(self, state: Any) -> list[jax.Array]:
    """Inverse of `pack`."""
    trees = (state,) if self._depth == 1 else state
    columns = [self.treedef.flatten_up_to(tree) for tree in trees]
    return [
      columns[i][leaf]
      for leaf, cut in enumerate(self.parts)
      for i in range(len(cut))
    ]

  @property
  def _depth(self) -> int:
    return max(map(len, self.parts), default=1)

  def _grouped(self, parts: Sequence[Any]) -> list[list[Any]]:
    """One list of stacks per leaf."""
    items = iter(parts)
    return [[next(items) for _ in cut] for cut in self.parts]


def rank_of(rank: int | float, name: str, shape: Sequence[int]) -> int:
  """The rank for matrices of a shape.

  Args:
    rank: as for the factories; a share is rounded, but not to 0.
    name: of the leaf, for the message.
    shape: [..., d_in, d_out].

  Raises:
    ValueError: a rank above the smaller side, naming the leaf.
  """
  side = min(shape[-2:])
  if not isinstance(rank, numbers.Integral) and rank <= 1:
    return max(1, math.floor(rank * side + 0.5))
  if rank > side:
    raise ValueError(
      f"rank: {rank} is more than the smaller side of the leaf {name!r}, "
      f"whose matrices are {tuple(shape[-2:])}; a share such as 0.25 fits all"
    )
  return int(rank)


def on_inputs(shape: Sequence[int]) -> bool:
  """Whether the fan-in is what is projected: it is not the larger side."""
  return shape[-2] <= shape[-1]


def rank_in(basis: jax.Array, shape: Sequence[int]) -> int:
  """The rank of a basis for matrices of a shape."""
  return basis.shape[-1 if on_inputs(shape) else -2]


def basis_shape(shape: Sequence[int], rank: int) -> tuple[int, ...]:
  """[batch..., d_in, rank] or [batch..., rank, d_out]."""
  *batch, d_in, d_out = shape
  return (*batch, d_in, rank) if on_inputs(shape) else (*batch, rank, d_out)


def low_shape(shape: Sequence[int], rank: int) -> tuple[int, ...]:
  """Shape of a projected matrix: [..., rank, d_out] or [..., d_in, rank]."""
  *batch, d_in, d_out = shape
  return (*batch, rank, d_out) if on_inputs(shape) else (*batch, d_in, rank)


def rank_axis(shape: Sequence[int]) -> int:
  """Which axis of a projected matrix counts basis vectors."""
  return -2 if on_inputs(shape) else -1


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=_HIGHEST)


def _t(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def down(basis: jax.Array, x: jax.Array) -> jax.Array:
  """Coordinates of matrices in a basis: Bᵀ X, or X Bᵀ from the right."""
  return _dot(_t(basis), x) if on_inputs(x.shape) else _dot(x, _t(basis))


def up(basis: jax.Array, low: jax.Array, shape: Sequence[int]) -> jax.Array:
  """The matrices of shape [..., d_in, d_out] with the given coordinates."""
  return _dot(basis, low) if on_inputs(shape) else _dot(low, basis)


def subspaces(
  parts: Sequence[jax.Array], ranks: Sequence[int], kind: str
) -> list[jax.Array]:
  """Orthonormal bases of the leading singular subspaces.

  Matrices of one shape, up to transposition, go through as one stack. A basis
  is orthonormal also where a matrix has fewer directions, or none at all.

  Args:
    parts: [batch..., d_in, d_out].
    ranks: one per part, at most its smaller side.
    kind: "eigh", "svd" or "randomized".

  Returns:
    Arrays of the shapes `basis_shape`; singular values descend along rank.
  """
  groups = collections.defaultdict(list)
  for i, (x, rank) in enumerate(zip(parts, ranks, strict=True)):
    x = x if on_inputs(x.shape) else _t(x)
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    groups[x.shape[1:], rank, x.dtype].append((i, x))
  out = [None] * len(parts)
  bases = None
  for (_, rank, _), members in groups.items():
    stack = jnp.concatenate([x for _, x in members])
    stack, _ = numerics.in_range(sequencing.after(stack, bases), (-2, -1))
    bases, start = _leading(stack, rank, kind), 0
    for i, x in members:
      one = bases[start : start + len(x)]
      start += len(x)
      one = one if on_inputs(parts[i].shape) else _t(one)
      out[i] = one.reshape(basis_shape(parts[i].shape, rank))
  return out


def _leading(x: jax.Array, rank: int, kind: str) -> jax.Array:
  """[k, S, rank] from [k, S, L]."""
  if kind == "svd":
    return jnp.linalg.svd(x, full_matrices=False)[0][..., :rank]
  if kind == "eigh":
    # X Xᵀ knows singular values below 3e-4 of the largest no more (float32);
    # what the basis then misses is below 1e-7 of the squared norm.
    return jnp.linalg.eigh(_dot(x, _t(x)))[1][..., ::-1][..., :rank]
  _, side, length = x.shape
  width = min(side, rank + _OVERSAMPLING)
  # A fixed draw serves: gradients do not know of it.
  start = jax.random.normal(jax.random.key(0), (length, width), x.dtype)
  q = jnp.linalg.qr(_dot(x, start))[0]
  for _ in range(_POWER_ITERATIONS):
    q = jnp.linalg.qr(_dot(_t(x), q))[0]
    q = jnp.linalg.qr(_dot(x, q))[0]
  small = _dot(_t(q), x)
  return _dot(q, _leading(small, rank, "eigh"))


def random_bases(
  keys: Sequence[jax.Array], parts: Sequence[jax.Array], ranks: Sequence[int]
) -> list[jax.Array]:
  """Orthonormal bases of random subspaces, as `subspaces` gives them."""
  out, q = [], None
  for key, x, rank in zip(keys, parts, ranks, strict=True):
    *batch, d_in, d_out = x.shape
    start = jax.random.normal(key, (*batch, min(d_in, d_out), rank), x.dtype)
    q = jnp.linalg.qr(sequencing.after(start, q))[0]
    out.append(q if on_inputs(x.shape) else _t(q))
  return out


def _rotation(new: jax.Array, old: jax.Array, inputs: bool) -> jax.Array:
  """C = newᵀ old, [..., r, r], for bases in either place."""
  return _dot(_t(new), old) if inputs else _dot(new, _t(old))


def _turned(c: jax.Array, low: jax.Array, inputs: bool) -> jax.Array:
  return _dot(c, low) if inputs else _dot(low, _t(c))


def refresh(
  due: jax.Array,
  draw: Callable[[], list[jax.Array]],
  old: list[jax.Array],
  moments: tuple[list[jax.Array], list[jax.Array]],
  shapes: Sequence[Sequence[int]],
  on_refresh: str,
) -> tuple[list[jax.Array], tuple[list[jax.Array], list[jax.Array]]]:
  """Replaces the bases, and carries the moments over, in the steps due.

  One branch for all leaves: in other steps nothing in it is executed, unless
  the caller is vmapped.

  Args:
    due: bool scalar.
    draw: computes the new bases (or indices).
    old: the present ones.
    moments: first and second moments in the subspaces.
    shapes: of the matrices, [..., d_in, d_out].
    on_refresh: "keep" leaves the moments as they are, "reset" makes them
      zero, "rotate" expresses them in the new basis: with C = newᵀ old, C m,
      and (C∘C) v, which is exact for coordinates that are uncorrelated.

  Returns:
    The bases and the moments.
  """
  if on_refresh == "keep":
    return jax.lax.cond(due, draw, lambda: old), moments

  def switch():
    new = draw()
    if on_refresh == "reset":
      return new, jax.tree.map(jnp.zeros_like, moments)
    first, second = [], []
    for p, q, m, v, shape in zip(new, old, *moments, shapes, strict=True):
      inputs = on_inputs(shape)
      c = _rotation(p, q, inputs)
      first.append(_turned(c, m, inputs))
      second.append(_turned(c * c, v, inputs))
    return new, (first, second)

  return jax.lax.cond(due, switch, lambda: (old, moments))


def align(new: jax.Array, old: jax.Array, inputs: bool) -> jax.Array:
  """Basis vectors with the signs nearest to those of the old ones.

  A singular vector's sign is arbitrary; moments that are kept should not see
  it change.
  """
  axis = -2 if inputs else -1
  agreement = jnp.sum(new * old, axis=axis, keepdims=True)
  return jnp.where(agreement < 0, -new, new)
