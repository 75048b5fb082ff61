"""Momentum whose matrices are orthogonalised: what Muon's relatives share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels, paths
from optim import arguments, matrices, numerics
from optim.orthogonal import polar, schedules

# (d_in, d_out) -> factor on the polar factor.
SHAPE_SCALES: dict[str | None, Callable[[int, int], float]] = {
  "rms": lambda d_in, d_out: 0.2 * math.sqrt(max(d_in, d_out)),
  "keller": lambda d_in, d_out: math.sqrt(max(1.0, d_out / d_in)),
  "spectral": lambda d_in, d_out: math.sqrt(d_out / d_in),
  None: lambda d_in, d_out: 1.0,
}

# Of kernels [d_in, d_out], the axes that the norms are over.
_NORMALIZE = {None: (), "columns": (-2,), "rows": (-1,), "both": (-2, -1)}

# A dtype and not `jnp.bfloat16`, which is callable:
# `optax.inject_hyperparams` would take that for a schedule.
BFLOAT16 = jnp.dtype(jnp.bfloat16)

Matrices = list[list[jax.Array]]


class Orthogonalized(NamedTuple):
  """What one step's gradients became.

  Attributes:
    factors: per leaf, the polar factors [batch..., d_in, d_out] of its
      matrices, in at least float32, not scaled; as `matrices.split` gives.
    axes: per leaf, as `matrices.resolve` gives.
    grads: the gradients' leaves.
    treedef: of the gradients.
    momentum: the new average, in the dtypes of the old one.
    count: int32, the new number of updates.
  """

  factors: Matrices
  axes: list[matrices.MatrixAxes]
  grads: list[jax.Array]
  treedef: Any
  momentum: Any
  count: jax.Array

  def updates(self, parts: Matrices) -> Any:
    """Directions per leaf, split like `factors`, as a tree of updates."""
    leaves = [
      matrices.join(leaf, g.shape, axes).astype(g.dtype)
      for leaf, g, axes in zip(parts, self.grads, self.axes, strict=True)
    ]
    return self.treedef.unflatten(leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonalizer:
  """Momentum, the step ahead, equilibration, polar factors, shape scale.

  Fields other than `method`, the optimizer's name for messages, are the
  arguments of `scale_by_muon`.

  Raises:
    ValueError: a field out of its range.
  """

  method: str
  momentum: optax.ScalarOrSchedule
  nesterov: bool
  coefficients: polar.Coefficients
  ns_steps: int | None
  ns_dtype: Any
  ns_form: str | None
  shape_scale: str | None
  matrix_axes: matrices.Spec
  momentum_dtype: Any
  normalize: str | None = None

  def __post_init__(self):
    schedules.check(self.coefficients, self.ns_steps)
    for name, allowed in (
      ("shape_scale", SHAPE_SCALES),
      ("normalize", _NORMALIZE),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise ValueError(
          f"{name} must be one of {tuple(allowed)}, got {value!r}"
        )

  def init(self, params: Any) -> tuple[Any, jax.Array]:
    """The zero average and a count of 0."""
    self.resolve(params, warn=True)
    count = jnp.zeros([], jnp.int32)
    return numerics.zeros_like(params, self.momentum_dtype), count

  def resolve(
    self, params: Any, *, warn: bool = False
  ) -> list[matrices.MatrixAxes]:
    """`matrix_axes` per leaf that is not masked."""
    return matrices.resolve(self.matrix_axes, params, self.method, warn=warn)

  def scale(self, x: jax.Array) -> float:
    """The factor for polar factors [..., d_in, d_out]."""
    return SHAPE_SCALES[self.shape_scale](*x.shape[-2:])

  def __call__(
    self,
    updates: Any,
    momentum: Any,
    count: jax.Array,
    *,
    partitions: Sequence[tuple[Any, ...] | None],
    before: Callable[[jax.Array], jax.Array] = lambda x: x,
  ) -> Orthogonalized:
    """Averages the gradients and orthogonalises every matrix.

    Args:
      updates: the gradients.
      momentum: the average so far.
      count: int32, the updates so far.
      partitions: of the gradients' leaves, as `meshes.partitions` gives.
      before: elementwise, of what is to be orthogonalised.

    Returns:
      An `Orthogonalized`.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
    grads = [leaf for _, leaf in flat]
    back = [labels.leads_back(paths.leaf_name(path)) for path, _ in flat]
    axes = self.resolve(updates)
    averages, ahead = self._average(
      numerics.widen(grads), treedef.flatten_up_to(momentum), count
    )
    parts = [
      matrices.split(before(x), a) for x, a in zip(ahead, axes, strict=True)
    ]
    over = _NORMALIZE[self.normalize]
    factors = iter(
      polar.newton_schulz_list(
        [_equilibrate(x, over) for leaf in parts for x in leaf],
        back=[b for b, leaf in zip(back, parts, strict=True) for _ in leaf],
        partitions=[
          matrices.sides(partition, a)
          for partition, a, leaf in zip(partitions, axes, parts, strict=True)
          for _ in leaf
        ],
        coefficients=self.coefficients,
        steps=self.ns_steps,
        dtype=self.ns_dtype,
        form=self.ns_form,
      )
    )
    return Orthogonalized(
      [[next(factors).astype(x.dtype) for x in leaf] for leaf in parts],
      axes,
      grads,
      treedef,
      numerics.cast_like(treedef.unflatten(averages), momentum),
      optax.safe_increment(count),
    )

  def _average(self, grads, moments, count):
    """The new averages and, with Nesterov, the averages one step ahead."""
    rate = arguments.value_at(self.momentum, count)

    def mix(m, g):
      beta = rate
      if not isinstance(rate, int | float):
        # A schedule's dtype may be wider than the state's.
        beta = jnp.asarray(rate, g.dtype)
      return beta * m.astype(g.dtype) + (1 - beta) * g

    averages = list(map(mix, moments, grads))
    ahead = list(map(mix, averages, grads)) if self.nesterov else averages
    return averages, ahead


def _equilibrate(x: jax.Array, over: Sequence[int]) -> jax.Array:
  """Divides matrices by their norms over each of the axes, taken of x itself.

  A line of zeros stays zero.
  """
  if not over:
    return x
  tiny = jnp.finfo(x.dtype).tiny
  x, _ = numerics.in_range(x, (-2, -1))
  norms = [jnp.sum(x * x, axis=axis, keepdims=True) for axis in over]
  for square in norms:
    x = x * jax.lax.rsqrt(jnp.maximum(square, tiny))
  return x
