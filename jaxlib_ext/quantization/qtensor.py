"""Quantized arrays as pytrees."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import matrices, meshes, sharding, trees
from jaxlib_ext.quantization import formats, rounding
from jaxlib_ext.quantization import scales as scales_lib

Format = formats.Format


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codes", "scales", "matrix_scale"),
  meta_fields=("format", "matrix_axes"),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
  """An array as small codes and the scales of groups of them.

  Groups lie along axis -2, the contraction axis of a kernel [..., in, out]
  (along the only axis of a vector), or along the merged fan-in of
  `matrix_axes`. All other axes are a batch; leading ones, as of a stack of
  layers, can be sliced, scanned and vmapped.

  Attributes:
    codes: [..., in, out] in `format.dtype`.
    scales: [..., ceil(in / block), out], or [..., 1, out] without a block;
      float32, float8_e8m0fnu or float8_e4m3fn. With several axes of the
      fan-in, groups are counted by the first and the others have size 1.
    matrix_scale: float32 [..., 1, 1] for nvfp4, otherwise None.
    format: static.
    matrix_axes: static; negative axes, or None for the last two.
  """

  codes: jax.Array
  scales: jax.Array
  matrix_scale: jax.Array | None
  format: Format
  matrix_axes: matrices.MatrixAxes | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.codes.shape)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def dtype(self) -> Any:
    """What `dequantize` gives by default: float32."""
    return jnp.dtype(jnp.float32)

  @property
  def nbytes_packed(self) -> int:
    """Bytes of the codes and scales at their true widths in bits."""
    bits = self.size * self.format.bits
    bits += math.prod(self.scales.shape) * self.format.scale_bits
    if self.matrix_scale is not None:
      bits += math.prod(self.matrix_scale.shape) * 32
    return -(-bits // 8)

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """codes · scales, exact in float32, then cast to `dtype`."""
    run = functools.partial(_dequantize, dtype=dtype)
    where = PartitionSpec(*meshes.spec(self.codes))
    return meshes.run_automatic(run, self, out_specs=where)


def is_qtensor(x: Any) -> bool:
  """Whether `x` is a `QTensor`: the `is_leaf` of a tree of parameters."""
  return isinstance(x, QTensor)


def _axis(shape: tuple[int, ...]) -> int:
  return len(shape) - min(2, len(shape))


def _dequantize(q: QTensor, dtype: Any) -> jax.Array:
  scales = q.scales.astype(jnp.float32)
  if q.matrix_scale is not None:
    scales = scales * q.matrix_scale
  values = rounding.decode(q.codes, q.format)
  if q.matrix_axes is None or q.format.block is None:
    return (values * _expand(scales, q.shape, q.format)).astype(dtype)
  axes = matrices.check("codes", q.shape, q.matrix_axes)
  (groups,) = matrices.split(scales, axes)
  size = math.prod(q.shape[axis] for axis in axes.inputs)
  shape = (*groups.shape[:-2], size, groups.shape[-1])
  wide = matrices.join([_expand(groups, shape, q.format)], q.shape, axes)
  return (values * wide).astype(dtype)


def _max_magnitude(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
  """max |x| along axes that are kept, NaN or infinite where one element is.

  The bits of magnitudes order as integers do, NaNs last; a maximum of floats
  loses NaNs in some of XLA's CPU reductions (jax 0.10.2 and 0.12.0).
  """
  bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  bits = jnp.max(bits, axis=axis, keepdims=True, initial=0)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _block(length: int, fmt: Format) -> int:
  """The elements of a group; no more than there are, though the name says so.

  One group holds all of an axis that is shorter than a block. Padding it to
  the block would take memory for nothing.
  """
  return min(fmt.block, max(length, 1))


def _group_max(x: jax.Array, fmt: Format) -> jax.Array:
  """The largest magnitude of each group: x's shape -> the scales' shape."""
  axis = _axis(x.shape)
  if fmt.block is None:
    return _max_magnitude(x, axis)
  length = x.shape[axis]
  block = _block(length, fmt)
  groups = -(-length // block)
  if groups * block != length:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, groups * block - length)
    x = jnp.pad(x, pad)
  shape = x.shape[:axis] + (groups, block) + x.shape[axis + 1 :]
  return jnp.squeeze(_max_magnitude(x.reshape(shape), axis + 1), axis + 1)


def _expand(
  scales: jax.Array, shape: tuple[int, ...], fmt: Format
) -> jax.Array:
  """Repeats each group's scale over its elements: something of `shape`."""
  if fmt.block is None:
    return scales
  axis = _axis(shape)
  groups, block = scales.shape[axis], _block(shape[axis], fmt)
  wide = scales.shape[: axis + 1] + (block,) + scales.shape[axis + 1 :]
  x = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), wide)
  flat = shape[:axis] + (groups * block,) + shape[axis + 1 :]
  return jax.lax.slice_in_dim(x.reshape(flat), 0, shape[axis], axis=axis)


