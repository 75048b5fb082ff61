"""Words in the names of parameters, and what they say about their roles."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence

Words = tuple[str, ...]
Shape = tuple[int, ...]

# Fields in which libraries hold the one array of a parameter.
_BOXES = ("value", "array", "data_array", "raw_value")

# "LayerNorm_0" is layer, norm, 0; "conv1d" is conv, 1d; "bq" is one word.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+[dD](?![a-zA-Z])|\d+")

# Leaves that are named after what they are in any layer, so that the layer's
# name has to say which it is.
GENERIC = frozenset("kernel weight weights w table matrix param".split())

_NORMS = frozenset("norm norms ln lns bn gn rms".split())
_VECTORS = frozenset(
  "bias biases beta offset scale scales gain gains gamma shift temperature "
  "alpha lambda layerscale".split()
)
# A compound is what its last noun is: "norm_proj" is a projection.
_LINEAR = frozenset(
  "proj projs project projection projector linear dense fc conv mapping "
  "modulation modulate embed embedding embedder head kernel lora".split()
)
_ADAPTIVE = frozenset(
  "ada adaln adanorm adalayernorm adaptive modulation mod film".split()
)
# What tables of one module called "embed" are told apart by.
_KINDS = frozenset(
  "token tokens tok word words pos position positions type segment char".split()
)
# One vector that stands for a token.
_SPECIAL = frozenset(
  "cls class mask register registers reg dist distill distillation null pad "
  "sep bos eos query mem memory".split()
)
_RWKV = frozenset("mix mixing decay first faaaa maa".split())
# RWKV-7's gains of keys and of the receptance.
_GAINS = frozenset([("r", "k"), ("k", "k"), ("k", "a")])

_EMBED = re.compile(r"(embed|embedd?ing|embedder|emb)s?$")
_TABLES = frozenset("wte wpe lut lookup codebook codebooks codevectors".split())
_POSITION = frozenset(
  "pos position positions positional posemb posembed wpe type segment label "
  "class cls y rotary rope".split()
)
# What these embed comes as a vector, and is multiplied by a matrix.
_PICTURES = frozenset("patch patches pixel image img frame video x".split())
_SIGNALS = _PICTURES | frozenset(
  "time timestep timesteps t sigma noise context cond conditioning guidance "
  "pooled vision audio add aug".split()
)
_OUTER = frozenset("out output outputs lm softmax final".split())

_HEADS = frozenset(
  "head heads logits logitdense classifier classifiers lmhead".split()
)
_UNEMBED = re.compile(r"un(embed|embedding|embedder|emb)s?$")
_NO_ANSWER = frozenset(
  "multi num attn attention cross self talking per router gate gating expert "
  "experts pre conv".split()
)
_BESIDE_HEAD = frozenset(
  "dist dense linear proj projection fc ffn out layer weight".split()
)

PLAIN = frozenset(
  "dense linear lin fc proj projection out output decoder mlp layer layers "
  "last final affine conv transform regression regressor".split()
)
LAST = frozenset(
  "output outputs out final last readout score pred preds prediction "
  "predictions vocab generator loss".split()
)
_BESIDE_LAST = PLAIN | LAST | frozenset("qa lm ff ffn projector to".split())
_CONTAINER = re.compile(r"(layers?|blocks?|^h|^stack(ed)?|^stages?|^scan)$")
_QUERIES = frozenset("q wq query qkv".split())
_HIDDEN = _QUERIES | frozenset(
  "k v o wk wv wo key value up down gate wi w1 w2 w3 pooler".split()
)
_INNER = frozenset(
  "attn attention mlp ffn ff moe experts expert pooler mixer".split()
)


@functools.lru_cache(maxsize=65536)
def words(component: str) -> Words:
  """The words of one part of a name, in lower case."""
  return tuple(word.lower() for word in _WORD.findall(component))


def is_number(part: Words) -> bool:
  """Whether a part is but an index."""
  return all(word.isdigit() for word in part)


def _followed(part: Words, i: int) -> bool:
  """Whether word `i` only qualifies something linear after it."""
  return any(word in _LINEAR for word in part[i + 1 :])


def is_norm(part: Words) -> bool:
  """Whether a part names a norm, and no projection that conditions one."""
  if not _ADAPTIVE.isdisjoint(part):
    return False
  return any(
    (word in _NORMS or re.search(r"norms?$", word)) and not _followed(part, i)
    for i, word in enumerate(part)
  )


def is_vector(part: Words) -> bool:
  """Whether a part names a gain, bias, rate or token: no matrix at any rank."""
  if any(w in _VECTORS and not _followed(part, i) for i, w in enumerate(part)):
    return True
  if (
    "log" in (part[0], part[-1]) or part[-2:] == ("d", "skip") or part in _GAINS
  ):
    return True
  if part[:2] == ("weight", "g"):  # The lengths of weight normalisation.
    return True
  if part[-1] == "token" and len(part) > 1:
    return embeds(part) is None
  if part[-1] == "tokens":
    return not _SPECIAL.isdisjoint(part)
  # "time_maa_w1" is a matrix of low rank that the mixture is made by.
  rwkv = part[:1] == ("time",) and part[1:2] and part[1] in _RWKV
  return bool(rwkv) and not re.search(r"w\d$", "".join(part))


def is_adaptive(part: Words) -> bool:
  """Whether a part names what conditions a norm."""
  return not _ADAPTIVE.isdisjoint(part)


def is_conv1d(part: Words) -> bool:
  """Whether a part names a convolution along time."""
  return ("conv", "1d") in zip(part, part[1:], strict=False)


def is_depthwise(part: Words) -> bool:
  """Whether a part names a convolution of each channel for itself."""
  return "depthwise" in part or "dwconv" in part or "dw" in part


def embeds(part: Words) -> str | None:
  """What a part of the family of embeddings names.

  Returns:
    "table", "position" (a table whose rows are no vocabulary), "picture" or
    "signal" (what is multiplied), "head", "linear", or None: no such part.
  """
  found = [
    i
    for i, word in enumerate(part)
    if word in _TABLES or (_EMBED.search(word) and not _UNEMBED.search(word))
  ]
  if not found:
    encoding = part[-1] in ("encoding", "encodings") and "positional" in part
    table = "pos" in part and not {"rel", "abs"}.isdisjoint(part)
    return "position" if encoding or table else None
  before, after = part[: found[-1]], part[found[-1] + 1 :]
  if "lora" in before:
    return "linear"
  if any(word in _LINEAR or word in ("layers", "mlp") for word in after):
    return "linear"
  if "out" in after or not _OUTER.isdisjoint(before):
    return "head"
  stem = _EMBED.sub("", part[found[-1]])
  if not _POSITION.isdisjoint((*part, stem)):
    return "position"
  if not _PICTURES.isdisjoint((*before, stem)):
    return "picture"
  if not _SIGNALS.isdisjoint((*before, stem)):
    return "signal"
  return "table"


def is_positional(part: Words) -> bool:
  """Whether a part tells a table of positions or kinds from one of tokens."""
  return embeds(part) == "position" or not _POSITION.isdisjoint(part)


def is_head(part: Words) -> bool:
  """Whether a part names the layer or layers that give a model's answer."""
  if any(_UNEMBED.search(word) for word in part):
    return True
  found = [i for i, word in enumerate(part) if word in _HEADS]
  if not found or not _NO_ANSWER.isdisjoint(part):
    return False
  after = part[found[-1] + 1 :]
  return all(word.isdigit() or word in _BESIDE_HEAD for word in after)


