"""Roles of parameters from the names and shapes of a whole tree.

A leaf's own name, the layer it belongs to, what stands beside it and which
sizes occur elsewhere are looked at in this order; the first that says
something decides.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxlib_ext import label_words

Shape = tuple[int, ...]


class Verdict(NamedTuple):
  """What a leaf is taken for.

  Attributes:
    label: "matrix", "embedding", "head" or "vector".
    why: the evidence, in a few words.
    doubt: what speaks against it, or an empty string.
  """

  label: str
  why: str
  doubt: str = ""


@functools.lru_cache(maxsize=256)
def judge(
  names: tuple[str, ...], shapes: tuple[Shape, ...]
) -> tuple[Verdict, ...]:
  """Says of every leaf of a tree what it is taken for.

  Args:
    names: of the leaves, their parts separated by slashes or dots.
    shapes: of the leaves.
  """
  tree = _Tree(label_words.parse(names, shapes))
  return tuple(tree.verdicts())


class _Tree:
  """The leaves of one tree, and what they say about each other."""

  def __init__(self, leaves: Sequence[label_words.Leaf]):
    self.leaves = leaves
    self.beside = collections.defaultdict(dict)
    self.sizes = collections.Counter()
    for leaf in leaves:
      self.beside[leaf.text[:-1]][leaf.text[-1].lower()] = leaf.shape
      if len(leaf.shape) > 1:
        self.sizes.update(set(leaf.shape))
    self.stacks = _stacks(leaves)
    self.root = os.path.commonprefix(
      [leaf.text for leaf in leaves if len(leaf.shape) > 1]
    )
    # More than the layers of one block.
    self.is_deep = any(
      label_words.is_inner(leaf.parts[len(self.root) : -1]) for leaf in leaves
    )
    self.vocabularies: dict[frozenset[int], tuple[str, int]] = {}

  def verdicts(self) -> list[Verdict]:
    found: list[Verdict | None] = [self._vector(leaf) for leaf in self.leaves]
    for judge_them in (self._embeddings, self._heads, self._last, self._rest):
      judge_them(found)
    return found

  def _vector(self, leaf: label_words.Leaf) -> Verdict | None:
    shape, own = leaf.shape, leaf.own
    if len(shape) < 2:
      return Verdict("vector", "fewer than two dimensions")
    at = leaf.module()
    module = leaf.parts[at] if at >= 0 else ("",)
    above = leaf.parts[leaf.before(at)] if leaf.before(at) >= 0 else ("",)
    kernel, bare = own == ("kernel",), at == len(leaf.parts) - 1
    if label_words.is_vector(own):
      return Verdict("vector", f"its name, {leaf.text[-1]!r}")
    if label_words.is_norm(module):
      return Verdict("vector", f"of a norm, {leaf.text[at]!r}")
    if at >= 0 and not kernel and label_words.is_vector(module):
      return Verdict("vector", f"its name, {leaf.text[at]!r}")
    if label_words.is_norm(above) and bare and len(own[0]) < 3:
      return Verdict("vector", f"of a norm, {leaf.text[leaf.before(at)]!r}")
    if label_words.is_vector(above) and label_words.embeds(module):
      return Verdict("vector", f"a table of {leaf.text[leaf.before(at)]!r}")
    if label_words.is_conv1d(module) and _few_taps(shape):
      return Verdict("vector", "taps for each channel by its name and shape")
    if label_words.is_depthwise(module) and 1 in shape:
      return Verdict("vector", "taps for each channel by its name and shape")
    if own == ("d",) and "a_log" in self.beside[leaf.text[:-1]]:
      return Verdict("vector", "the skip beside 'A_log'")
    return self._vector_by_shape(leaf)

  def _vector_by_shape(self, leaf: label_words.Leaf) -> Verdict | None:
    shape = leaf.shape
    prefix = next((p for p in self.stacks if leaf.text[: len(p)] == p), None)
    if prefix is not None and len(shape) == 2:
      where = "/".join(prefix)
      return Verdict(
        "vector", f"one for each of the {shape[0]} layers stacked in {where!r}"
      )
    if not leaf.is_generic and len(shape) > 2:
      inner = shape[1:-1]
      if all(size == 1 for size in shape[:-1]) or (
        len(inner) > 1 and all(size == 1 for size in inner)
      ):
        return Verdict("vector", "all its dimensions but the last are 1")
    partner = self._partner(leaf)
    if partner is not None:
      return Verdict("vector", f"the bias of {partner!r} beside it")
    return None

  def _partner(self, leaf: label_words.Leaf) -> str | None:
    """The name of the kernel whose bias or gain a leaf is."""
    name, shape = leaf.text[-1].lower(), leaf.shape
    beside = self.beside[leaf.text[:-1]]
    for partner in ("w", "kernel", "weight"):
      # All but one side of each matrix of a layer's kernel.
      other = beside.get(partner, ())
      reduced = (other[:-1], other[:-2] + other[-1:])
      if len(other) > 2 and shape in reduced and "lora" not in leaf.own:
        return partner
    if not label_words.is_short_bias(name):
      return None
    rest = name[1:]
    exact = [f"{stem}{rest}" for stem in ("w", "kernel", "weight")]
    exact += ["w", "kernel", "weight"] if not rest else []
    for partner in exact:
      other = beside.get(partner, ())
      broadcast = other and 1 in shape and 1 not in other
      if len(other) > len(shape) or broadcast:
        return partner
    above = leaf.text[:-1]
    for other in self.leaves:
      deep = len(other.text) > len(leaf.text) and not above
      if other.text[: len(above)] == above and not deep:
        if (len(other.shape), *other.shape[:1]) == (len(shape) + 1, shape[0]):
          return "/".join(other.text[len(above) :])
    return None

  def _embeddings(self, found) -> None:
    for i, leaf in enumerate(self.leaves):
      if found[i] is None:
        found[i] = self._embedding(leaf)
      if found[i] is None or found[i].label != "embedding":
        continue
      rows, width = leaf.shape[-2:]
      tokens = not any(map(label_words.is_positional, leaf.parts))
      if len(leaf.shape) == 2 and rows != width and tokens:
        self.vocabularies[frozenset((rows, width))] = (
          "/".join(leaf.text),
          rows,
        )

  def _embedding(self, leaf: label_words.Leaf) -> Verdict | None:
    at = leaf.module()
    if at < 0:
      return None
    part, text = leaf.parts[at], leaf.text[at]
    kind = label_words.embeds(part)
    if part == ("shared",) and leaf.is_outer(at) and leaf.own != ("kernel",):
      kind = "table"
    if kind in (None, "head", "linear"):
      return None
    bare, depth = at == len(leaf.parts) - 1, len(leaf.parts) - 1 - at
    if depth > 2:
      return Verdict("matrix", f"inside the layers of {text!r}")
    if leaf.is_generic and {"b", "bias"} & set(self.beside[leaf.text[:-1]]):
      return Verdict("matrix", "a kernel with a bias is no table")
    named_table = bare and part in (("embedding",), ("embeddings",)) and at > 0
    if kind == "position" or named_table:
      if leaf.own != ("kernel",):
        return Verdict("embedding", f"its name, {text!r}")
    if kind == "picture" and bare and part[0] != "x":
      return Verdict("embedding", f"its name, {text!r}")
    if kind in ("picture", "signal"):
      if bare and len(leaf.shape) > 2 and leaf.shape[0] == 1:
        return Verdict("embedding", f"its name, {text!r}")
      return Verdict("matrix", f"{text!r} multiplies what it embeds")
    if leaf.own == ("kernel",):
      doubt = f"{text!r} is a name of embeddings"
      return Verdict(
        "matrix",
        "a kernel multiplies what it embeds",
        doubt if len(leaf.shape) == 2 and leaf.is_outer(at) else "",
      )
    return Verdict("embedding", f"its name, {text!r}")

  def _heads(self, found) -> None:
    groups = collections.defaultdict(list)
    for i, leaf in enumerate(self.leaves):
      if found[i] is not None:
        continue
      prefix = self._head_prefix(leaf)
      if prefix is not None:
        groups[prefix].append(i)
    for prefix, members in groups.items():
      last = self._last_of(members)
      for i in members:
        if i in last:
          found[i] = Verdict("head", f"its name, {prefix[-1]!r}")
        else:
          found[i] = Verdict(
            "matrix", f"before the last layer of {prefix[-1]!r}"
          )

  def _head_prefix(self, leaf: label_words.Leaf) -> tuple[str, ...] | None:
    """The layer that makes a leaf a head's, by its name alone."""
    at = leaf.module()
    if at < 0:
      return None
    part, above = leaf.parts[at], leaf.before(at)

    def answers(i):
      if i < 0 or (i and label_words.is_attention(leaf.parts[i - 1])):
        return False
      part = leaf.parts[i]
      return label_words.is_head(part) or label_words.embeds(part) == "head"

    if answers(at):
      outer = above if answers(above) else at
      return leaf.text[: outer + 1]
    plain = label_words.is_plain(part) or (
      at == len(leaf.parts) - 2 and above < 0
    )
    if not plain or above < 0:
      return None
    if answers(above):
      return leaf.text[: above + 1]
    if leaf.parts[above] in (("predictions",), ("generator",)):
      direct = "transform" not in part and above + 1 == at
      return leaf.text[: above + 1] if direct else None
    return None

  def _last_of(self, members: Sequence[int]) -> set[int]:
    """Which of the matrices in a head give the answer itself."""
    leaves = {i: self.leaves[i] for i in members}
    if len({leaf.shape for leaf in leaves.values()}) == 1:
      return set(members)
    known = {i for i in members if self._vocabulary(leaves[i])}
    known = known or {
      i
      for i, leaf in leaves.items()
      if label_words.is_last(leaf.parts[leaf.module()])
    }
    if known:
      return known
    open_ = {i for i in members if leaves[i].shape[-1] != leaves[i].shape[-2]}
    for axis in (-1, -2):
      if len({leaves[i].shape[axis] for i in open_}) == 1:
        return open_
    return {max(members, key=lambda i: _order(leaves[i].text))}

  def _vocabulary(self, leaf: label_words.Leaf) -> tuple[str, int] | None:
    """The embedding whose rows and width are the leaf's sides, and its rows."""
    if len(leaf.shape) != 2:
      return None
    return self.vocabularies.get(frozenset(leaf.shape))

  def _last(self, found) -> None:
    """Last layers without a head's name, where nothing else is a head."""
    heads = [i for i, v in enumerate(found) if v is not None and v[0] == "head"]
    if any(self._vocabulary(self.leaves[i]) for i in heads):
      return
    if heads and not self.vocabularies:
      return
    chains = collections.defaultdict(list)
    for i, leaf in enumerate(self.leaves):
      at = leaf.module()
      if found[i] is not None or at < 0 or len(leaf.shape) != 2:
        continue
      part, above = leaf.parts[at], leaf.before(at)
      plain, named = label_words.is_plain(part), label_words.is_last(part)
      if plain and above >= 0 and label_words.is_last(leaf.parts[above]):
        at, named = above, True
      if (plain or named) and leaf.is_outer(at):
        stem, number = label_words.numbered(part)
        chain = chains[leaf.text[:at], leaf.text[at] if named else stem]
        chain.append((number, i, at, named))
    for _, i, at, named in map(max, chains.values()):
      why = self._ends(self.leaves[i], at, named)
      if not why:
        continue
      found[i] = Verdict("head", why)
      for j in heads:  # Called a head, but it only leads to this one.
        if len(set(self.leaves[j].shape[-2:])) == 1:
          found[j] = Verdict("matrix", f"before {self._name(i)!r}")

  def _name(self, i: int) -> str:
    return "/".join(self.leaves[i].text)

  def _ends(self, leaf: label_words.Leaf, at: int, named: bool) -> str:
    """The evidence that a plain layer is the last one, or an empty string."""
    # PyTorch's "weight" has the outputs first.
    outputs = leaf.shape[0 if leaf.own == ("weight",) else -1]
    if self.vocabularies:
      table = self._vocabulary(leaf)
      if table and (named or outputs == table[1]):
        return f"it leads to the rows of {table[0]!r}"
      return ""
    if at != len(self.root) or self._is_attention(leaf.text[:at]):
      return ""
    if named and self.is_deep:
      return f"the last layer by its name, {leaf.text[at]!r}"
    inputs = math.prod(leaf.shape) // max(outputs, 1)
    if self.sizes[outputs] == 1 and self.sizes[inputs] > 1:
      return f"the last of its kind, and no other matrix has {outputs} columns"
    return ""

  def _is_attention(self, prefix: tuple[str, ...]) -> bool:
    """Whether queries are made beside, so that "out" is attention's."""
    at = len(prefix)
    return any(
      leaf.text[:at] == prefix and label_words.is_query(leaf.parts[at])
      for leaf in self.leaves
      if len(leaf.text) > at
    )

  def _rest(self, found) -> None:
    for i, leaf in enumerate(self.leaves):
      if found[i] is None:
        found[i] = Verdict(
          "matrix", "nothing says otherwise", self._doubt(leaf)
        )

  def _doubt(self, leaf: label_words.Leaf) -> str:
    at = leaf.module()
    table = self._vocabulary(leaf)
    outer = leaf.is_outer(max(at, 0))
    if table and outer and not label_words.is_hidden(leaf.parts[at]):
      return f"a side of {table[1]}, as long as {table[0]!r} has rows"
    return ""


