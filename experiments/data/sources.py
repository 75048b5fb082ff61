"""Where documents come from, and which of them are held out.

A document is a whole file. Its name is relative to the corpus, with forward
slashes, so that order, split and hash are the same on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

from experiments import errors
from experiments.data import files as files_lib
from jaxlib_ext import config as config_lib

SOURCES = ("files", "python", "shards")
_CONTINUATION = bytes(range(0x80, 0xC0))

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
  """One file, or one range of its text, read when asked.

  Attributes:
    name: relative to the corpus, with forward slashes.
    path: where it lies on this machine.
    start: the first byte of its text, which is what `files.blocks` yields.
    stop: one past the last byte.
    digest: SHA-256 of the whole file's text, 32 bytes.
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

  def blocks(self) -> Iterator[bytes]:
    """Yields the bytes in blocks of about `files.BLOCK`.

    Raises:
      UserError: the file cannot be read or is shorter than it was.
    """
    position = 0
    for block in files_lib.blocks(self.path):
      part = block[max(self.start - position, 0) : self.stop - position]
      position += len(block)
      if part:
        yield part
      if position >= self.stop:
        return
    raise errors.UserError(f"data.path: {self.path} changed while in use")

  def read(self) -> bytes:
    """All bytes at once; raises what `blocks` raises."""
    return b"".join(self.blocks())


@dataclasses.dataclass(frozen=True)
class Documents:
  """The documents of a corpus, sorted by name.

  Attributes:
    source: "python" or "files".
    documents: at least one, none of them empty.
    binary: files left out because they hold a NUL byte or are damaged.
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
  without tests and installed packages. "files" is what `files.find` finds:
  text, also packed by gzip or in UTF-16. Files with a NUL byte count as
  binary and are skipped; so are empty files and exact duplicates. A line on
  stderr names what is neither text, empty nor a duplicate.

  Args:
    source: "python" or "files".
    path: for "files".

  Raises:
    UserError: an unknown source, or nothing that can be read as text.
  """
  if source == "python":
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = files_lib.walk(root, _is_library, links=False)
    return _documents(source, found, str(root))
  if source == "files":
    return _documents(source, files_lib.find(path), path)
  raise errors.UserError(
    f"data.source: got {source!r}; {config_lib.nearest(source, SOURCES)}"
  )


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
  size = document.size
  at = document.stop - int(size * held_out)
  line = _line(dataclasses.replace(document, start=at))
  if line is not None and line < document.stop:
    at = line
  elif at < document.stop:
    # Never inside a UTF-8 character.
    tail = next(dataclasses.replace(document, start=at).blocks())
    at += len(tail) - len(tail.lstrip(_CONTINUATION))
  if not document.start < at < document.stop:
    raise errors.UserError(
      f"data.path: the only file, {document.name}, has {size} bytes: too few "
      f"to hold out {held_out:g} of them"
    )
  return (
    dataclasses.replace(document, stop=at),
    dataclasses.replace(document, start=at),
  )


def _line(document: Document) -> int | None:
  """Where the first whole line starts, if there is a line end at all."""
  position = document.start
  if document.size:
    for block in document.blocks():
      found = block.find(b"\n")
      if found >= 0:
        return position + found + 1
      position += len(block)
  return None


def _is_library(name: str) -> bool:
  *folders, file = name.split("/")
  # _sysconfigdata and config-* hold the paths of whoever built Python.
  return (
    file.endswith(".py")
    and not file.startswith("_sysconfigdata")
    and not any(f in _NOT_LIBRARY or f.startswith("config-") for f in folders)
  )


def _documents(source: str, found: files_lib.Found, where: str) -> Documents:
  documents, seen, binary, duplicates = [], set(), 0, 0
  for name, path in found.files:
    try:
      size, digest = _measure(path)
    except files_lib.DamagedError as e:
      binary += 1
      found.leave_out(e.reason, name)
      continue
    if size is None:
      binary += 1
      found.leave_out("binary, with a NUL byte", name)
    elif digest in seen:
      duplicates += 1
    elif size:
      seen.add(digest)
      documents.append(Document(name, path, 0, size, digest))
  if not documents:
    count = len(found.files)
    raise errors.UserError(
      f"data.path: no text in {where}: {count} file{'s' * (count != 1)}, "
      f"{found.reasons() or 'all empty'}"
    )
  found.report(where)
  return Documents(source, tuple(documents), binary, duplicates)


def _measure(path: pathlib.Path) -> tuple[int | None, bytes]:
  """Bytes of a file's text, None if it is binary, and their SHA-256."""
  size, digest = 0, hashlib.sha256()
  for block in files_lib.blocks(path):
    if b"\0" in block:
      return None, b""
    size += len(block)
    digest.update(block)
  return size, digest.digest()