def is_last(part: Words) -> bool:
  """Whether a part may name a last layer: "output", "proj_out", "fc_out"."""
  plain = [word for word in part if not word.isdigit()]
  return not LAST.isdisjoint(plain) and all(w in _BESIDE_LAST for w in plain)


def is_plain(part: Words) -> bool:
  """Whether a part says no more than that a layer is linear."""
  plain = [word for word in part if not word.isdigit()]
  return bool(plain) and all(word in PLAIN for word in plain)


def numbered(part: Words) -> tuple[Words, int]:
  """An automatic name and its number: "Dense_4" is ("dense",), 4."""
  if part[-1:] and part[-1].isdigit():
    return part[:-1], int(part[-1])
  return part, 0


def is_container(part: Words) -> bool:
  """Whether a part names layers of one kind."""
  plain = numbered(part)[0]
  if not plain or not LAST.isdisjoint(plain):
    return False
  return bool(_CONTAINER.search(plain[-1])) or "scan" in plain


def is_inner(parts: tuple[Words, ...]) -> bool:
  """Whether a module with these ancestors lies inside a repeated layer."""
  return any(
    is_number(part) or is_container(part) or not _INNER.isdisjoint(part)
    for part in parts
  )


def is_attention(part: Words) -> bool:
  """Whether a part names attention."""
  return "attention" in part or "attn" in part


