"""Baselines against slow computations of the same numbers."""

import collections
import lzma
import math

import numpy as np
import pytest

from experiments import data, errors
from experiments.data import baselines, tokenization


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def corpus(request, tmp_path_factory):
  root = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for i in range(10):
    words = rng.choice(["alpha", "beta", "gamma", "größe"], 60 + i)
    (root / f"{i}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
  return data.load_corpus(
    "files", str(root), tokenizer=request.param, held_out=0.2
  )


def test_unigram(corpus):
  """One token at a time; sums of about 1000 float64 terms agree to 1e-12."""
  counts = collections.Counter(corpus.train.tolist())
  size = corpus.tokenizer.vocab_size
  total = sum(counts.values()) + size
  nats = 0.0
  for token in corpus.eval.tolist():
    nats -= math.log((counts[token] + 1) / total)
  expected = nats / math.log(2) / len(corpus.read_eval())
  assert baselines.unigram_bits_per_byte(corpus) == pytest.approx(
    expected, rel=1e-12
  )
  assert baselines.unigram(corpus)["nats_per_token"] == pytest.approx(
    nats / len(corpus.eval), rel=1e-12
  )


def test_counts_in_chunks(monkeypatch):
  monkeypatch.setattr(baselines, "_CHUNK", 7)
  tokens = np.random.default_rng(0).integers(0, 5, 100).astype(np.uint16)
  np.testing.assert_array_equal(
    baselines._counts(tokens, 6), [np.sum(tokens == i) for i in range(6)]
  )


def test_xz(corpus):
  content = corpus.read_eval()
  expected = 8 * len(lzma.compress(content, preset=9)) / len(content)
  assert baselines.xz_bits_per_byte(content) == expected
  assert corpus.baselines()["xz -9"]["bits_per_byte"] == expected


def test_xz_limit(monkeypatch):
  content = np.random.default_rng(0).bytes(1000) + bytes(9000)
  monkeypatch.setattr(baselines, "XZ_LIMIT", 1000)
  assert baselines.xz_bits_per_byte(content) == baselines.xz_bits_per_byte(
    content[:1000]
  )
  with pytest.raises(ValueError, match="no bytes"):
    baselines.xz_bits_per_byte(b"")


def test_the_units_agree(corpus):
  """All bits of the held-out files, from either unit; rounding only."""
  for value in corpus.baselines().values():
    by_token = value["nats_per_token"] / math.log(2) * len(corpus.eval)
    by_byte = value["bits_per_byte"] * len(corpus.read_eval())
    assert by_token == pytest.approx(by_byte, rel=1e-12)


def test_check_vocab():
  data.check_vocab(256, tokenization.Bytes())
  with pytest.raises(
    errors.UserError, match="model.vocab_size: got 255; .*'bytes' .*256"
  ):
    data.check_vocab(255, tokenization.Bytes())
