"""Shards: the same corpus as its source, other people's files, the main."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers

from experiments import data, errors
from experiments.data import shards

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path):
  root = tmp_path / "text"
  root.mkdir()
  for i in range(12):
    (root / f"{i:02}.txt").write_text(f"file {i} größe 🙂\n" * (20 + i))
  return str(root)


@pytest.mark.parametrize("shard_tokens", [100, 1 << 20])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_shards_are_the_corpus(text, tmp_path, tokenizer, shard_tokens):
  source = data.load_corpus("files", text, tokenizer=tokenizer, held_out=0.2)
  output = tmp_path / "shards"
  meta = shards.write(source, output, shard_tokens=shard_tokens)
  run = tmp_path / "run"
  read = data.load_corpus(
    "shards", str(output), tokenizer="bpe:999", cache_dir=run
  )
  np.testing.assert_array_equal(read.train[:], source.train)
  np.testing.assert_array_equal(read.eval[:], source.eval)
  assert read.hash == source.hash
  assert read.eval_bytes_per_token == source.eval_bytes_per_token
  described = read.describe()
  assert described.pop("shards") == sum(
    len(s["files"]) for s in meta["splits"].values()
  )
  assert described == source.describe()
  assert read.tokenizer.name == tokenizer
  assert (run / "tokenizer.json").read_bytes() == (
    output / "tokenizer.json"
  ).read_bytes()
  unigram = "unigram frequencies"
  assert read.baselines() == {unigram: source.baselines()[unigram]}
  for step in (0, 5):
    np.testing.assert_array_equal(
      data.Stream(read.train, batch_size=3, seq_len=33).batch(step),
      data.Stream(source.train, batch_size=3, seq_len=33).batch(step),
    )
  assert isinstance(read.train, np.memmap) == (shard_tokens > 100)


def test_concatenation_slices_like_an_array():
  arrays = [np.arange(5), np.zeros(0, int), np.arange(5, 6), np.arange(6, 20)]
  joined, whole = shards.Concatenation(arrays), np.arange(20)
  assert len(joined) == 20
  for start in range(-3, 23):
    for stop in (start - 1, start, start + 1, start + 7, None):
      np.testing.assert_array_equal(joined[start:stop], whole[start:stop])
  with pytest.raises(ValueError, match="step of 2"):
    joined[::2]


def test_wide_ids_are_npy(tmp_path):
  words = {f"w{i}": i for i in range(70000)}
  tokenizer = hf.Tokenizer(models.WordLevel(words, unk_token="w0"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(tmp_path / "wide.json"))
  root = tmp_path / "text"
  root.mkdir()
  for i in range(4):
    (root / f"{i}.txt").write_text(f"w{69990 + i} w1 " * 30)
  source = data.load_corpus(
    "files", str(root), tokenizer=str(tmp_path / "wide.json")
  )
  meta = shards.write(source, tmp_path / "shards")
  assert meta["splits"]["train"]["files"] == ["train_00000.npy"]
  read = data.load_corpus("shards", str(tmp_path / "shards"))
  assert read.train.dtype == np.uint32
  np.testing.assert_array_equal(read.train, source.train)


def foreign(root: pathlib.Path, **files) -> str:
  root.mkdir(exist_ok=True)
  for name, ids in files.items():
    if name.endswith("_npy"):
      np.save(root / f"{name[:-4]}.npy", np.asarray(ids))
    else:
      np.asarray(ids, "<u2").tofile(root / f"{name[:-4]}.bin")
  return str(root)


def u2(*ids) -> np.ndarray:
  return np.asarray(ids, np.uint16)


@pytest.mark.parametrize(
  ("files", "train", "held", "how"),
  [
    ({"a_npy": u2(1, 2), "b_bin": u2(3)}, [1, 2], [3], "last shard, b.bin"),
    ({"train_bin": u2(1), "val_bin": u2(3, 4)}, [1], [3, 4], "val or eval"),
    ({"a_Eval_npy": u2(1), "b_npy": u2(3, 4)}, [3, 4], [1], "val or eval"),
    ({"a_npy": np.arange(100, dtype=np.uint32)}, range(95), range(95, 100),
     "tail of the only shard"),
  ],
)  # fmt: skip
def test_anybodys_shards(tmp_path, files, train, held, how):
  corpus = data.load_corpus("shards", foreign(tmp_path / "s", **files))
  assert corpus.train[:].tolist() == list(train)
  assert corpus.eval[:].tolist() == list(held)
  assert how in corpus.facts["split"]
  assert corpus.eval_bytes_per_token is None
  assert corpus.baselines() == {}
  json.dumps(corpus.describe())
  assert corpus.hash in corpus.summary()


def test_the_hash_of_anybodys_shards(tmp_path):
  hashes = {
    data.load_corpus("shards", foreign(tmp_path / "s", a_bin=a, b_bin=b)).hash
    for a, b in [(u2(1, 2), u2(3)), (u2(1, 4), u2(3)), (u2(1, 2), u2(4))]
  }
  assert len(hashes) == 3


def llmc(magic: int, version: int, ids: np.ndarray) -> np.ndarray:
  """llm.c's file as half-words: 256 words of header, then the ids."""
  header = np.zeros(256, "<i4")
  header[:3] = magic, version, len(ids)
  return np.frombuffer(header.tobytes() + ids.tobytes(), "<u2")


