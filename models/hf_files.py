"""JSON files of a model in the Hugging Face layout, beside its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from jaxlib_ext import reading, records

END = "<|endoftext|>"
# Names under which well-known tokenizer files keep their end of a document.
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


# The letters of others, such as "[EOS]" or "<end_of_sentence>".
_LETTERS = (
  "endoftext",
  "endofdocument",
  "endofsentence",
  "endofsequence",
  "endofstring",
  "eos",
  "eod",
  "eot",
)


def end_token(vocab: Collection[str]) -> str | None:
  """The token that ends a document, by its name; None if no name is known."""
  known = next((end for end in ENDS if end in vocab), None)
  if known is not None:
    return known
  marks = {}
  for name in sorted(vocab):
    # Words of the language, such as "eos", are not in brackets.
    if name[:1] in ("<", "[") and name[-1:] in (">", "]"):
      marks.setdefault(re.sub(r"[\W_\u2581]", "", name).lower(), name)
  return next((marks[end] for end in _LETTERS if end in marks), None)


def byte_alphabet() -> list[str]:
  """The character that stands for every byte in a byte-level vocabulary.

  Printable Latin-1 characters stand for themselves and the other bytes for
  the characters from U+0100 on, in order (the convention of GPT-2).
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return [chr(b if b in printable else next(others)) for b in range(256)]


class Tokenizer:
  """A tokenizer.json, as the `tokenizers` library reads it.

  Args:
    path: of the file. The "bytes" of `experiments.data`, one id per byte and
      0 at the end of a document, becomes a vocabulary without merges.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no tokenizer.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.content = reading.read_json(path)
    model = self.content.get("model")
    if isinstance(model, dict) and model.get("type") == "bytes":
      self.content = _bytes_tokenizer()
    self._names = _names(self.content, path)

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return max(self._names, default=-1) + 1

  @property
  def end(self) -> int | None:
    """The id that ends a document, if it has a well-known name."""
    ids = {name: i for i, name in self._names.items()}
    name = end_token(ids)
    return None if name is None else ids[name]

  def name(self, what: str, token: int) -> str:
    """The token of an id; ValueError, with `what` it is for, if none."""
    if token not in self._names:
      raise ValueError(
        f"{what}: got {token}; allowed: an id of the tokenizer, which has "
        f"{len(self._names)}"
      )
    return self._names[token]


def write_tokenizer(
  directory: str,
  tokenizer: Tokenizer,
  *,
  eos: int | None,
  bos: int | None,
  max_length: int | None,
) -> None:
  """Writes tokenizer.json and tokenizer_config.json for `AutoTokenizer`."""
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
  }
  if max_length is not None:
    config["model_max_length"] = max_length
  for what, token in (("eos", eos), ("bos", bos)):
    if token is not None:
      config[f"{what}_token"] = tokenizer.name(what, token)
  records.write_json(
    os.path.join(directory, "tokenizer.json"), tokenizer.content
  )
  records.write_json(os.path.join(directory, "tokenizer_config.json"), config)


def _names(
  content: dict[str, Any], path: str | os.PathLike[str]
) -> dict[int, str]:
  """Tokens by id: WordPiece, WordLevel and BPE have a dict, Unigram a list."""
  try:
    vocab = content["model"]["vocab"]
    if isinstance(vocab, dict):
      names = {int(i): str(name) for name, i in vocab.items()}
    else:
      names = {i: str(piece[0]) for i, piece in enumerate(vocab)}
    for token in content.get("added_tokens") or ():
      names[int(token["id"])] = str(token["content"])
  except (KeyError, TypeError, ValueError, IndexError) as e:
    raise ValueError(f"{path} is no tokenizer.json: {e!r}") from e
  return names


def _bytes_tokenizer() -> dict[str, Any]:
  level = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
  }
  # Documents have no NUL, whose id ends them.
  vocab = [END, *byte_alphabet()[1:]]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {
        "id": 0,
        "content": END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
      }
    ],
    "normalizer": None,
    "pre_tokenizer": level,
    "post_processor": None,
    "decoder": level,
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": False,
      "vocab": {name: i for i, name in enumerate(vocab)},
      "merges": [],
    },
  }