def _few_taps(shape: Shape) -> bool:
  """Whether "conv1d" may be depthwise: no kernel [taps, in, out]."""
  if len(shape) == 2 or 1 in shape[-3:]:
    return True
  taps, d_in = shape[-3:-1]
  return not taps <= 8 < d_in


def _stacks(leaves: Sequence[label_words.Leaf]) -> list[tuple[str, ...]]:
  """Subtrees whose leaves all have the layers as their first axis."""
  under = collections.defaultdict(list)
  for leaf in leaves:
    for end in range(1, len(leaf.text)):
      if label_words.is_container(leaf.parts[end - 1]):
        under[leaf.text[:end]].append((leaf, end))
  found = []
  for prefix, members in under.items():
    shapes = [leaf.shape for leaf, _ in members]
    if (
      all(shapes)
      and len({shape[0] for shape in shapes}) == 1
      and max(map(len, shapes)) > 2
      and not any(
        label_words.is_number(leaf.parts[end]) for leaf, end in members
      )
    ):
      found.append(prefix)
  return found


def _order(text: Sequence[str]) -> list:
  """Sorts "2" before "10"."""
  return [
    (int(word), "") if word.isdigit() else (-1, word)
    for part in text
    for word in re.findall(r"\d+|\D+", part)
  ]