IDS = np.arange(1, 201, dtype=np.uint32)


@pytest.mark.parametrize(
  "content",
  [
    IDS.astype("<u2"),
    IDS.view("<u2"),
    llmc(20240520, 1, IDS.astype("<u2")),
    llmc(20240801, 7, IDS),
  ],
  ids=["uint16", "uint32", "llm.c GPT-2", "llm.c Llama-3"],
)
def test_bin_files_of_every_kind(tmp_path, content):
  path = foreign(tmp_path / "s", a_bin=content)
  corpus = data.load_corpus("shards", path)
  read = np.concatenate([corpus.train[:], corpus.eval[:]])
  np.testing.assert_array_equal(read, IDS)


def test_wide_vocabularies_have_bin_files_of_uint32(tmp_path):
  words = {f"w{i}": i for i in range(70000)}
  tokenizer = hf.Tokenizer(models.WordLevel(words, unk_token="w0"))
  tokenizer.save(str(tmp_path / "wide.json"))
  ids = np.asarray([69999, 65536, 3] * 9, "<u4")
  path = foreign(tmp_path / "s", a_bin=ids.view("<u2"))
  where = str(tmp_path / "wide.json")
  corpus = data.load_corpus("shards", path, tokenizer=where)
  assert corpus.train[:3].tolist() == [69999, 65536, 3]


def test_a_file_with_a_hole_is_refused_at_once(tmp_path):
  with open(tmp_path / "a.bin", "wb") as f:
    f.write(b"\1\0" * 4096)
    f.truncate(1 << 42)
  with pytest.raises(errors.UserError, match="a hole at byte"):
    data.load_corpus("shards", str(tmp_path))


def test_other_files_beside_shards_are_named(tmp_path, capsys):
  path = foreign(tmp_path / "s", a_bin=u2(1, 2), b_bin=u2(3))
  (tmp_path / "s" / "c.bin.gz").write_bytes(b"")
  data.load_corpus("shards", path)
  line = capsys.readouterr().err
  assert line.count("\n") == 1 and "c.bin.gz" in line


LLMC = np.frombuffer(np.int32([20240520, 1, 9]).tobytes(), np.uint16)


@pytest.mark.parametrize(
  ("files", "tokenizer", "words"),
  [
    ({}, "bytes", ["no files"]),
    ({"a_npy": u2(1, 300)}, "bytes", ["id 300", "'bytes'", "256", "a.npy"]),
    ({"a_npy": np.ones(3)}, "bytes", ["float64", "uint16 or uint32"]),
    ({"a_npy": np.ones((2, 2), np.uint16)}, "bytes", ["(2, 2)"]),
    ({"a_npy": np.ones(3, np.int64)}, "bytes", ["int64"]),
    ({"a_npy": u2(), "b_npy": u2(1)}, "bytes", ["no tokens"]),
    ({"val1_npy": u2(1), "val2_npy": u2(1)}, "bytes", ["all 2 shards"]),
    ({"a_bin": u2(1), "b_bin": u2(1)}, "bpe:300", ["bpe:300", "meta.json"]),
    ({"a_bin": LLMC}, "bytes", ["header", "cut short"]),
    ({"a_bin": llmc(20240520, 7, u2(1, 2))}, "bytes", ["version 7"]),
    ({"a_bin": llmc(20240801, 7, u2(1))}, "bytes", ["1 ids of uint32"]),
    ({"a_bin": llmc(20240522, 1, u2(1, 2))}, "bytes", ["multiple-choice"]),
  ],
)
def test_bad_shards(tmp_path, files, tokenizer, words):
  path = foreign(tmp_path / "s", **files)
  with pytest.raises(errors.UserError) as e:
    data.load_corpus("shards", path, tokenizer=tokenizer)
  for word in words:
    assert word in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("a.bin", b"abc", ["3 bytes"]),
    ("a.npy", b"no numpy file", ["a.npy"]),
    ("a.npy", b"", ["a.npy"]),
    ("a.txt", b"text", [".npy or .bin"]),
  ],
)
def test_damaged_shards(tmp_path, name, content, words):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError) as e:
    data.load_corpus("shards", str(tmp_path))
  for word in words:
    assert word in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "damage", ["short", "gone", "meta", "format", "id", "out"]
)
def test_damaged_directories(text, tmp_path, damage):
  output = tmp_path / "shards"
  shards.write(data.load_corpus("files", text), output)
  shard, meta = output / "train_00000.bin", output / "meta.json"
  if damage == "short":
    shard.write_bytes(shard.read_bytes()[:-2])
  elif damage == "gone":
    shard.unlink()
  elif damage == "meta":
    meta.write_text("{")
  elif damage == "format":
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 9}))
  elif damage == "out":
    meta.write_text(meta.read_text().replace("train_00000", "../s/train_00000"))
  else:
    shard.write_bytes(shard.read_bytes()[:-2] + u2(999).tobytes())
  with pytest.raises(errors.UserError) as e:
    data.load_corpus("shards", str(output))
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("tokenizer", 3),
    ("hash", None),
    ("corpus", []),
    ("splits", "train"),
    ("splits", {"train": []}),
    ("train", {"tokens": "9", "bytes": 9, "files": ["train_00000.bin"]}),
    ("train", {"tokens": 9, "bytes": [], "files": ["train_00000.bin"]}),
    ("train", {"tokens": 9, "bytes": 9, "files": "train_00000.bin"}),
    ("train", {"tokens": 9, "bytes": 9, "files": [7]}),
    ("train", {"tokens": 9, "bytes": 9, "files": []}),
    ("deep", None),
  ],
)
def test_meta_of_another_shape(text, tmp_path, key, value):
  output = tmp_path / "shards"
  shards.write(data.load_corpus("files", text), output)
  content = json.loads((output / "meta.json").read_text())
  (content["splits"] if key == "train" else content)[key] = value
  written = "[" * 99999 if key == "deep" else json.dumps(content)
  (output / "meta.json").write_text(written)
  with pytest.raises(errors.UserError) as e:
    data.load_corpus("shards", str(output))
  assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_overwriting_spares_other_files(text, tmp_path):
  corpus = data.load_corpus("files", text)
  output = tmp_path / "shards"
  output.mkdir()
  (output / "notes.txt").write_text("mine")
  with pytest.raises(errors.UserError, match="not empty; --overwrite"):
    shards.write(corpus, output)
  assert [p.name for p in output.iterdir()] == ["notes.txt"]
  shards.write(corpus, output, shard_tokens=100, overwrite=True)
  shards.write(corpus, output, overwrite=True)
  assert {p.name for p in output.iterdir()} == {
    "notes.txt",
    "train_00000.bin",
    "val_00000.bin",
    "tokenizer.json",
    "meta.json",
  }
  with pytest.raises(errors.UserError, match="shard_tokens: got 0"):
    shards.write(corpus, tmp_path / "new", shard_tokens=0)
  with pytest.raises(errors.UserError, match="not a directory"):
    shards.write(corpus, output / "notes.txt")