def quantize(
  x: jax.Array | QTensor,
  fmt: Format | str,
  *,
  key: jax.Array | None = None,
  matrix_axes: matrices.MatrixAxes | tuple[Any, Any] | None = None,
) -> QTensor:
  """Rounds an array to codes and scales.

  Idempotent: quantizing what was dequantized gives the same codes and scales
  bit for bit, rounding to nearest or at random. A group's largest magnitude
  becomes the format's (under a power-of-two scale it need not), so nothing is
  clipped but by the rounding of the scales, and finite values stay finite:
  what would round beyond float32 (above 2.5e38 in "mxfp4", 3.2e38 in "mxfp8")
  goes to the largest value that does not.

  To nearest, an element is off by at most half a step of the grid times the
  scale, at random by less than one step. No step is finer than 2^-126, the
  least positive number that is not subnormal: groups that are so small that
  one would be (below 1.5e-36 for "int8", always below 1e-35) share a least
  scale. Subnormal elements are rounded like others, on every backend.

  A value that is not finite shows: its group dequantizes to NaN, for "nvfp4"
  its matrix; for "mxfp8" and "mxfp4" the value to infinity and the rest of
  its group to zero.

  Args:
    x: floating [..., in, out] or [n], rounded to float32 first (float64 beyond
      that is infinite), or a `QTensor`, which is dequantized.
    fmt: a `Format`, or the name of one.
    key: a PRNG key for stochastic rounding, unbiased and with a random number
      of its own for each element; the largest magnitude of a group, which
      fixes the scale, goes to the nearest code for "nvfp4". None rounds to
      nearest, ties to even.
    matrix_axes: a `MatrixAxes` or a tuple `(in_axes, out_axes)`: the axes
      that are merged to `in` and to `out`, so that (0, (1, 2)) gives a kernel
      (embed, heads, head_dim) the scales of one (embed, heads * head_dim).
      All others are a batch; blocks are not taken apart. None for those of a
      `QTensor`, or the last two.

  Returns:
    A `QTensor` of x's shape. Under a mesh with explicit axes the codes are
    divided like x, and the scales as far as their sizes allow.

  Raises:
    ValueError: the format's name is unknown, x is not a floating array of at
      least one dimension, or `matrix_axes` that it does not have.
  """
  fmt = Format.parse(fmt) if not isinstance(fmt, Format) else fmt
  if is_qtensor(x):
    matrix_axes = x.matrix_axes if matrix_axes is None else matrix_axes
    x = x.dequantize()
  x = jnp.asarray(x)
  if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      "x must be a floating array of at least one dimension, got "
      f"{x.dtype}{list(x.shape)}"
    )
  axes = None
  if matrix_axes is not None:
    axes = matrices.check("x", x.shape, matrix_axes)
    axes = axes if matrices.from_last(axes, x.ndim) is not None else None
  run = functools.partial(_quantize, fmt=fmt, axes=axes)
  mesh = meshes.explicit_mesh(x)
  if mesh is None:
    return run(x, key)
  where = NamedSharding(mesh, PartitionSpec(*meshes.spec(x)))
  out_specs = jax.tree.map(
    lambda a: sharding.fit(where, a.shape, x.shape).spec,
    jax.eval_shape(run, jax.ShapeDtypeStruct(x.shape, x.dtype), key),
  )
  return meshes.run_automatic(run, x, key, out_specs=out_specs)


