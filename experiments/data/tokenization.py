"""Tokenizers that need no download: bytes, and byte-level BPE trained here."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers as hf
import tqdm
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments import errors
from experiments.data import files, pieces
from jaxlib_ext import config as config_lib
from jaxlib_ext import records
from models import hf_files

# An explicit choice, or the library warns after every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

MIN_BPE, MAX_BPE = 257, 65535
_GROUP = 1 << 20
# Of a tokenizer.json; that of 262,144 tokens has 33 MB.
_MOST_BYTES = 1 << 30


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

  def cut(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cuts a document, in blocks, into parts that encode as the whole does."""

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

  def cut(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks themselves."""
    return iter(blocks)

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
    self.eod = vocab.get(hf_files.end_token(vocab))
    self._bytes = self._byte_tokens(vocab)

  def _byte_tokens(self, vocab: dict[str, int]) -> np.ndarray | None:
    """The id of every byte `[256]`, or None if this is not byte-level."""
    if "ByteLevel" not in _pre_tokenizers(self._tokenizer):
      return None
    table = hf_files.byte_alphabet()
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
      split = [list(pieces.runs(c)) for c in contents]
    encoded = iter(
      self._tokenizer.encode_batch_fast(
        [run for parts in split for run in parts if isinstance(run, str)],
        add_special_tokens=False,
      )
    )
    out = []
    for parts in split:
      ids = [np.zeros(0, self.dtype)]
      for run in parts:
        if isinstance(run, str):
          ids.append(np.asarray(next(encoded).ids, self.dtype))
        else:
          ids.append(self._bytes[np.frombuffer(run, np.uint8)])
      out.append(np.concatenate(ids))
    return out

  def cut(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Parts of bounded size, or the whole if this is not byte-level."""
    return (
      iter([b"".join(blocks)]) if self._bytes is None else pieces.cut(blocks)
    )

  def decode_bytes(self, ids: Any) -> bytes:
    """The bytes of ids `[tokens]`; special tokens spell their names.

    Raises:
      ValueError: the tokenizer is not byte-level, or has no such id.
    """
    if self._bytes is None:
      raise ValueError(f"tokenizer {self.name!r} is not byte-level")
    value = {c: bytes([i]) for i, c in enumerate(hf_files.byte_alphabet())}
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
  `size` - 257 merges gives a smaller vocabulary. Words of more than
  `pieces.WORD` bytes are trained on in pieces, and texts that have more
  different words than `pieces.material` has room for only as far as there.
  Shows progress on a terminal.

  Args:
    size: of the vocabulary.
    texts: documents; bytes that are not UTF-8 take no part in training.
  """
  tokenizer = hf.Tokenizer(models.BPE())
  words = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bounded = pre_tokenizers.Split(
    hf.Regex(rf"[\s\S]{{1,{pieces.WORD}}}"), "isolated"
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bounded])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[hf_files.END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=sys.stderr.isatty(),
  )
  tokenizer.train_from_iterator(pieces.material(texts), trainer=trainer)
  # Encoding takes long words whole: its time does not grow with a square.
  tokenizer.pre_tokenizer = words
  return Subwords(tokenizer, f"bpe:{size}")


def load(path: pathlib.Path, *, name: str | None = None) -> Tokenizer:
  """Reads a tokenizer.json, written by `Tokenizer.save` or anybody else.

  Raises:
    UserError: it cannot be read, or is no tokenizer.
  """
  try:
    reason = files.kind(path)
    if reason is not None:
      raise ValueError(reason)
    size = path.stat().st_size
    if size > _MOST_BYTES:
      raise ValueError(f"{size} bytes, allowed: at most {_MOST_BYTES}")
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
  tokenizer: Tokenizer,
  documents: Iterable[Iterable[bytes]],
  total: int,
  title: str,
) -> Iterator[np.ndarray]:
  """Ids of documents, `eod` behind each, in arrays of bounded size.

  Shows a progress bar on a terminal if it takes longer than two seconds.

  Args:
    tokenizer: encodes.
    documents: each in blocks.
    total: their bytes, for the progress bar.
    title: of the progress bar.
  """
  end = [] if tokenizer.eod is None else [tokenizer.eod]
  end = np.asarray(end, tokenizer.dtype)
  with tqdm.tqdm(
    total=total,
    desc=title,
    unit="B",
    unit_scale=True,
    delay=2,
    disable=None,
    leave=False,
  ) as bar:
    for group in _groups(tokenizer, documents):
      # None ends a document.
      encoded = iter(
        tokenizer.encode_batch([p for p in group if p is not None])
      )
      for part in group:
        yield end if part is None else next(encoded)
      bar.update(sum(len(part) for part in group if part is not None))


def _groups(
  tokenizer: Tokenizer, documents: Iterable[Iterable[bytes]]
) -> Iterator[list[bytes | None]]:
  group, size = [], 0
  for blocks in documents:
    for part in itertools.chain(tokenizer.cut(blocks), [None]):
      group.append(part)
      size += 0 if part is None else len(part)
      if size >= _GROUP:
        yield group
        group, size = [], 0
  if group:
    yield group


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
