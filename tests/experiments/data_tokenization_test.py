"""Tokenizers: round trips, end of documents, training, files."""

import itertools
import os
import re
import time

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers, processors

from experiments import data, errors
from experiments.data import pieces, tokenization
from models import hf_files

TEXT = [
  b"def f(x):\n  return x + 1\n\n\nclass A:\n  pass\n" * 20,
  "Die Größe der Straße; 日本語のテキスト, naïve café 🙂\n".encode() * 20,
]
CONTENTS = {
  "empty": b"",
  "ascii": b"return x + 1\n",
  "unicode": "größe 日本語 🙂 e\u0301".encode(),
  "spaces": b"  \n\n\t  x \r\n   ",
  "every byte": bytes(range(256)) * 2,
  "not UTF-8": b"caf\xe9 au lait \xff\xfe ok \xf0\x9f",
  "surrogate": b"a\xed\xa0\x80b",
  "special": b"before<|endoftext|>after",
}


@pytest.fixture(scope="module")
def bpe():
  return tokenization.train(320, TEXT)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_round_trip(bpe, content):
  for tokenizer in (tokenization.Bytes(), bpe):
    ids = tokenizer.encode(content)
    assert ids.dtype == np.uint16
    assert not len(ids) or ids.max() < tokenizer.vocab_size
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.decode(ids) == content.decode("utf-8", errors="replace")


def test_random_bytes_make_the_round_trip(bpe):
  content = np.random.default_rng(0).bytes(20000)
  assert bpe.decode_bytes(bpe.encode(content)) == content


def test_bytes_are_their_own_ids():
  np.testing.assert_array_equal(
    tokenization.Bytes().encode(b"\x00a\xff"), [0, 97, 255]
  )


def test_text_never_spells_the_end(bpe):
  assert bpe.eod == 0
  assert bpe.eod not in bpe.encode(b"a<|endoftext|>b")
  assert bpe.decode([0]) == hf_files.END


def test_training_is_deterministic(bpe, tmp_path):
  paths = [tmp_path / "a.json", tmp_path / "b.json"]
  bpe.save(paths[0])
  tokenization.train(320, iter(TEXT)).save(paths[1])
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_size(bpe):
  assert bpe.vocab_size == 320
  smallest = tokenization.train(257, TEXT)
  assert smallest.vocab_size == 257
  assert len(smallest.encode(TEXT[0])) == len(TEXT[0])
  assert len(bpe.encode(TEXT[0])) < len(TEXT[0]) / 2
  assert tokenization.train(5000, [b"tiny text"]).vocab_size < 300


def test_long_documents_are_cut_where_tokens_end(bpe, monkeypatch):
  content = b"".join(TEXT) * 3
  whole = bpe.encode(content)
  monkeypatch.setattr(pieces, "PIECE", 50)
  assert len(list(pieces.runs(content))) > 10
  np.testing.assert_array_equal(bpe.encode(content), whole)


def test_batches_encode_like_single_documents(bpe):
  contents = list(CONTENTS.values())
  for ids, content in zip(bpe.encode_batch(contents), contents, strict=True):
    np.testing.assert_array_equal(ids, bpe.encode(content))


def test_every_document_is_ended(bpe):
  for tokenizer in (tokenization.Bytes(), bpe):
    parts = tokenization.encode_documents(
      tokenizer, [[b"a", b"b"], [b"c"]], 3, ""
    )
    expected = [*tokenizer.encode(b"ab"), 0, *tokenizer.encode(b"c"), 0]
    assert np.concatenate(list(parts)).tolist() == expected


def test_save_and_load(bpe, tmp_path):
  for i, tokenizer in enumerate((tokenization.Bytes(), bpe)):
    path = tmp_path / f"{i}.json"
    tokenizer.save(path)
    loaded = tokenization.load(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.eod == tokenizer.eod
    for content in CONTENTS.values():
      np.testing.assert_array_equal(
        loaded.encode(content), tokenizer.encode(content)
      )
  assert {p.name for p in tmp_path.iterdir()} == {"0.json", "1.json"}


def word_level(**kwargs) -> hf.Tokenizer:
  words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "cat": 3, "sat": 4}
  tokenizer = hf.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(["<s>", "</s>"])
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
  )
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=9)
  return tokenizer


def test_anybodys_file(tmp_path):
  """No special tokens, cuts or padding of the file's own; bad bytes pass."""
  path = tmp_path / "tokenizer.json"
  word_level().save(str(path))
  tokenizer = tokenization.make(str(path), ())
  assert (tokenizer.vocab_size, tokenizer.eod) == (5, 2)
  assert tokenizer.encode(b"cat sat cat \xff").tolist() == [3, 4, 3, 0]
  assert tokenizer.decode([3, 4]) == "cat sat"
  with pytest.raises(ValueError, match="not byte-level"):
    tokenizer.decode_bytes([3])


# With a wide bar and the blank of SentencePiece.
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize(
  ("names", "end"),
  [
    (["<eos>", "</s>"], "</s>"),
    (["[EOS]", "[BOS]"], "[EOS]"),
    ([DEEPSEEK_END], DEEPSEEK_END),
    (["<EOS>"], "<EOS>"),
    (["<|END_OF_TEXT|>"], "<|END_OF_TEXT|>"),
    (["<|endofdocument|>", "<|eot|>"], "<|endofdocument|>"),
    (["<eod>"], "<eod>"),
    (["<|beginoftext|>", "[PAD]", "eos", "end of text"], None),
  ],
)
def test_ends_by_the_letters_of_their_names(names, end):
  words = {"cat": 0} | {name: i for i, name in enumerate(names, 1)}
  tokenizer = hf.Tokenizer(models.WordLevel(words, unk_token="cat"))
  assert tokenization.Subwords(tokenizer, "x").eod == words.get(end)


