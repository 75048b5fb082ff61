"""Files that others may have changed: read whole, checked once, in one way.

A file that is missing or may not be opened is an OSError. Anything else that
is wrong with it is a `ReadError` of one line: no regular file, too large, not
UTF-8, not JSON, nested too deeply, another shape.
"""

from __future__ import annotations

import json
import os
import pathlib
import stat
from typing import Any

# Far above any description, far below what would fill a machine.
LIMIT = 256 << 20
_NESTING = 100


class ReadError(ValueError):
  """A file whose content is not what it must be."""


def read_text(path: str | os.PathLike, *, limit: int = LIMIT) -> str:
  """Reads a regular file of UTF-8.

  Args:
    path: of the file; a symbolic link to one is followed.
    limit: bytes that it may have.

  Raises:
    OSError: there is no such file, or it may not be read.
    ReadError: a directory, a pipe or a device; too large; not UTF-8; a path
      with a NUL.
  """
  if "\0" in os.fspath(path):
    raise ReadError(f"{os.fspath(path)!r}: a path has no NUL")
  # Without O_NONBLOCK a pipe would wait for its writer.
  handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  try:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
      raise ReadError(f"{path}: got {kind_of(status)}; allowed: a regular file")
    if status.st_size > limit:
      raise ReadError(
        f"{path}: got {status.st_size} bytes; allowed: at most {limit}"
      )
    with open(handle, "rb", closefd=False) as f:
      content = f.read()
  finally:
    os.close(handle)
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as e:
    raise ReadError(f"{path}: not UTF-8 at byte {e.start}") from e


def read_json(
  path: str | os.PathLike, shape: Any = dict, *, nan: bool = False
) -> Any:
  """Reads a JSON file.

  Args:
    path: of the file.
    shape: as for `require`.
    nan: as for `parse_json`.

  Raises:
    OSError: as `read_text`.
    ReadError: as `read_text`, `parse_json` and `require`.
  """
  text = read_text(path)
  return require(parse_json(text, str(path), nan=nan), shape, str(path))


def parse_json(text: str, where: str, *, nan: bool = False) -> Any:
  """Parses JSON.

  Args:
    text: one value.
    where: the file, for the message.
    nan: whether NaN and Infinity, which JSON has not, are numbers.

  Raises:
    ReadError: not JSON, or nested more than 100 deep.
  """

  def refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")

  # Python's parser recurses, and so does whoever walks what it returns.
  if text.count("[") + text.count("{") > _NESTING and _depth(text) > _NESTING:
    raise ReadError(f"{where}: nested more than {_NESTING} deep")
  try:
    return json.loads(text, **({} if nan else {"parse_constant": refuse}))
  except (ValueError, RecursionError) as e:
    reason = str(e) if text.strip() else "the file is empty"
    raise ReadError(f"{where}: not JSON: {reason}") from e


def _depth(text: str) -> int:
  """Nesting of brackets outside of strings."""
  depth = deepest = 0
  quoted = escaped = False
  for c in text:
    if quoted:
      quoted = escaped or c != '"'
      escaped = c == "\\" and not escaped
    elif c == '"':
      quoted = True
    elif c in "[{":
      depth += 1
      deepest = max(deepest, depth)
    elif c in "]}":
      depth -= 1
  return deepest


def require(value: Any, shape: Any, where: str) -> Any:
  """Returns `value`, which must have a shape.

  Args:
    value: as JSON gives it.
    shape: a type (`float` takes whole numbers too, a bool is no number); a
      dict of the shapes of named fields, where "name?" may be absent and
      fields without a shape are anything; `{str: shape}` for any names; or
      `[shape]` for a list.
    where: the file and field, for the message.

  Raises:
    ReadError: another shape.
  """
  if isinstance(shape, list):
    for i, item in enumerate(require(value, list, where)):
      require(item, shape[0], f"{where}: [{i}]")
  elif isinstance(shape, dict):
    require(value, dict, where)
    if str in shape:
      shape = dict.fromkeys(value, shape[str])
    for key, inner in shape.items():
      name = key.removesuffix("?")
      if name in value:
        require(value[name], inner, f"{where}: {name}")
      elif name == key:
        raise ReadError(f"{where}: has no field {name!r}")
  else:
    allowed = (int, float) if shape is float else (shape,)
    number = shape in (int, float) and isinstance(value, bool)
    if number or not isinstance(value, allowed):
      raise ReadError(
        f"{where}: got {_excerpt(value)}; allowed: {_JSON_NAMES[shape]}"
      )
  return value


_JSON_NAMES = {
  bool: "true or false",
  dict: "an object",
  float: "a number",
  int: "a whole number",
  list: "a list",
  str: "text",
}


def _excerpt(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def plain_name(name: Any, where: str) -> str:
  """Returns a name of a file that lies beside the one that lists it.

  Raises:
    ReadError: no text, empty, a path, `.` or `..`.
  """
  require(name, str, where)
  if name in ("", ".", "..") or set(name) & set("/\\\0"):
    raise ReadError(
      f"{where}: got {_excerpt(name)}; allowed: the plain name of a file"
    )
  return name


def kind_of(status: os.stat_result) -> str:
  """Says what a file is: "a directory", "a pipe"."""
  return _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")


_KINDS = {
  stat.S_IFREG: "a regular file",
  stat.S_IFDIR: "a directory",
  stat.S_IFLNK: "a symbolic link",
  stat.S_IFIFO: "a pipe",
  stat.S_IFSOCK: "a socket",
  stat.S_IFBLK: "a device",
  stat.S_IFCHR: "a device",
}


def check_tree(directory: str | os.PathLike) -> None:
  """Sees to it that a directory holds directories and regular files only.

  A pipe among them would make its reader wait for ever, and a link lead
  elsewhere.

  Raises:
    OSError: it cannot be listed.
    ReadError: it is no directory itself, or holds something else.
  """
  directory = pathlib.Path(directory)
  status = directory.lstat()
  if not stat.S_ISDIR(status.st_mode):
    raise ReadError(
      f"{directory.name}: got {kind_of(status)}; allowed: a directory"
    )
  for entry in os.scandir(directory):
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
      check_tree(entry.path)
    elif not stat.S_ISREG(status.st_mode):
      raise ReadError(
        f"{entry.name}: got {kind_of(status)}; allowed: a regular file"
      )