def is_query(part: Words) -> bool:
  """Whether a part names what makes queries, or queries and the rest."""
  return not _QUERIES.isdisjoint(part) or part in (("c", "attn"),)


def is_hidden(part: Words) -> bool:
  """Whether a part has an ordinary name of a hidden matrix."""
  return not _HIDDEN.isdisjoint(part)


def is_short_bias(name: str) -> bool:
  """Whether a leaf's name may be short for a bias: "b", "bq", "b1", "b_in"."""
  return (
    re.match(r"b(q|k|v|o|i|f|g|c|kv|qkv|in|out|\d+|_.*)?$", name) is not None
  )


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf's name in parts, each in words, without the box it lies in.

  Attributes:
    text: the parts as they are written.
    parts: their words.
    shape: of the leaf.
  """

  text: tuple[str, ...]
  parts: tuple[Words, ...]
  shape: Shape

  @property
  def own(self) -> Words:
    return self.parts[-1]

  @property
  def is_generic(self) -> bool:
    """Whether its own name, "kernel" or "w", leaves its layer to say more."""
    return self.own[0] in GENERIC and (
      len(self.own) == 1 or self.own[0] == "weight"
    )

  def module(self) -> int:
    """The position of the part that says what the leaf is, or -1."""
    at = len(self.parts) - 1
    if self.is_generic or is_number(self.own):
      at = self.before(at)
    part = self.parts[at]
    # TransformerLens's "unembed/W_U", but also "attn/W_Q"; "embed/tokens".
    letter = len(part) == 2 and part[0] == "w" and not part[1].isdigit()
    if at > 0 and (letter or _KINDS.issuperset(part)):
      above = self.parts[at - 1]
      if embeds(above) or is_head(above):
        at -= 1
    return at

  def before(self, at: int) -> int:
    """The position of the last part before `at` that is no number, or -1."""
    at -= 1
    while at >= 0 and is_number(self.parts[at]):
      at -= 1
    return at

  def is_outer(self, at: int) -> bool:
    """Whether the layer at `at` lies in no repeated one."""
    return not is_inner(self.parts[:at])


def parse(names: Sequence[str], shapes: Sequence[Shape]) -> list[Leaf]:
  """Takes the names of a tree's leaves, and their shapes, apart."""
  split = [
    tuple(part for part in re.split(r"[/.~]+", name) if part) or ("",)
    for name in names
  ]
  children = collections.defaultdict(set)
  for text in split:
    for end in range(len(text)):
      children[text[:end]].add(text[end])
  leaves = []
  for text, shape in zip(split, shapes, strict=True):
    while (
      text[-1] in _BOXES and len(text) > 1 and len(children[text[:-1]]) == 1
    ):
      text = text[:-1]
    parts = tuple(words(part) or (part.lower(),) for part in text)
    leaves.append(Leaf(text, parts, tuple(shape)))
  return leaves