def test_a_file_that_is_no_tokenizer_is_not_read_whole(tmp_path):
  path = tmp_path / "tokenizer.json"
  with open(path, "wb") as file:
    file.truncate(10**12)
  with pytest.raises(errors.UserError, match="1000000000000 bytes, allowed"):
    tokenization.load(path)


def test_wide_vocabularies_need_uint32():
  words = {f"w{i}": i for i in range(70000)}
  tokenizer = hf.Tokenizer(models.WordLevel(words, unk_token="w0"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  wide = tokenization.Subwords(tokenizer, "wide")
  assert wide.dtype == np.uint32 and wide.eod is None
  assert wide.encode(b"w69999").tolist() == [69999]


def test_unknown_ids(bpe):
  with pytest.raises(ValueError, match="no id 60000"):
    bpe.decode([60000])


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("bites", ["'bites'", "did you mean 'bytes'"]),
    ("bpe:many", ["bpe:many", "257", "65535"]),
    ("bpe:256", ["bpe:256", "257"]),
    ("bpe:65536", ["bpe:65536", "65535"]),
    ("bpe:-300", ["bpe:-300"]),
    ("bpe:", ["bpe:"]),
    ("/nowhere/tokenizer.json", ["/nowhere", "no file"]),
    ("", ["''"]),
  ],
)
def test_bad_names(tmp_path, spec, words):
  (tmp_path / "a.txt").write_text("words " * 100)
  with pytest.raises(errors.UserError) as e:
    data.load_corpus("files", str(tmp_path), tokenizer=spec)
  for word in words:
    assert word in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {}}'])
def test_damaged_files(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  path.write_text(content)
  with pytest.raises(errors.UserError, match="no tokenizer.json") as e:
    tokenization.make(str(path), ())
  assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_a_directory_is_no_tokenizer(tmp_path):
  with pytest.raises(errors.UserError, match=re.escape(str(tmp_path))):
    tokenization.make(str(tmp_path), ())


def test_a_pipe_is_no_tokenizer(tmp_path):
  os.mkfifo(tmp_path / "tokenizer.json")
  with pytest.raises(errors.UserError, match="a FIFO"):
    tokenization.load(tmp_path / "tokenizer.json")


def test_the_cache_is_used(bpe, tmp_path):
  cache = tmp_path / "run" / "tokenizer.json"
  made = tokenization.make("bpe:300", TEXT, cache)
  never = itertools.chain.from_iterable(iter(lambda: 1 / 0, None))
  again = tokenization.make("bpe:300", never, cache)
  assert again.name == made.name == "bpe:300"
  np.testing.assert_array_equal(again.encode(TEXT[1]), made.encode(TEXT[1]))


def test_only_training_files_train_the_tokenizer(tmp_path):
  words = ("common words " * 40, "xylophonically " * 40)
  for i in range(20):
    (tmp_path / f"{i:02}.txt").write_text(f"{i} " + words[0])
  corpus = data.load_corpus("files", str(tmp_path), held_out=0.06)
  held = corpus.read_eval()
  for path in tmp_path.iterdir():
    if path.read_bytes() == held:
      path.write_text(words[1])
  corpus = data.load_corpus(
    "files", str(tmp_path), held_out=0.07, tokenizer="bpe:400"
  )
  assert b"xylo" in corpus.read_eval()
  assert len(corpus.tokenizer.encode(b"xylophonically")) > 10
  assert len(corpus.tokenizer.encode(b" common")) == 1


@pytest.mark.parametrize("alphabet", ["ACGT", "abcdefghijklmnopqrstuvwxyz"])
def test_words_without_end_train_in_seconds(alphabet):
  """1 MiB without white space; without bounds it takes an hour."""
  letters = np.frombuffer(alphabet.encode(), np.uint8)
  text = np.random.default_rng(0).choice(letters, 1 << 20).tobytes()
  start = time.process_time()
  tokenizer = tokenization.train(600, [text])
  assert time.process_time() - start < 60
  assert tokenizer.vocab_size == 600
  ids = tokenizer.encode(text)
  assert tokenizer.decode_bytes(ids) == text and len(ids) < len(text) / 1.5


def test_long_words_are_bounded_in_training_alone(tmp_path):
  tokenizer = tokenization.train(300, [b"a" * 10000])
  longest = max(
    len(t) for t in tokenizer._tokenizer.get_vocab() if "|" not in t
  )
  assert longest == pieces.WORD
  tokenizer.save(tmp_path / "t.json")
  assert '"Split"' not in (tmp_path / "t.json").read_text()


def test_training_ends_where_its_words_fill_the_room(monkeypatch, capsys):
  texts = [b"first words " * 9, b"second words", b"third"]
  assert list(pieces.material(texts)) == [t.decode() for t in texts]
  assert capsys.readouterr().err == ""
  monkeypatch.setattr(pieces, "ROOM", 900)
  assert list(pieces.material(texts)) == [t.decode() for t in texts[:2]]
  assert "the first 120 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_blocks_of_any_size_make_the_same_tokens(bpe, monkeypatch, size):
  monkeypatch.setattr(pieces, "PIECE", 40)
  content = b"".join(TEXT) + b"ab1c2" * 300 + b"\xff\xe6\x97" + b"\xf0\x9f" * 99
  blocks = [content[i : i + size] for i in range(0, len(content), size)]
  parts = list(pieces.cut(blocks))
  assert b"".join(parts) == content
  assert max(len(p.decode(errors="replace")) for p in parts) <= 80
  monkeypatch.undo()
  ids = np.concatenate(bpe.encode_batch(parts))
  np.testing.assert_array_equal(ids, bpe.encode(content))
