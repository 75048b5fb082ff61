"""One file of token ids: `.npy`, llm.c's `.bin` and headerless `.bin`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

import numpy as np

from experiments import errors
from experiments.data import files

_CHUNK = 1 << 20
# llm.c's files begin with 256 words: magic, version, tokens. Its GPT-2 files
# are version 1 of the first magic, its Llama-3 files version 7 of the second.
_HEADER = np.dtype("<i4"), 256
_LLMC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_LLMC_EVAL = 20240522
# Fewer ids say nothing about their width.
_ENOUGH = 8


def read(path: pathlib.Path, vocab_size: int | None = None) -> np.ndarray:
  """Maps the ids of a file `[tokens]`, uint16 or uint32.

  A headerless `.bin` file is of uint16, as nanoGPT writes it, unless its
  tokenizer has more than 65536 ids, or every second half-word is zero: then it
  is of uint32, since no text has the id 0 at every second place.

  Args:
    path: of the file.
    vocab_size: of the tokenizer; None for uint16 without a look.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  reason = files.kind(path)
  if reason is not None:
    raise errors.UserError(f"data.path: cannot read {path}: it is {reason}")
  try:
    _refuse_holes(path)
    if path.suffix == ".npy":
      array = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
      array = _bin(path, vocab_size)
  except OSError as e:
    raise errors.UserError(
      f"data.path: cannot read {path}: {e.strerror or e}"
    ) from e
  except Exception as e:  # What numpy raises for a damaged header varies.
    detail = " ".join(str(e).split())
    raise errors.UserError(f"data.path: cannot read {path}: {detail}") from e
  if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32):
    raise errors.UserError(
      f"data.path: {path} holds {array.dtype} of shape {array.shape}, allowed: "
      "a vector of uint16 or uint32"
    )
  return array


def write(
  output: pathlib.Path,
  split: str,
  parts: Iterable[np.ndarray],
  size: int,
  *,
  wide: bool,
) -> tuple[list[str], int]:
  """Writes ids into files of `size` ids, one part in memory at a time.

  Args:
    output: directory.
    split: what the names begin with.
    parts: vectors of ids.
    size: ids of every file but the last.
    wide: as `.npy` of uint32, else as `.bin` of uint16.

  Returns:
    The names of the files, and the ids in all.
  """
  names, total, shard = [], 0, None
  try:
    for part in parts:
      while len(part):
        if shard is None:
          end = "npy" if wide else "bin"
          name = f"{split}_{len(names):05d}.{end}"
          shard = _Shard(output / name, wide)
          names.append(name)
        room = size - shard.count
        shard.add(part[:room])
        total += len(part[:room])
        part = part[room:]
        if shard.count == size:
          shard.close()
          shard = None
    if shard is not None:
      shard.close()
      shard = None
  finally:
    if shard is not None:
      shard.abandon()
  return names, total


class _Shard:
  """A file that grows beside its name, and is renamed when it is whole."""

  def __init__(self, path: pathlib.Path, wide: bool):
    self.count = 0
    self._path, self._wide = path, wide
    self._dtype = np.dtype("<u4" if wide else "<u2")
    self._part = path.with_name(path.name + ".part")
    self._file = open(self._part, "xb")  # Never through a link.
    self._header()

  def _header(self) -> None:
    # As long for every count: numpy leaves room for the digits.
    if self._wide:
      np.lib.format.write_array_header_1_0(
        self._file,
        {
          "descr": self._dtype.str,
          "fortran_order": False,
          "shape": (self.count,),
        },
      )

  def add(self, ids: np.ndarray) -> None:
    ids.astype(self._dtype).tofile(self._file)
    self.count += len(ids)

  def close(self) -> None:
    self._file.seek(0)
    self._header()
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    os.replace(self._part, self._path)

  def abandon(self) -> None:
    self._file.close()
    self._part.unlink(missing_ok=True)


def _bin(path: pathlib.Path, vocab_size: int | None) -> np.ndarray:
  size, start = path.stat().st_size, 0
  dtype = np.dtype("<u2")
  head = np.fromfile(path, _HEADER[0], min(_HEADER[1], size // 4))
  magic = int(head[0]) if len(head) else 0
  if magic == _LLMC_EVAL:
    raise ValueError("it has the header of llm.c's multiple-choice files")
  if magic in _LLMC:
    start, dtype = _llmc(head, size)
  elif vocab_size is not None and _is_wide(path, size, vocab_size):
    dtype = np.dtype("<u4")
  if (size - start) % dtype.itemsize:
    raise ValueError(f"{size} bytes are no whole number of {dtype.name}")
  if size == start:
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, mode="r", offset=start)


def _llmc(head: np.ndarray, size: int) -> tuple[int, np.dtype]:
  """Where the ids start and their type, from a checked header."""
  version, dtype = _LLMC[int(head[0])]
  start = _HEADER[0].itemsize * _HEADER[1]
  if size < start:
    raise ValueError(f"llm.c's header is cut short, at {size} of {start} bytes")
  if head[1] != version:
    raise ValueError(f"llm.c's header has version {head[1]}, not {version}")
  if start + int(head[2]) * dtype.itemsize != size:
    raise ValueError(
      f"llm.c's header says {head[2]} ids of {dtype.name}, the file has "
      f"{size - start} bytes of them"
    )
  return start, dtype


def _is_wide(path: pathlib.Path, size: int, vocab_size: int) -> bool:
  if vocab_size > 1 << 16:
    return True
  if size % 4 or size < 4 * _ENOUGH:
    return False
  halves = np.memmap(path, "<u2", mode="r")
  return not any(
    halves[i + 1 : i + _CHUNK : 2].any() for i in range(0, len(halves), _CHUNK)
  ) and bool(halves[::2].any())


def _refuse_holes(path: pathlib.Path) -> None:
  with open(path, "rb") as f:
    size = os.fstat(f.fileno()).st_size
    hole = os.lseek(f.fileno(), 0, os.SEEK_HOLE) if size else 0
  if hole < size:
    raise ValueError(
      f"it has a hole at byte {hole} of {size}: a copy that was not finished?"
    )
