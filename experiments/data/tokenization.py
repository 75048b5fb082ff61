"""Tokenizers that need no download: bytes, and byte-level BPE trained here."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers as hf
import tqdm
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments import errors
from jaxlib_ext import config as config_lib
from jaxlib_ext import records

# An explicit choice, or the library warns after every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

END = "<|endoftext|>"
MIN_BPE, MAX_BPE = 257, 65535
# Names under which well-known tokenizer files keep their end of a document.
_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_INVALID = re.compile("[\udc80-\udcff]+")
_PIECE = 1 << 18
_GROUP = 1 << 22


class Tokenizer(Protocol):
  """What a corpus needs of a tokenizer.

  Attributes:
    name: as a config gives it, without the path of a file.
    vocab_size: ids are 0 .. vocab_size - 1.
    eod: the id put behind every document, or None.
    dtype: uint16, or uint32 where `vocab_size` exceeds 65536.
  """

  name: str
  vocab_size: int
  eod: int | None
  dtype: np.dtype

  def encode(self, content: bytes) -> np.ndarray:
    """Ids of one document `[tokens]`, without `eod`."""

  def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of several documents, in parallel where that helps."""

  def decode(self, ids: Any) -> str:
    """Text of ids `[tokens]`; invalid UTF-8 becomes U+FFFD."""

  def save(self, path: pathlib.Path) -> None:
    """Writes the file that `load` reads, atomically."""


class Bytes:
  """One id per byte; 0 ends a document, since documents have no NUL byte."""

  name = "bytes"
  vocab_size = 256
  eod = 0
  dtype = np.dtype(np.uint16)

  def encode(self, content: bytes) -> np.ndarray:
    """Every byte as its own id `[bytes]`."""
    return np.frombuffer(content, np.uint8).astype(self.dtype)

  def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each."""
    return [self.encode(content) for content in contents]

  def decode_bytes(self, ids: Any) -> bytes:
    """The inverse of `encode`."""
    return np.asarray(ids).astype(np.uint8).tobytes()

  def decode(self, ids: Any) -> str:
    """Text; invalid UTF-8 becomes U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")

  def save(self, path: pathlib.Path) -> None:
    """Writes a file that `load` turns into `Bytes` again."""
    records.write_json(path, {"model": {"type": "bytes"}})


class Subwords:
  """A tokenizer of the `tokenizers` library.

  With a byte-level one, such as those trained here, every byte string makes
  the round trip through `encode` and `decode_bytes`: bytes that are not UTF-8
  get the tokens of single bytes. With any other, those bytes become U+FFFD
  and the round trip is whatever the file defines. Text that spells a special
  token is encoded as text.

  Args:
    tokenizer: of the library.
    name: as a config gives it.
  """

  def __init__(self, tokenizer: hf.Tokenizer, name: str):
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    self._tokenizer, self.name = tokenizer, name
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)
    self.eod = next((vocab[end] for end in _ENDS if end in vocab), None)
    self._bytes = self._byte_tokens(vocab)

  def _byte_tokens(self, vocab: dict[str, int]) -> np.ndarray | None:
    """The id of every byte `[256]`, or None if this is not byte-level."""
    if "ByteLevel" not in _pre_tokenizers(self._tokenizer):
      return None
    table = _byte_alphabet()
    if any(character not in vocab for character in table):
      return None
    return np.asarray([vocab[c] for c in table], self.dtype)

  def encode(self, content: bytes) -> np.ndarray:
    """Ids of one document `[tokens]`, without `eod`."""
    return self.encode_batch([content])[0]

  def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each, on all processors."""
    if self._bytes is None:
      split = [[c.decode("utf-8", errors="replace")] for c in contents]
    else:
      split = [list(_pieces(c)) for c in contents]
    encoded = iter(
      self._tokenizer.encode_batch_fast(
        [p for pieces in split for p in pieces if isinstance(p, str)],
        add_special_tokens=False,
      )
    )
    out = []
    for pieces in split:
      parts = [np.zeros(0, self.dtype)]
      for piece in pieces:
        if isinstance(piece, str):
          parts.append(np.asarray(next(encoded).ids, self.dtype))
        else:
          parts.append(self._bytes[np.frombuffer(piece, np.uint8)])
      out.append(np.concatenate(parts))
    return out

  def decode_bytes(self, ids: Any) -> bytes:
    """The bytes of ids `[tokens]`; special tokens spell their names.

    Raises:
      ValueError: the tokenizer is not byte-level, or has no such id.
    """
    if self._bytes is None:
      raise ValueError(f"tokenizer {self.name!r} is not byte-level")
    value = {c: bytes([i]) for i, c in enumerate(_byte_alphabet())}
    special = {
      i: token.content.encode()
      for i, token in self._tokenizer.get_added_tokens_decoder().items()
    }
    out = []
    for i in np.asarray(ids).tolist():
      token = self._tokenizer.id_to_token(i)
      if token is None:
        raise ValueError(f"tokenizer {self.name!r} has no id {i}")
      out.append(
        special[i] if i in special else b"".join(value[c] for c in token)
      )
    return b"".join(out)

  def decode(self, ids: Any) -> str:
    """Text; invalid UTF-8 becomes U+FFFD and special tokens are spelt out."""
    if self._bytes is not None:
      return self.decode_bytes(ids).decode("utf-8", errors="replace")
    return self._tokenizer.decode(
      np.asarray(ids).tolist(), skip_special_tokens=False
    )

  def save(self, path: pathlib.Path) -> None:
    """Writes the library's tokenizer.json."""
    records.write_atomically(path, self._tokenizer.to_str(pretty=True))