def _quantize(
  x: jax.Array,
  key: jax.Array | None,
  fmt: Format,
  axes: matrices.MatrixAxes | None = None,
) -> QTensor:
  if axes is not None:
    return _quantize_merged(x, key, fmt, axes)
  x = _to_float32(x)
  noise = None if key is None else rounding.uniform(key, x.shape)
  if fmt.scale == "e8m0":
    return _quantize_mx(x, fmt, noise)
  if fmt.scale == "e4m3":
    return _quantize_nvfp4(x, fmt, noise)
  absmax = _group_max(x, fmt)
  least = 2.0 ** scales_lib.least_exponent(fmt)
  scales = scales_lib.float32_scale(absmax, fmt.max, least)
  values = _to_codes(x, scales, fmt, noise)
  return QTensor(rounding.encode(values, fmt), scales, None, fmt)


def _quantize_merged(
  x: jax.Array,
  key: jax.Array | None,
  fmt: Format,
  axes: matrices.MatrixAxes,
) -> QTensor:
  """Quantizes [batch..., in, out] and gives all parts the axes of x."""
  axes = axes._replace(input_blocks=1, output_blocks=1)
  (matrix,) = matrices.split(x, axes)
  q = _quantize(matrix, key, fmt)
  first, *others = axes.inputs

  def join(part, sizes):
    shape = [sizes.get(axis, n) for axis, n in enumerate(x.shape)]
    return matrices.join([part], shape, axes)

  scales = {**dict.fromkeys(others, 1), first: q.scales.shape[-2]}
  whole = dict.fromkeys(axes.inputs + axes.outputs, 1)
  return QTensor(
    join(q.codes, {}),
    join(q.scales, scales),
    None if q.matrix_scale is None else join(q.matrix_scale, whole),
    fmt,
    matrices.from_last(axes, x.ndim),
  )


def _to_float32(x: jax.Array) -> jax.Array:
  """Rounds to float32 without flushing what is subnormal there."""
  if x.dtype != jnp.float64:
    return x.astype(jnp.float32)
  bits = jnp.round(jnp.minimum(jnp.abs(x), 2.0**-126) * 2.0**149)
  small = jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)
  return jnp.where(
    jnp.abs(x) < 2.0**-126,
    jnp.where(x < 0, -small, small),
    x.astype(jnp.float32),
  )


def _to_codes(
  x: jax.Array, scales: jax.Array, fmt: Format, noise: jax.Array | None
) -> jax.Array:
  """x over the scales of its groups, rounded to the format's values."""
  by = [_expand(a, x.shape, fmt) for a in rounding.divisor(scales)]
  return rounding.to_grid(x, fmt, noise, rounding.Divisor(*by))


def _quantize_mx(x: jax.Array, fmt: Format, noise: jax.Array | None) -> QTensor:
  # The grid's next value up from this would be 2^128.
  top = np.float32(2.0**127 * (2 - 2.0**-fmt.mantissa_bits))
  over = (jnp.abs(x) > top) & jnp.isfinite(x)
  x = jnp.where(over, jnp.sign(x) * top, x)
  absmax = _group_max(x, fmt)
  exponent = scales_lib.e8m0_exponent(absmax, fmt)
  scales = rounding.power_of_two(exponent)
  # A group whose largest code came out as half the largest possible one, or
  # less, would be given half the scale next time, so it is given that now:
  # before rounding if it is certain to come out so, otherwise by writing the
  # same numbers with twice the codes.
  movable = exponent > scales_lib.least_exponent(fmt)
  if noise is None:
    peak = rounding.to_grid(absmax, fmt, None, rounding.divisor(scales))
    scales = jnp.where(movable & (peak <= fmt.max / 2), scales / 2, scales)
  values = _to_codes(x, scales, fmt, noise)
  if noise is not None:
    halve = movable & (_group_max(values, fmt) <= fmt.max / 2)
    values = values * _expand(jnp.where(halve, 2.0, 1.0), x.shape, fmt)
    scales = jnp.where(halve, scales / 2, scales)
  codes = rounding.encode(values, fmt)
  return QTensor(codes, scales.astype(jnp.float8_e8m0fnu), None, fmt)


