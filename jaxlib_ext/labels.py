"""Which role each parameter plays: the one place that decides it.

Matrix optimizers must not see embeddings, heads or (stacked) norm gains as
hidden matrices, and a rank of two alone cannot tell them apart: an embedding
is 2-D, a scan-stacked norm is 2-D, a scan-stacked kernel is 3-D. Names can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlib_ext import paths, trees

LABELS = ("matrix", "embedding", "head", "vector")

# Searched in order in the leaf's name ("layers/attn_norm/scale"), after the
# rank: anything of fewer than two dimensions is a "vector", whatever its name.
# The gates of linear attention are a rate or bias per head ("a_log",
# "dt_bias") and its depthwise convolutions ("q_conv1d") a few taps for each
# channel: stacked by layer they have two and three dimensions, but no
# direction of theirs is a singular one.
DEFAULT_RULES = (
  (r"_log$|(^|[/_.])(d_skip$|conv1d([/.]|$))", "vector"),
  (r"(^|[/_.])(norm|layernorm|rmsnorm|ln|scale|bias|gain|gamma|beta)"
   r"(_?\w{0,2})([/.]|$)", "vector"),
  (r"(^|/)(lm_head|head|unembed(ding)?|logits|output_head)(/|$)", "head"),
  (r"(^|/)[a-z_]*(embed(ding|dings|der)?(_tokens)?|wte|wpe)(/|$)",
   "embedding"),
  (r"", "matrix"),
)  # fmt: skip

# Names of kernels that lead from heads or hidden units back to the width.
_BACK = r"(^|[/_.])(o|wo|out|output|down|c_proj)([/_.]|$)"

Labels = Any | Callable[[Any], Any] | None


def leads_back(name: str) -> bool:
  """Whether a kernel so named, as "layers/attn/o", writes the model's width.

  Its rows are then divided as the columns of "q" or "up" are, which a square
  one's shape does not tell.
  """
  return re.search(_BACK, name.lower()) is not None


def is_param(x: Any) -> bool:
  """Whether `x` counts as one parameter though it is itself a pytree.

  Its class says so, as that of `QTensor` does: a `nnx.Param` forwards
  questions about its attributes to the value it holds, which may be anything.
  """
  return hasattr(type(x), "dequantize") and hasattr(x, "shape")


def label_params(
  params: Any, rules: Sequence[tuple[str, str]] | None = None
) -> Any:
  """Labels each parameter "matrix", "embedding", "head" or "vector".

  Args:
    params: pytree of arrays, abstract values or `QTensor`s (one label each).
    rules: `(regular expression, label)` pairs searched in the leaf's name
      (`"layers/attn/q"`) before the default ones, which label leaves of rank
      0 and 1 and names that speak of norms, gains, biases, log rates and
      depthwise convolutions "vector", names of an output head "head", names
      of an embedding "embedding" and everything else "matrix".

  Returns:
    A pytree like `params` with one label per parameter.

  Raises:
    ValueError: a rule gives a label that is not one of the four.
  """
  own = tuple(rules or ())
  for pattern, label in own:
    if label not in LABELS:
      raise ValueError(
        f"rules: {pattern!r} gives the label {label!r}; allowed: {LABELS}"
      )

  def label(path, leaf):
    name = paths.leaf_name(path)
    for pattern, value in own:
      if re.search(pattern, name):
        return value
    if len(leaf.shape) < 2:
      return "vector"
    for pattern, value in DEFAULT_RULES:
      if re.search(pattern, name.lower()):
        return value
    raise AssertionError("the last default rule matches every name")

  return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_param)


def resolve(labels: Labels, params: Any) -> Any:
  """Turns a factory's `labels=` argument into a checked pytree of labels.

  Args:
    labels: None (`label_params`), a callable of the parameters, or a pytree
      of labels; a prefix of the parameters' tree labels whole subtrees.
    params: the parameters.

  Returns:
    A pytree like `params` with one label per parameter.

  Raises:
    ValueError: the tree does not fit, or holds an unknown label.
  """
  if labels is None:
    return label_params(params)
  tree = trees.given(labels, params)
  full = trees.spread("labels", tree, params, is_param=is_param)
  for label in jax.tree.leaves(full):
    if label not in LABELS:
      raise ValueError(f"labels: got {label!r}; allowed: {LABELS}")
  return full
