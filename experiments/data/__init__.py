"""Text in, fixed batches of token windows out; nothing is downloaded."""

from experiments.data.corpus import Corpus, check_vocab
from experiments.data.load import load_corpus
from experiments.data.prefetch import Prefetcher
from experiments.data.stream import Stream, eval_batches

__all__ = (
  "Corpus",
  "Prefetcher",
  "Stream",
  "check_vocab",
  "eval_batches",
  "load_corpus",
)
