"""Sources: what is read, what is held out, what the hash sees."""

import gzip
import os
import pathlib
import re
import sysconfig

import pytest

from experiments import data, device_memory, errors
from experiments.data import files, sources


def write(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return root


def numbered(count: int, size: int) -> dict[str, bytes]:
  return {
    f"{i:03}.txt": f"{i:03}\n".encode() * (size // 4) for i in range(count)
  }


def names(documents) -> list[str]:
  return [d.name for d in documents]


def test_python_is_the_library_without_tests_and_builds():
  found = sources.load_documents("python")
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  assert names(found.documents) == sorted(names(found.documents))
  assert {"os.py", "json/decoder.py"} <= set(names(found.documents))
  for document in found.documents:
    assert document.name.endswith(".py")
    folders = document.name.split("/")[:-1]
    assert not {"test", "tests", "site-packages", "idlelib"} & set(folders)
    assert not document.name.startswith("_sysconfigdata")
  first = found.documents[0]
  assert first.read() == (root / first.name).read_bytes()
  assert "python" in found.describe()
  assert str(root) not in str(found.describe())


def test_a_directory_is_read_recursively_and_sorted(tmp_path):
  write(
    tmp_path,
    {
      "b.txt": b"bb",
      "a/z.txt": b"az",
      "a/binary": b"x\0y",
      "copy.txt": b"bb",
      "empty": b"",
      ".hidden": b"h",
      ".git/config": b"g",
      "latin.txt": b"caf\xe9",
    },
  )
  found = sources.load_documents("files", str(tmp_path))
  assert names(found.documents) == ["a/z.txt", "b.txt", "latin.txt"]
  assert (found.binary, found.duplicates, found.size) == (1, 1, 8)


def test_a_link_to_nothing_is_no_file(tmp_path):
  (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
  write(tmp_path, {"a": b"text"})
  assert names(sources.load_documents("files", str(tmp_path)).documents) == [
    "a"
  ]


def test_a_glob_names_files_relative_to_its_fixed_part(tmp_path):
  write(tmp_path, {"x/a.txt": b"a", "x/y/b.txt": b"b", "x/c.md": b"c"})
  found = files.find(f"{tmp_path}/x/**/*.txt").files
  assert [name for name, _ in found] == ["a.txt", "y/b.txt"]


def test_a_path_with_brackets_that_exists_is_no_glob(tmp_path):
  write(tmp_path, {"a[1].txt": b"a"})
  found = files.find(str(tmp_path / "a[1].txt")).files
  assert [name for name, _ in found] == ["a[1].txt"]


@pytest.mark.parametrize("held_out", [0.05, 0.2, 0.5, 0.9])
def test_whole_files_are_held_out(tmp_path, held_out):
  write(tmp_path, numbered(100, 400))
  documents = sources.load_documents("files", str(tmp_path)).documents
  train, held, how = sources.split(documents, held_out)
  assert how == "whole files"
  assert not set(names(train)) & set(names(held))
  assert set(names(train)) | set(names(held)) == set(names(documents))
  share = sum(d.size for d in held) / sum(d.size for d in documents)
  assert 0.94 * held_out <= share <= held_out


def test_the_split_does_not_know_where_the_corpus_lies(tmp_path):
  splits = []
  for place in ("here", "there/deeper"):
    root = write(tmp_path / place, numbered(30, 100))
    documents = sources.load_documents("files", str(root))
    _, held, _ = sources.split(documents.documents, 0.1)
    splits.append((names(held), documents.hash))
  assert splits[0] == splits[1]


@pytest.mark.parametrize("sizes", [(8, 8), (8, 4000), (4000, 8, 8), (8,) * 12])
@pytest.mark.parametrize("held_out", [0.001, 0.05, 0.99])
def test_neither_split_is_empty(tmp_path, sizes, held_out):
  files = {f"{i}.txt": bytes([65 + i]) * n for i, n in enumerate(sizes)}
  write(tmp_path, files)
  documents = sources.load_documents("files", str(tmp_path)).documents
  train, held, _ = sources.split(documents, held_out)
  assert train and held
  assert len(train) + len(held) == len(sizes)


@pytest.mark.parametrize(
  "content", [b"line of text\n" * 100, "日本語".encode() * 100, b"a" * 300]
)
def test_the_only_file_is_cut(tmp_path, content):
  path = tmp_path / "only.txt"
  path.write_bytes(content)
  documents = sources.load_documents("files", str(path)).documents
  (head,), (tail,), how = sources.split(documents, 0.05)
  assert how == "tail of the only file"
  assert head.read() + tail.read() == content
  assert 0 < tail.size <= 0.05 * len(content)
  head.read().decode()
  tail.read().decode()
  if b"\n" in content:
    assert head.read().endswith(b"\n")


def test_the_hash_sees_names_and_contents(tmp_path):
  files = {"a.txt": b"first", "b.txt": b"second"}
  hashes = set()
  for i, changed in enumerate(
    (
      files,
      {**files, "b.txt": b"Second"},
      {**files, "c.txt": b"third"},
      {"a.txt": b"second", "b.txt": b"first"},
      {"a.txt": b"first", "d.txt": b"second"},
    )
  ):
    root = write(tmp_path / str(i), changed)
    hashes.add(sources.load_documents("files", str(root)).hash)
  assert len(hashes) == 5
  again = write(tmp_path / "again", files)
  hashes.add(sources.load_documents("files", str(again)).hash)
  assert len(hashes) == 5
  assert all(re.fullmatch("[0-9a-f]{12}", h) for h in hashes)


def test_a_file_that_shrinks_is_noticed(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"long enough")
  document = sources.load_documents("files", str(path)).documents[0]
  path.write_bytes(b"long")
  with pytest.raises(errors.UserError, match="changed while in use"):
    document.read()


@pytest.mark.parametrize(
  ("files", "source", "path", "words"),
  [
    ({}, "web", "", ["data.source", "'web'", "python", "files", "shards"]),
    ({}, "file", "", ["'file'", "did you mean 'files'"]),
    ({}, "files", "", ["data.path"]),
    ({}, "files", "{}/nowhere", ["nowhere", "does not exist"]),
    ({}, "files", "{}", ["no files"]),
    ({"a.md": b"a"}, "files", "{}/*.txt", ["no files", "*.txt"]),
    ({"a": b"\0", "b": b"\0\0"}, "files", "{}", ["2 files", "binary"]),
    ({"a": b""}, "files", "{}", ["no text", "empty"]),
    ({"a": b"short"}, "files", "{}", ["5 bytes", "0.05"]),
  ],
)
def test_bad_input(tmp_path, files, source, path, words):
  write(tmp_path, files)
  with pytest.raises(errors.UserError) as e:
    data.load_corpus(source, path.format(tmp_path))
  for word in words:
    assert word in str(e.value)
  assert "\n" not in str(e.value)


def test_held_out_is_a_share(tmp_path):
  write(tmp_path, numbered(3, 40))
  with pytest.raises(errors.UserError, match="data.held_out: got 1.5"):
    data.load_corpus("files", str(tmp_path), held_out=1.5)


TEXT = "größe 日本語 🙂\n" * 9


@pytest.mark.parametrize(
  "content",
  [
    gzip.compress(TEXT.encode()),
    TEXT.encode("utf-16"),
    b"\xfe\xff" + TEXT.encode("utf-16-be"),
    TEXT.encode("utf-32"),
    gzip.compress(TEXT.encode("utf-16")),
  ],
)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_packed_and_wide_text_is_read(tmp_path, monkeypatch, content, block):
  monkeypatch.setattr(files, "BLOCK", block)
  path = tmp_path / "a.txt"
  path.write_bytes(content)
  (document,) = sources.load_documents("files", str(path)).documents
  assert document.read().decode() == TEXT
  (head,), (tail,), _ = sources.split([document], 0.3)
  assert (head.read() + tail.read()).decode() == TEXT
  assert head.read().endswith(b"\n")


def test_what_is_left_out_is_named(tmp_path, capsys):
  write(
    tmp_path,
    {
      "a.txt": b"text",
      "b.gz": gzip.compress(b"text" * 99)[:-9],
      "c.bin": b"\0",
      "d.txt": b"\xff\xfe\x00\xd8a",
      "empty": b"",
    },
  )
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "gone").symlink_to("nowhere")
  (tmp_path / "self").symlink_to("self")
  found = sources.load_documents("files", str(tmp_path))
  assert names(found.documents) == ["a.txt"] and found.binary == 3
  line = capsys.readouterr().err
  assert line.count("\n") == 1
  for word in ("b.gz", "c.bin", "d.txt", "fifo", "gone", "self", "a FIFO"):
    assert word in line
  assert "empty" not in line


def test_linked_directories_are_read_once(tmp_path, capsys):
  corpus = write(tmp_path / "corpus", {"z/own.txt": b"own"})
  write(tmp_path / "other", {"deep/far.txt": b"far"})
  (corpus / "a").symlink_to(tmp_path / "other")
  (corpus / "b").symlink_to(corpus / "z")
  (corpus / "z" / "loop").symlink_to(corpus)
  (tmp_path / "other" / "back").symlink_to(corpus)
  found = sources.load_documents("files", str(corpus))
  assert names(found.documents) == ["a/deep/far.txt", "z/own.txt"]
  assert (found.duplicates, capsys.readouterr().err) == (0, "")


def test_a_hole_ends_the_reading(tmp_path):
  with open(tmp_path / "a", "wb") as f:
    f.write(b"text")
    f.truncate(1 << 40)
  with pytest.raises(errors.UserError, match="binary"):
    sources.load_documents("files", str(tmp_path))


@pytest.mark.parametrize(
  ("path", "word"),
  [
    ("/dev/zero", "a device"),
    ("{}/fifo", "a FIFO"),
    ("{}/f*", "a FIFO"),
    ("{}/a\0b", "NUL"),
    ("~nobody-of-this-name/x", "home directory"),
    ("{}/" + "x" * 5000, "too long"),
    ("{}/self", "symbolic links"),
  ],
)
@pytest.mark.parametrize("source", ["files", "shards"])
def test_paths_that_are_no_files(tmp_path, source, path, word):
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "self").symlink_to("self")
  with pytest.raises(errors.UserError) as e:
    data.load_corpus(source, path.format(tmp_path))
  assert word in str(e.value) and "\n" not in str(e.value)


def test_text_beyond_the_memory_is_refused(tmp_path, monkeypatch):
  write(tmp_path, numbered(3, 400))
  monkeypatch.setattr(device_memory, "host_bytes", lambda: 500)
  with pytest.raises(errors.UserError, match="800 bytes of mem.* has 500; sha"):
    data.load_corpus("files", str(tmp_path))
  monkeypatch.setattr(device_memory, "host_bytes", lambda: 0)
  data.load_corpus("files", str(tmp_path))
