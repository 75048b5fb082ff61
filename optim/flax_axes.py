"""The matrix axes of flax's kernels, from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxlib_ext import axis_names, labels, matrices, paths

_BIASES = ("bias", "b")

Shape = tuple[int, ...]


def flax_matrix_axes(params: Any) -> Any:
  """Gives the fan-in and fan-out of kernels with several axes, for flax.

  For `matrix_axes=` of the optimizers and of `quantization.quantize_tree`:
  this function itself, or its result for the parameters. By names and shapes,
  for linen and nnx alike:

  - attention: "query", "key" and "value" (or "q_proj", "wq" and the like)
    [embed, heads, head_dim] lead from the first axis to the other two, "out"
    [heads, head_dim, embed] from the first two to the last; of a fused "qkv"
    [embed, 3, heads, head_dim] each of the three is a matrix;
  - `DenseGeneral`, `LinearGeneral`: the outputs are the axes of the bias
    beside the kernel. Without one, only the names above and flax's own
    ("DenseGeneral_0", with one input axis, flax's default) tell;
  - convolutions ("conv" in the name, or told by the bias) [spatial..., in,
    out]: from all axes but the last;
  - "q_einsum", "kv_einsum" and "attn_vec_einsum" with the axes of Gemma's.
    Of other `nn.Einsum` kernels nothing is known.

  Before these may lie axes that stack layers or experts, if they lead: one for
  each name such as "layers", "h", "experts" or "ScanBlock_0", and one more
  where the rank of an attention kernel shows it. A stack along another axis
  (`nn.scan` with `variable_axes={"params": 1}`) needs axes of its own.

  A factory that is given this function calls it for its matrices alone, so no
  bias is seen; `flax_matrix_axes(params)` sees all.

  Args:
    params: a pytree of arrays or abstract values, such as linen's variables
      or an `nnx.State`; masked leaves stay masked.

  Returns:
    A pytree like `params` with a `MatrixAxes` for each leaf that has such
    axes, and None, the last two, for all others.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=labels.is_param
  )
  biases = {}
  for path, leaf in flat:
    *module, name = axis_names.parts(paths.leaf_name(path))
    if name in _BIASES:
      biases[tuple(module)] = tuple(leaf.shape)

  def axes(path, leaf):
    return _axes(paths.leaf_name(path), tuple(leaf.shape), biases)

  return jax.tree_util.tree_map_with_path(axes, params, is_leaf=labels.is_param)


def _axes(
  name: str, shape: Shape, biases: Mapping[tuple[str, ...], Shape]
) -> matrices.MatrixAxes | None:
  ndim = len(shape)
  *module, last = axis_names.parts(name)
  if ndim < 3 or last in _BIASES:
    return None
  kind = axis_names.kernel(name)
  bias = biases.get(tuple(module))
  stacks = axis_names.stacks(name)
  if bias is not None and not (kind and kind.fused):
    outputs = _outputs(shape, bias, stacks)
    if outputs:
      return _sides(ndim - outputs[1], outputs[0])
  if axis_names.is_convolution(name, ndim):
    return _sides(ndim - stacks, 1)
  if kind is not None and 0 <= ndim - kind.ndim - stacks <= 1:
    return matrices.MatrixAxes(_one(kind.inputs), _one(kind.outputs))
  return None


def _outputs(shape: Shape, bias: Shape, stacks: int) -> tuple[int, int] | None:
  """How many axes are outputs, and how many stack; None if it does not fit."""
  for leading in (stacks, 0, 1, 2):
    outputs = len(bias) - leading
    if (
      outputs > 0
      and leading + outputs < len(shape)
      and shape[:leading] == bias[:leading]
      and shape[-outputs:] == bias[leading:]
    ):
      return outputs, leading
  return None


def _sides(ndim: int, outputs: int) -> matrices.MatrixAxes | None:
  """The last `outputs` of the last `ndim` axes, and those before them."""
  if ndim < 3:
    return None
  return matrices.MatrixAxes(
    _one(range(-ndim, -outputs)), _one(range(-outputs, 0))
  )


def _one(axes: Sequence[int]) -> matrices.Axis:
  return axes[0] if len(axes) == 1 else tuple(axes)