@pytest.mark.parametrize(
  "name", ["train_00000.bin", "val_00000.npy", "tokenizer.json", "meta.json"]
)
def test_files_of_others_are_not_overwritten(text, tmp_path, name):
  corpus = data.load_corpus("files", text)
  output = tmp_path / "shards"
  output.mkdir()
  (output / name).write_text("{}")
  with pytest.raises(errors.UserError, match=name):
    shards.write(corpus, output, overwrite=True)
  assert [(p.name, p.read_text()) for p in output.iterdir()] == [(name, "{}")]


def test_a_killed_writing_is_named_and_can_be_overwritten(text, tmp_path):
  corpus, output = data.load_corpus("files", text), tmp_path / "shards"

  def killed():
    yield corpus.train[:70]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    shards.write_parts(
      (killed(), ()), (0, 0), output, tokenizer=corpus.tokenizer, hash_="",
      facts={}, shard_tokens=50,
    )  # fmt: skip
  assert (output / "train_00000.bin").exists()
  (output / "train_00007.bin.part").write_bytes(b"cut")
  with pytest.raises(errors.UserError, match="not finished"):
    data.load_corpus("shards", str(output))
  shards.write(corpus, output, overwrite=True)
  assert not (output / "train_00007.bin.part").exists()
  read = data.load_corpus("shards", str(output))
  np.testing.assert_array_equal(read.train[:], corpus.train)


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "experiments.write_shards", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_the_main(text, tmp_path):
  output = tmp_path / "shards"
  done = run(
    "--source=files", f"--path={text}", "--tokenizer=bpe:280",
    f"--output={output}",
  )  # fmt: skip
  assert done.returncode == 0 and done.stderr == "", done
  assert data.load_corpus("shards", str(output)).tokenizer.vocab_size == 280
  done = run("--source=files", f"--path={text}", f"--output={output}")
  assert done.returncode == 2, done
  assert done.stderr.startswith("write_shards: --output")
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], ["--output"]),
    (["--outpt=x"], ["outpt"]),
    (["--output=OUT", "--source=shards"], ["'shards'", "python"]),
    (["--output=OUT", "--tokenizer=bits"], ["'bits'"]),
    (["--output=OUT", "--source=files", "--path=/nowhere"], ["/nowhere"]),
    (["--output=OUT", "stray"], ["'stray'"]),
  ],
)
def test_the_main_refuses(tmp_path, arguments, words):
  out = str(tmp_path / "out")
  done = run(*(a.replace("OUT", out) for a in arguments))
  assert done.returncode == 2 and done.stdout == "", done
  assert len(done.stderr.splitlines()) == 1, done
  for word in words:
    assert word in done.stderr
