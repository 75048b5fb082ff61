"""What the names of parameters say of their axes."""

from __future__ import annotations

import dataclasses
import re

# Components of a path that hold stacks: one axis before a kernel's own. A
# number behind one ("layers_0", "layers/0") makes it one of several instead.
_STACKS = re.compile(
  r"(^|_)(layers|blocks|stages|units|groups|cells|repeats|stack|stacks|stacked)$"
  r"|^h$|^(scan|vmap)|^layer_stack"
)
# Those that may be one module, as well as a stack of them.
_PERHAPS = re.compile(r"(^|_)(layer|block|stage|unit|group|cell|repeat|tower)$")
_EXPERTS = re.compile(r"experts?(_|$)|^moe")
# Kernels that are convolutions, or may be if their ranks are high enough.
_CONVOLUTIONS = re.compile(r"conv")
_STAGES = re.compile(r"^stages?_?\d*$|^(shortcut|downsample|stem)")
_ARRAYS = ("kernel", "weight", "w")


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kind of kernel whose fan-in or fan-out has more than one axis.

  Attributes:
    pattern: searched in the name of the module, or of the array where that
      names no module.
    ndim: of one, without a stack.
    inputs: its axes, counted from the last.
    outputs: the same. Axes that are on neither side count matrices.
    fused: whether the name tells more than the shape of a bias does.
  """

  pattern: str
  ndim: int
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  fused: bool = False


# The names of flax's own attention, of Gemma's einsums and of fused kernels
# [embed, 3, heads, head_dim], each of whose three is a matrix.
KERNELS = (
  Kernel(r"^attn_vec_einsum", 3, (-3, -2), (-1,), True),
  Kernel(r"^(kv|qkv)_einsum", 4, (-2,), (-3, -1), True),
  Kernel(r"^(q|k|v)_einsum", 3, (-2,), (-3, -1), True),
  Kernel(r"(^|_)(qkv|kv)(_|$)|^c_attn$", 4, (-4,), (-2, -1), True),
  Kernel(
    r"(^|_)(q|k|v|query|key|value|queries|keys|values|wq|wk|wv)(_|$)",
    3,
    (-3,),
    (-2, -1),
  ),
  Kernel(r"(^|_)(o|out|output|wo)(_|$)", 3, (-3, -2), (-1,)),
  Kernel(r"(dense|linear)general(_\d+)?$", 3, (-3,), (-2, -1)),
)


def parts(name: str) -> list[str]:
  """The components of a leaf's name, in lower case."""
  return name.lower().split("/")


def stacks(name: str) -> int:
  """How many leading axes of a leaf stack layers and experts, by its name."""
  found = parts(name)
  following = [*found[1:], ""]
  layers = sum(
    _STACKS.search(part) is not None and not after.isdecimal()
    for part, after in zip(found, following, strict=True)
  )
  return layers + any(
    _EXPERTS.search(part) and not after.isdecimal()
    for part, after in zip(found, following, strict=True)
  )


def kernel(name: str) -> Kernel | None:
  """The kind of kernel that a leaf's name speaks of."""
  found = parts(name)
  subject = found[-1]
  if len(found) > 1 and subject in _ARRAYS:
    subject = found[-2]
  return next((k for k in KERNELS if re.search(k.pattern, subject)), None)


def is_convolution(name: str, ndim: int) -> bool:
  """Whether a leaf is a kernel [spatial..., in, out], by its name."""
  found = parts(name)
  if any(_CONVOLUTIONS.search(part) for part in found):
    return True
  return ndim >= 4 and any(_STAGES.search(part) for part in found)


def is_explained(name: str, ndim: int) -> bool:
  """Whether a name says what the axes before a leaf's last two are.

  They stack layers or experts ("layers/up", "h/mlp/experts/up"), or are the
  taps of a convolution, each of which is a matrix.
  """
  more = ndim - 2 - stacks(name)
  if more > 0 and kernel(name) is None:
    found = parts(name)
    more -= any(_PERHAPS.search(part) for part in found)
  return more <= 0 or is_convolution(name, ndim)
