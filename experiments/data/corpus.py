"""A tokenised corpus: two token arrays and what is known of their bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from experiments import errors
from experiments.data import baselines, tokenization


class Tokens(Protocol):
  """What is asked of a token array: numpy arrays, memory maps, shards."""

  dtype: np.dtype

  def __len__(self) -> int:
    """Tokens in all."""

  def __getitem__(self, index: slice) -> np.ndarray:
    """The tokens `[stop - start]` of a slice without a step."""


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Training and held-out tokens.

  Attributes:
    train: token ids `[train_tokens]`.
    eval: held-out token ids `[eval_tokens]`.
    tokenizer: made them.
    hash: 12 hex digits; losses compare only between equal ones.
    facts: what records say about it, JSON-ready; `describe` adds the rest.
    train_bytes: bytes that `train` encodes, or None where nobody knows.
    eval_bytes: the same of `eval`.
    read_eval: returns the held-out files' bytes one behind another, or None.
  """

  train: Tokens
  eval: Tokens
  tokenizer: tokenization.Tokenizer
  hash: str
  facts: dict[str, Any]
  train_bytes: int | None = None
  eval_bytes: int | None = None
  read_eval: Callable[[], bytes] | None = None

  @property
  def eval_bytes_per_token(self) -> float | None:
    """Turns nats per token into bits per byte; None where bytes are unknown.

    Tokens that end a document count as tokens and stand for no byte.
    """
    return self.eval_bytes and self.eval_bytes / len(self.eval)

  def describe(self) -> dict[str, Any]:
    """All that a record should say about the corpus, JSON-ready."""
    return {
      "hash": self.hash,
      **self.facts,
      "tokenizer": self.tokenizer.name,
      "vocab_size": self.tokenizer.vocab_size,
      "train_tokens": len(self.train),
      "train_bytes": self.train_bytes,
      "eval_tokens": len(self.eval),
      "eval_bytes": self.eval_bytes,
    }

  def summary(self) -> str:
    """One line for a person."""
    return summary(self.describe())

  def baselines(self) -> dict[str, dict[str, float]]:
    """Each baseline's "nats_per_token" and "bits_per_byte", by name.

    Those that cannot be given in bits per byte are left out.
    """
    out = {}
    unigram = baselines.unigram(self)
    if unigram["bits_per_byte"] is not None:
      out["unigram frequencies"] = unigram
    if self.read_eval is not None:
      content = self.read_eval()
      name = "xz -9"
      if len(content) > baselines.XZ_LIMIT:
        name += f" (first {baselines.XZ_LIMIT >> 20} MiB)"
      bits = baselines.xz_bits_per_byte(content)
      nats = bits * np.log(2) * self.eval_bytes_per_token
      out[name] = {"nats_per_token": float(nats), "bits_per_byte": bits}
    return out


def summary(facts: dict[str, Any]) -> str:
  """One line for a person from what `Corpus.describe` gives."""
  files = ""
  if "files" in facts:
    files = f", {facts['files']} file{'s' * (facts['files'] != 1)}"
  python = f" {facts['python']}" if "python" in facts else ""
  size = "" if facts["train_bytes"] is None else (
    f" ({facts['train_bytes'] + facts['eval_bytes']:,} bytes)"
  )  # fmt: skip
  return (
    f"{facts['source']}{python}{files}{size}, hash {facts['hash']}, tokenizer "
    f"{facts['tokenizer']}: {facts['train_tokens']:,} tokens to train on, "
    f"{facts['eval_tokens']:,} held out ({facts['split']})"
  )


def check_vocab(
  model_vocab_size: int, tokenizer: tokenization.Tokenizer
) -> None:
  """Refuses a model whose vocabulary lacks some of the tokenizer's ids.

  Raises:
    UserError: `model_vocab_size` is too small.
  """
  if model_vocab_size < tokenizer.vocab_size:
    raise errors.UserError(
      f"model.vocab_size: got {model_vocab_size}; the tokenizer "
      f"{tokenizer.name!r} needs at least {tokenizer.vocab_size}"
    )
