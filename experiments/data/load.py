"""From a config's words to a corpus."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments import device_memory, errors
from experiments.data import corpus as corpus_lib
from experiments.data import pieces, shards, sources, tokenization

# Bytes of text that a token stands for at most, on average.
_LONGEST = 8


@dataclasses.dataclass(frozen=True)
class Texts:
  """Split documents and their tokenizer, before anything is tokenised.

  Attributes:
    train: training documents.
    eval: held-out documents.
    tokenizer: encodes both.
    hash: 12 hex digits, of the corpus.
    facts: what records say about it, JSON-ready.
  """

  train: Sequence[sources.Document]
  eval: Sequence[sources.Document]
  tokenizer: tokenization.Tokenizer
  hash: str
  facts: dict[str, Any]

  @property
  def train_bytes(self) -> int:
    """Bytes of the training documents."""
    return sum(d.size for d in self.train)

  @property
  def eval_bytes(self) -> int:
    """Bytes of the held-out documents."""
    return sum(d.size for d in self.eval)

  def encode(
    self, documents: Sequence[sources.Document]
  ) -> Iterator[np.ndarray]:
    """Yields the ids of documents in arrays of bounded size."""
    return tokenization.encode_documents(
      self.tokenizer,
      (d.blocks() for d in documents),
      sum(d.size for d in documents),
      "tokenizing",
    )


def open_texts(
  source: str,
  path: str = "",
  *,
  tokenizer: str = "bytes",
  held_out: float = 0.05,
  cache: pathlib.Path | None = None,
) -> Texts:
  """Finds and splits documents and makes their tokenizer.

  Args:
    source: "python" or "files" (see `sources.load_documents`).
    path: of "files".
    tokenizer: "bytes", "bpe:N" (trained on the training documents only) or
      the path of a tokenizer.json.
    held_out: share of the bytes kept for evaluation, in whole files.
    cache: tokenizer.json; read if it exists, else written.

  Raises:
    UserError: nothing to read, or an argument out of range.
  """
  if cache is None or not cache.exists():
    tokenization.parse(tokenizer)
  documents = sources.load_documents(source, path)
  train, held, how = sources.split(documents.documents, held_out)
  parts = (p for d in train for p in pieces.cut(d.blocks()))
  maker = tokenization.make(tokenizer, parts, cache)
  facts = {
    **documents.describe(),
    "split": how,
    "train_files": len(train),
    "eval_files": len(held),
  }
  return Texts(train, held, maker, documents.hash, facts)


def load_corpus(
  source: str,
  path: str = "",
  *,
  tokenizer: str = "bytes",
  held_out: float = 0.05,
  cache_dir: str | os.PathLike | None = None,
) -> corpus_lib.Corpus:
  """Reads, splits and tokenises a corpus.

  Text is held in memory as tokens, of one byte each where the vocabulary has
  256 ids; what does not fit belongs into shards.

  Args:
    source: "python", "files" (see `sources.load_documents`) or "shards" (see
      `shards.read`).
    path: of "files" and "shards".
    tokenizer: "bytes", "bpe:N" (trained on the training documents only) or
      the path of a tokenizer.json. Shards with a meta.json bring their own.
    held_out: share of the bytes kept for evaluation, in whole files.
    cache_dir: where tokenizer.json is kept, and found by the next call.

  Raises:
    UserError: nothing to read, or an argument out of range.
  """
  cache = None if cache_dir is None else pathlib.Path(cache_dir)
  cache = cache and cache / "tokenizer.json"
  if source == "shards":
    return shards.read(path, tokenizer, held_out, cache)
  texts = open_texts(
    source, path, tokenizer=tokenizer, held_out=held_out, cache=cache
  )
  return corpus_lib.Corpus(
    train=_collect(texts, texts.train),
    eval=_collect(texts, texts.eval),
    tokenizer=texts.tokenizer,
    hash=texts.hash,
    facts=texts.facts,
    train_bytes=texts.train_bytes,
    eval_bytes=texts.eval_bytes,
    read_eval=lambda: b"".join(d.read() for d in texts.eval),
  )


def _collect(texts: Texts, documents: Sequence[sources.Document]) -> np.ndarray:
  """Ids of all documents `[tokens]`, held once while they are made."""
  narrow = texts.tokenizer.vocab_size <= 256
  dtype = np.dtype(np.uint8) if narrow else texts.tokenizer.dtype
  size = sum(d.size for d in documents)
  need, have = size // (1 if narrow else _LONGEST), device_memory.host_bytes()
  if have and need * dtype.itemsize > have:
    raise errors.UserError(
      f"data.path: {size} bytes of text need at least {need * dtype.itemsize} "
      f"bytes of memory as tokens, this host has {have}; shards, which "
      "experiments.write_shards makes, stay on disk"
    )
  # Most tokenizers make no more ids than there are bytes; what is not filled
  # takes address space, no memory.
  ids, count = np.empty(size + len(documents), dtype), 0
  for part in texts.encode(documents):
    if count + len(part) > len(ids):
      ids.resize(count + len(part) + len(ids) // 4, refcheck=False)
    ids[count : count + len(part)] = part
    count += len(part)
  if not count:
    raise errors.UserError("data: the tokenizer turned the text into no tokens")
  ids.resize(count, refcheck=False)
  return ids