def _quantize_nvfp4(
  x: jax.Array, fmt: Format, noise: jax.Array | None
) -> QTensor:
  absmax = _group_max(x, fmt)
  axes = tuple(range(_axis(x.shape), x.ndim))
  whole = _max_magnitude(absmax, axes)
  matrix_scale = scales_lib.nvfp4_matrix_scale(whole, fmt)
  scales, free = scales_lib.nvfp4_scale(absmax, matrix_scale, fmt.max)
  values = _to_codes(x, scales * matrix_scale, fmt, noise)
  peak = _expand(jnp.where(free, absmax, jnp.nan), x.shape, fmt)
  values = jnp.where(jnp.abs(x) >= peak, jnp.sign(x) * fmt.max, values)
  return QTensor(
    rounding.encode(values, fmt),
    scales.astype(jnp.float8_e4m3fn),
    matrix_scale,
    fmt,
  )


def quantize_tree(
  params: Any,
  fmt: Format | str,
  *,
  labels: labels_lib.Labels = None,
  key: jax.Array | None = None,
  matrix_axes: matrices.Spec = None,
) -> Any:
  """Quantizes the parameters labelled "matrix".

  Args:
    params: pytree of arrays.
    fmt: as for `quantize`.
    labels: as for `jaxlib_ext.labels.resolve`.
    key: None, or a PRNG key that each leaf folds its own position into.
    matrix_axes: None, or a pytree like `params`, a prefix of it or a function
      of it giving one, such as `optim.flax_matrix_axes`: what `quantize` takes
      for each, and None for the last two axes.

  Returns:
    A pytree like `params` with `QTensor`s among its leaves.

  Raises:
    ValueError: as `quantize`; labels or `matrix_axes` that do not fit.
  """
  fmt = Format.parse(fmt) if not isinstance(fmt, Format) else fmt
  roles = jax.tree.leaves(labels_lib.resolve(labels, params))
  leaves, treedef = jax.tree.flatten(params, is_leaf=is_qtensor)
  chosen = [
    role == "matrix" and len(leaf.shape) >= 2
    for leaf, role in zip(leaves, roles, strict=True)
  ]
  matrix_leaves = treedef.unflatten(
    [leaf if c else None for leaf, c in zip(leaves, chosen, strict=True)]
  )
  axes = iter(
    matrices.resolve(
      trees.given(matrix_axes, params),
      matrix_leaves,
      "quantize_tree",
      warn=True,
    )
  )
  out = []
  for i, (leaf, role) in enumerate(zip(leaves, roles, strict=True)):
    if role == "matrix":
      leaf_key = None if key is None else jax.random.fold_in(key, i)
      leaf_axes = next(axes) if chosen[i] else None
      leaf = quantize(leaf, fmt, key=leaf_key, matrix_axes=leaf_axes)
    out.append(leaf)
  return treedef.unflatten(out)


def dequantize_tree(tree: Any, dtype: Any = jnp.float32) -> Any:
  """Dequantizes the `QTensor`s of a pytree; leaves the others as they are."""
  return jax.tree.map(
    lambda x: x.dequantize(dtype) if is_qtensor(x) else x,
    tree,
    is_leaf=is_qtensor,
  )