def parse(spec: str) -> int | None:
  """Reads a config's tokenizer: None for "bytes" and paths, N for "bpe:N".

  Raises:
    UserError: neither, or N out of range.
  """
  if spec.startswith("bpe:"):
    number = spec.removeprefix("bpe:")
    if not re.fullmatch(r"[0-9]+", number) or not (
      MIN_BPE <= int(number) <= MAX_BPE
    ):
      raise errors.UserError(
        f"data.tokenizer: got {spec!r}, expected bpe:N with N from {MIN_BPE} "
        f"to {MAX_BPE}"
      )
    return int(number)
  if spec != "bytes" and not pathlib.Path(spec).expanduser().is_file():
    allowed = ("bytes", "bpe:8192", "the path of a tokenizer.json")
    raise errors.UserError(
      f"data.tokenizer: got {spec!r}, which is no file; "
      f"{config_lib.nearest(spec, allowed)}"
    )
  return None


def make(
  spec: str, texts: Iterable[bytes], cache: pathlib.Path | None = None
) -> Tokenizer:
  """Makes the tokenizer of a config.

  Args:
    spec: "bytes", "bpe:N" or the path of a tokenizer.json.
    texts: training documents; read only to train "bpe:N".
    cache: a file that is read instead if it exists, and else written.

  Raises:
    UserError: a bad `spec`, or a file that cannot be read.
  """
  if cache is not None and cache.exists() and spec != "bytes":
    return load(cache, name=_name(spec))
  size = parse(spec)
  if spec == "bytes":
    tokenizer = Bytes()
  elif size is not None:
    tokenizer = train(size, texts)
  else:
    tokenizer = load(pathlib.Path(spec).expanduser(), name=_name(spec))
  keep(tokenizer, cache)
  return tokenizer


def keep(tokenizer: Tokenizer, cache: pathlib.Path | None) -> None:
  """Writes the cache unless it exists: other processes may be reading it."""
  if cache is not None and not cache.exists():
    cache.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(cache)


def train(size: int, texts: Iterable[bytes]) -> Subwords:
  """Trains byte-level BPE; the same texts always give the same vocabulary.

  Id 0 ends a document and ids 1 to 256 are the bytes. A text too small for
  `size` - 257 merges gives a smaller vocabulary.

  Args:
    size: of the vocabulary.
    texts: documents; bytes that are not UTF-8 take no part in training.
  """
  tokenizer = hf.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(
    (p for text in texts for p in _pieces(text) if isinstance(p, str)),
    trainer=trainer,
  )
  return Subwords(tokenizer, f"bpe:{size}")


def load(path: pathlib.Path, *, name: str | None = None) -> Tokenizer:
  """Reads a tokenizer.json, written by `Tokenizer.save` or anybody else.

  Raises:
    UserError: it cannot be read, or is no tokenizer.
  """
  try:
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    if content["model"].get("type") == "bytes":
      return Bytes()
    return Subwords(hf.Tokenizer.from_str(text), name or path.name)
  except Exception as e:  # The library raises bare Exception.
    reason = " ".join(str(e).split())
    raise errors.UserError(
      f"data.tokenizer: {path} is no tokenizer.json: {reason}"
    ) from e


def encode_documents(
  tokenizer: Tokenizer, contents: Iterable[bytes], total: int, title: str
) -> Iterator[np.ndarray]:
  """Ids of documents, `eod` behind each, one array each.

  Shows a progress bar on a terminal if it takes longer than two seconds.

  Args:
    tokenizer: encodes.
    contents: the documents.
    total: their bytes, for the progress bar.
    title: of the progress bar.
  """
  end = [] if tokenizer.eod is None else [tokenizer.eod]
  with tqdm.tqdm(
    total=total,
    desc=title,
    unit="B",
    unit_scale=True,
    delay=2,
    disable=None,
    leave=False,
  ) as bar:
    for group in _groups(contents):
      for ids in tokenizer.encode_batch(group):
        yield np.append(ids, np.asarray(end, tokenizer.dtype))
      bar.update(sum(map(len, group)))


def _groups(contents: Iterable[bytes]) -> Iterator[list[bytes]]:
  group, size = [], 0
  for content in contents:
    group.append(content)
    size += len(content)
    if size >= _GROUP:
      yield group
      group, size = [], 0
  if group:
    yield group


def _pieces(content: bytes) -> Iterator[str | bytes]:
  """Splits into valid text (str) and runs of invalid bytes (bytes).

  Long text is cut behind single line ends, where the pre-tokenizer breaks in
  any case, so that the tokens stay the same and pieces encode in parallel.
  """
  text = content.decode("utf-8", errors="surrogateescape")
  start = 0
  for match in _INVALID.finditer(text):
    yield from _lines(text[start : match.start()])
    yield match.group().encode("utf-8", errors="surrogateescape")
    start = match.end()
  yield from _lines(text[start:])


_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


def _lines(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _PIECE:
    match = _BREAK.search(text, start + _PIECE)
    if match is None:
      break
    yield text[start : match.end()]
    start = match.end()
  if start < len(text):
    yield text[start:]


def _byte_alphabet() -> list[str]:
  """The character that stands for every byte in a byte-level vocabulary.

  Printable Latin-1 characters stand for themselves and the other bytes for
  the characters from U+0100 on, in order (the convention of GPT-2).
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return [chr(b if b in printable else next(others)) for b in range(256)]


def _pre_tokenizers(tokenizer: hf.Tokenizer) -> list[str]:
  """Types of the pre-tokenizers, without those that add a space in front."""
  found = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
  return [
    p["type"]
    for p in found.get("pretokenizers", [found])
    if p and not p.get("add_prefix_space")
  ]


def _name(spec: str) -> str:
  return spec if spec.startswith("bpe:") else pathlib.Path(spec).name
