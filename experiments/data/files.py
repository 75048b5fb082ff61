"""Files below a path: which there are, and their text in blocks."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import gzip
import io
import os
import pathlib
import stat
import sys
import zlib
from collections.abc import Callable, Iterator

from experiments import errors

BLOCK = 1 << 20
_GZIP = b"\x1f\x8b\x08"
# UTF-32 first: its little-endian mark begins like that of UTF-16.
_MARKS = {
  codecs.BOM_UTF32_LE: "utf-32",
  codecs.BOM_UTF32_BE: "utf-32",
  codecs.BOM_UTF16_LE: "utf-16",
  codecs.BOM_UTF16_BE: "utf-16",
}
_KINDS = (
  (stat.S_ISDIR, "a directory"),
  (stat.S_ISFIFO, "a FIFO"),
  (stat.S_ISSOCK, "a socket"),
  (stat.S_ISCHR, "a device"),
  (stat.S_ISBLK, "a device"),
)
_SHOWN = 3


class DamagedError(errors.UserError):
  """A file is not what its first bytes say.

  Args:
    path: of the file.
    reason: why it cannot be read.
  """

  def __init__(self, path: pathlib.Path, reason: str):
    super().__init__(f"data.path: cannot read {path}: {reason}")
    self.reason = reason


@dataclasses.dataclass
class Found:
  """Files of a corpus.

  Attributes:
    files: sorted (name relative to the corpus, path).
    left_out: names of what else is there, by the reason.
  """

  files: list[tuple[str, pathlib.Path]]
  left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def leave_out(self, reason: str, name: str) -> None:
    """Notes that a file cannot be used."""
    self.left_out.setdefault(reason, []).append(name)

  def reasons(self) -> str:
    """The reasons with the first names of each, on one line."""
    out = []
    for reason, names in self.left_out.items():
      shown = ", ".join(map(ascii, sorted(names)[:_SHOWN]))
      more = len(names) - _SHOWN
      out.append(f"{reason}: {shown}{f' and {more} more' * (more > 0)}")
    return "; ".join(out)

  def report(self, where: str) -> None:
    """Says in one line on stderr what was left out, if anything was."""
    if self.left_out:
      print(f"data.path: left out in {where}: {self.reasons()}",
            file=sys.stderr)  # fmt: skip


def find(path: str) -> Found:
  """Finds the files of a path, a directory (taken recursively) or a glob.

  Hidden files are left out. Links to directories are followed, to each
  directory once, so that loops end.

  Raises:
    UserError: the path is empty, absent, no file or matches none.
  """
  if not path:
    raise errors.UserError("data.path: expected a file, directory or glob")
  if "\0" in path:
    raise errors.UserError(f"data.path: got {path!r}, which has a NUL")
  try:
    expanded = pathlib.Path(path).expanduser()
    found = _find(path, expanded)
  except (RuntimeError, ValueError) as e:  # An unknown ~user.
    if isinstance(e, errors.UserError):
      raise
    raise errors.UserError(f"data.path: got {path!r}: {e}") from e
  except OSError as e:
    raise errors.UserError(
      f"data.path: cannot read {path!r}: {e.strerror}"
    ) from e
  if not found.files:
    if found.left_out:
      raise errors.UserError(
        f"data.path: no files in {path}: {found.reasons()}"
      )
    raise errors.UserError(f"data.path: no files in {path}")
  return found


def walk(
  root: pathlib.Path, wanted: Callable[[str], bool], *, links: bool = True
) -> Found:
  """Finds the files below a directory whose relative names are wanted.

  Args:
    root: the directory.
    wanted: says it of a name.
    links: follow links to directories.

  Raises:
    UserError: a directory that cannot be read.
  """

  def refuse(e: OSError):
    raise errors.UserError(
      f"data.path: cannot read {e.filename}: {e.strerror}"
    ) from e

  found, seen, tops = Found([]), set(), [root]
  # Directories before links to them, so that their names are their own.
  while tops:
    for folder, folders, names in os.walk(tops.pop(0), onerror=refuse):
      info = os.stat(folder)
      if (info.st_dev, info.st_ino) in seen:
        folders.clear()
        continue
      seen.add((info.st_dev, info.st_ino))
      folders[:] = sorted(f for f in folders if not f.startswith("."))
      if links:
        paths = [pathlib.Path(folder, f) for f in folders]
        tops += [p for p in paths if p.is_symlink()]
      for file in names:
        path = pathlib.Path(folder, file)
        name = path.relative_to(root).as_posix()
        if not file.startswith(".") and wanted(name):
          _add(found, name, path)
  found.files.sort()
  return found


def kind(path: str | os.PathLike) -> str | None:
  """What a path is, such as "a FIFO"; None for a plain file."""
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError:
    return "a link to nothing" if os.path.islink(path) else "absent"
  except OSError as e:
    return (e.strerror or str(e)).lower()
  if stat.S_ISREG(mode):
    return None
  return next((name for test, name in _KINDS if test(mode)), "no file")


def blocks(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the bytes of a text file in blocks of about `BLOCK`.

  Files packed by gzip are unpacked, and UTF-16 and UTF-32, known by their
  byte-order mark, become UTF-8; all other bytes are as they are.

  Raises:
    DamagedError: what begins like gzip or UTF-16 is not.
    UserError: the file cannot be read.
  """
  reason = kind(path)
  if reason is not None:
    raise errors.UserError(f"data.path: cannot read {path}: it is {reason}")
  try:
    with open(path, "rb") as raw:
      packed = raw.read(len(_GZIP)) == _GZIP
      raw.seek(0)
      yield from _decoded(gzip.GzipFile(fileobj=raw) if packed else raw)
  except (EOFError, zlib.error, gzip.BadGzipFile) as e:
    raise DamagedError(path, f"damaged gzip: {e}") from e
  except UnicodeError as e:
    raise DamagedError(path, f"no {e.encoding} in spite of its mark") from e
  except OSError as e:
    raise errors.UserError(
      f"data.path: cannot read {path}: {e.strerror}"
    ) from e


def _find(path: str, expanded: pathlib.Path) -> Found:
  reason = kind(expanded)
  if reason == "a directory":
    return walk(expanded, lambda name: True)
  if reason is None:
    return Found([(expanded.name, expanded)])
  if not glob.has_magic(path):
    if reason == "absent":
      raise errors.UserError(f"data.path: {path!r} does not exist")
    raise errors.UserError(f"data.path: cannot read {path!r}: {reason}")
  found = Found([])
  parts = expanded.parts
  fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
  root = pathlib.Path(*parts[:fixed])
  for match in sorted(glob.glob(str(expanded), recursive=True)):
    if not os.path.isdir(match):
      match = pathlib.Path(match)
      _add(found, match.relative_to(root).as_posix(), match)
  found.files.sort()
  return found


def _add(found: Found, name: str, path: pathlib.Path) -> None:
  reason = kind(path)
  if reason is None:
    found.files.append((name, path))
  else:
    found.leave_out(reason, name)


def _decoded(stream: io.BufferedIOBase) -> Iterator[bytes]:
  block = stream.read(BLOCK)
  encoding = next((e for m, e in _MARKS.items() if block.startswith(m)), None)
  if encoding is None:
    while block:
      yield block
      block = stream.read(BLOCK)
    return
  decoder = codecs.getincrementaldecoder(encoding)()
  while block:
    yield decoder.decode(block).encode()
    block = stream.read(BLOCK)
  decoder.decode(b"", final=True)
