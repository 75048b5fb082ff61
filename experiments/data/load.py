"""From a config's words to a corpus."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments import errors
from experiments.data import corpus as corpus_lib
from experiments.data import shards, sources, tokenization


def load_corpus(
  source: str,
  path: str = "",
  *,
  tokenizer: str = "bytes",
  held_out: float = 0.05,
  cache_dir: str | os.PathLike | None = None,
) -> corpus_lib.Corpus:
  """Reads, splits and tokenises a corpus.

  Text is held in memory as tokens; what does not fit belongs into shards.

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
  if cache is None or not cache.exists():
    tokenization.parse(tokenizer)
  documents = sources.load_documents(source, path)
  train, held, how = sources.split(documents.documents, held_out)
  maker = tokenization.make(tokenizer, (d.read() for d in train), cache)
  return corpus_lib.Corpus(
    train=_encode(maker, train),
    eval=_encode(maker, held),
    tokenizer=maker,
    hash=documents.hash,
    facts={
      **documents.describe(),
      "split": how,
      "train_files": len(train),
      "eval_files": len(held),
    },
    train_bytes=sum(d.size for d in train),
    eval_bytes=sum(d.size for d in held),
    read_eval=lambda: b"".join(d.read() for d in held),
  )


def _encode(
  tokenizer: tokenization.Tokenizer, documents: Sequence[sources.Document]
) -> np.ndarray:
  """Ids of all documents `[tokens]`."""
  ids = np.concatenate(
    list(
      tokenization.encode_documents(
        tokenizer,
        (d.read() for d in documents),
        sum(d.size for d in documents),
        "tokenizing",
      )
    )
  )
  if not len(ids):
    raise errors.UserError("data: the tokenizer turned the text into no tokens")
  return ids
