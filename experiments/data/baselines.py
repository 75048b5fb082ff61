"""What a model must beat: token frequencies and a general compressor."""

from __future__ import annotations

import lzma
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from experiments.data import corpus as corpus_lib

XZ_LIMIT = 64 << 20
_CHUNK = 1 << 20


def unigram(corpus: corpus_lib.Corpus) -> dict[str, float | None]:
  """Cross-entropy of the held-out tokens under training frequencies.

  Counts are smoothed by one, so that no id has probability zero.

  Returns:
    "nats_per_token", and "bits_per_byte" or None where bytes are unknown.
  """
  size = corpus.tokenizer.vocab_size
  train = _counts(corpus.train, size) + 1
  held_out = _counts(corpus.eval, size)
  log_p = np.log(train / train.sum())
  nats = float(-(held_out @ log_p) / held_out.sum())
  ratio = corpus.eval_bytes_per_token
  return {
    "nats_per_token": nats,
    "bits_per_byte": nats / math.log(2) / ratio if ratio else None,
  }


def unigram_bits_per_byte(corpus: corpus_lib.Corpus) -> float | None:
  """`unigram` in bits per byte; None where bytes are unknown."""
  return unigram(corpus)["bits_per_byte"]


def xz_bits_per_byte(content: bytes) -> float:
  """Bits that xz, preset 9, needs per byte of the first 64 MiB.

  Raises:
    ValueError: nothing to compress.
  """
  content = content[:XZ_LIMIT]
  if not content:
    raise ValueError("content: got no bytes, expected at least one")
  return 8 * len(lzma.compress(content, preset=9)) / len(content)


def _counts(tokens: corpus_lib.Tokens, size: int) -> np.ndarray:
  """How often every id occurs `[size]`, in float64."""
  total = np.zeros(size)
  for start in range(0, len(tokens), _CHUNK):
    chunk = tokens[start : start + _CHUNK]
    total += np.bincount(chunk, minlength=size)
  return total
