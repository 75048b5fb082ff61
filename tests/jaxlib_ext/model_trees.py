"""The parameters of public models: names, shapes and the right labels.

One line for each leaf of a layer, in the layout of the code that is named:
kernels [in, out] in flax, haiku and equinox-like code that says so, weights
[out, in] in PyTorch's. Labels: m(atrix), e(mbedding), h(ead), v(ector). A part
"#" stands for the index of a layer; `per_layer` writes two of them, `stacked`
one whose leaves have the layers as their first axis.
"""

from __future__ import annotations

from tests.jaxlib_ext import image_trees, language_trees

LABELS = {"m": "matrix", "e": "embedding", "h": "head", "v": "vector"}

TREES = {
  name.lower(): text
  for module in (language_trees, image_trees)
  for name, text in vars(module).items()
  if name.isupper()
}


def _leaves(text, rename, deepen):
  names, shapes, labels = [], [], []
  for line in text.strip().splitlines():
    name, sizes, label = line.split()
    shape = tuple(int(size) for size in sizes.split("x"))
    for given in rename(name):
      names.append(given)
      shapes.append(deepen(name, shape))
      labels.append(LABELS[label])
  return names, shapes, labels


def per_layer(text: str):
  """Names, shapes and labels of a tree with two layers of each kind."""

  def rename(name):
    return [name.replace("#", i) for i in "01"] if "#" in name else [name]

  return _leaves(text, rename, lambda name, shape: shape)


def stacked(text: str, depth: int):
  """The same where each layer's leaves are stacked along their first axis."""

  def rename(name):
    for index in ("/#", ".#", "_#"):
      name = name.replace(index, "")
    return [name]

  def deepen(name, shape):
    return (depth, *shape) if "#" in name else shape

  return _leaves(text, rename, deepen)
