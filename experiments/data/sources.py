"""Where documents come from, and which of them are held out.

A document is a whole file. Its name is relative to the corpus, with forward
slashes, so that order, split and hash are the same on every machine.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Sequence

from experiments import errors
from jaxlib_ext import config as config_lib

SOURCES = ("files", "python", "shards")

# Tests and second copies of modules that are elsewhere in the library.
_NOT_LIBRARY = frozenset(
  {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
  }
)


@dataclasses.dataclass(frozen=True)
class Document:
  """One file, or one range of its bytes, read when asked.

  Attributes:
    name: relative to the corpus, with forward slashes.
    path: where it lies on this machine.
    start: the first byte.
    stop: one past the last byte.
    digest: SHA-256 of the whole file, 32 bytes.
  """

  name: str
  path: pathlib.Path
  start: int
  stop: int
  digest: bytes

  @property
  def size(self) -> int:
    """Bytes in the document."""
    return self.stop - self.start

  def read(self) -> bytes:
    """The bytes.

    Raises:
      UserError: the file cannot be read or is shorter than it was.
    """
    content = _read(self.path)[self.start : self.stop]
    if len(content) != self.size:
      raise errors.UserError(f"data.path: {self.path} changed while in use")
    return content


@dataclasses.dataclass(frozen=True)
class Documents:
  """The documents of a corpus, sorted by name.

  Attributes:
    source: "python" or "files".
    documents: at least one, none of them empty.
    binary: files left out because they hold a NUL byte.
    duplicates: files left out because an earlier one has the same bytes; kept,
      they could put the same text in both splits.
  """

  source: str
  documents: tuple[Document, ...]
  binary: int = 0
  duplicates: int = 0

  @property
  def size(self) -> int:
    """Bytes in all documents."""
    return sum(d.size for d in self.documents)

  @property
  def hash(self) -> str:
    """12 hex digits of the SHA-256 over every name and content."""
    return corpus_hash((d.name, d.digest) for d in self.documents)

  def describe(self) -> dict[str, str | int]:
    """What a record says about the source; no path of this machine."""
    out = {
      "source": self.source,
      "files": len(self.documents),
      "bytes": self.size,
      "binary_files_skipped": self.binary,
      "duplicate_files_skipped": self.duplicates,
    }
    if self.source == "python":
      out["python"] = platform.python_version()
    return out


def corpus_hash(files: Iterable[tuple[str, bytes]]) -> str:
  """Hashes (name, SHA-256 of the content) pairs; 12 hex digits."""
  total = hashlib.sha256()
  for name, digest in files:
    encoded = os.fsencode(name)
    total.update(len(encoded).to_bytes(8, "little") + encoded + digest)
  return total.hexdigest()[:12]


def load_documents(source: str, path: str = "") -> Documents:
  """Finds the documents of a source.

  "python" is every .py file of the running interpreter's standard library,
  without tests and installed packages. "files" is a file, a directory (taken
  recursively) or a glob; hidden files are left out. Files with a NUL byte
  count as binary and are skipped; so are empty files and exact duplicates.

  Args:
    source: "python" or "files".
    path: for "files".

  Raises:
    UserError: an unknown source, or nothing that can be read as text.
  """
  if source == "python":
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return _documents(source, _walk(root, _is_library), str(root))
  if source == "files":
    return _documents(source, find_files(path), path)
  raise errors.UserError(
    f"data.source: got {source!r}; {config_lib.nearest(source, SOURCES)}"
  )


def find_files(path: str) -> list[tuple[str, pathlib.Path]]:
  """Sorted (relative name, path) of a file, directory or glob.

  Raises:
    UserError: the path is empty, absent or matches no file.
  """
  if not path:
    raise errors.UserError("data.path: expected a file, directory or glob")
  expanded = pathlib.Path(path).expanduser()
  if expanded.is_dir():
    found = _walk(expanded, lambda name: True)
  elif expanded.exists():
    found = [(expanded.name, expanded)]
  elif glob.has_magic(path):
    parts = expanded.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = pathlib.Path(*parts[:fixed])
    found = sorted(
      (p.relative_to(root).as_posix(), p)
      for p in map(pathlib.Path, glob.glob(str(expanded), recursive=True))
      if p.is_file()
    )
  else:
    raise errors.UserError(f"data.path: {path} does not exist")
  if not found:
    raise errors.UserError(f"data.path: no files in {path}")
  return found


def split(
  documents: Sequence[Document], held_out: float
) -> tuple[list[Document], list[Document], str]:
  """Splits into training and held-out documents, by whole files.

  Files are visited in the order of a hash of their names and held out while
  they fit into `held_out` of the bytes; the visit ends at 95% of that. Where
  none fits, the smallest is held out. The only file of a corpus cannot be
  held out whole: there the tail is, from a line's start where there is one.

  Args:
    documents: sorted by name.
    held_out: share of the bytes, between 0 and 1.

  Returns:
    Training documents, held-out documents, and how they were split: "whole
    files" or "tail of the only file".

  Raises:
    UserError: `held_out` out of range, or an only file too short to cut.
  """
  if not 0 < held_out < 1:
    raise errors.UserError(
      f"data.held_out: got {held_out}, allowed: between 0 and 1"
    )
  if len(documents) == 1:
    head, tail = _cut(documents[0], held_out)
    return [head], [tail], "tail of the only file"
  room = held_out * sum(d.size for d in documents)
  order = sorted(
    documents, key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest()
  )
  chosen, total = set(), 0
  for document in order:
    if total >= 0.95 * room:
      break
    if total + document.size <= room and len(chosen) < len(order) - 1:
      chosen.add(document.name)
      total += document.size
  if not chosen:
    chosen.add(min(order, key=lambda d: d.size).name)
  return (
    [d for d in documents if d.name not in chosen],
    [d for d in documents if d.name in chosen],
    "whole files",
  )


def _cut(document: Document, held_out: float) -> tuple[Document, Document]:
  content = document.read()
  size = len(content)
  cut = size - int(size * held_out)
  line = content.find(b"\n", cut) + 1
  if 0 < line < size:
    cut = line
  else:
    # Never inside a UTF-8 character.
    while cut < size and content[cut] & 0xC0 == 0x80:
      cut += 1
  if not 0 < cut < size:
    raise errors.UserError(
      f"data.path: the only file, {document.name}, has {size} bytes: too few "
      f"to hold out {held_out:g} of them"
    )
  at = document.start + cut
  return (
    dataclasses.replace(document, stop=at),
    dataclasses.replace(document, start=at),
  )


def _is_library(name: str) -> bool:
  *folders, file = name.split("/")
  # _sysconfigdata and config-* hold the paths of whoever built Python.
  return (
    file.endswith(".py")
    and not file.startswith("_sysconfigdata")
    and not any(f in _NOT_LIBRARY or f.startswith("config-") for f in folders)
  )


def _walk(
  root: pathlib.Path, wanted: Callable[[str], bool]
) -> list[tuple[str, pathlib.Path]]:
  def refuse(e: OSError):
    raise errors.UserError(
      f"data.path: cannot read {e.filename}: {e.strerror}"
    ) from e

  found = []
  for folder, folders, files in os.walk(root, onerror=refuse):
    folders[:] = [f for f in folders if not f.startswith(".")]
    for file in files:
      path = pathlib.Path(folder, file)
      name = path.relative_to(root).as_posix()
      if not file.startswith(".") and wanted(name) and path.is_file():
        found.append((name, path))
  return sorted(found)


def _documents(
  source: str, files: Sequence[tuple[str, pathlib.Path]], where: str
) -> Documents:
  documents, seen, binary, duplicates = [], set(), 0, 0
  for name, path in files:
    content = _read(path)
    digest = hashlib.sha256(content).digest()
    if b"\0" in content:
      binary += 1
    elif digest in seen:
      duplicates += 1
    elif content:
      seen.add(digest)
      documents.append(Document(name, path, 0, len(content), digest))
  if not documents:
    kind = "binary (they hold a NUL byte)" if binary else "empty"
    raise errors.UserError(
      f"data.path: no text in {where}: {len(files)} files, all {kind}"
    )
  return Documents(source, tuple(documents), binary, duplicates)


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as e:
    raise errors.UserError(
      f"data.path: cannot read {path}: {e.strerror}"
    ) from e
