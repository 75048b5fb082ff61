"""Append-only JSON Lines, and the facts that every record must carry."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxlib_ext import reading

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_LIMIT = 4 << 30


def append(path: str | os.PathLike, record: dict[str, Any]) -> None:
  """Adds one JSON object as one line, in a single write."""
  line = json.dumps(record, default=_plain) + "\n"
  with open(path, "a", encoding="utf-8", opener=own_file) as f:
    f.write(line)


def own_file(path: str | os.PathLike, flags: int) -> int:
  """An `opener` of `open` that writes through no symbolic link or pipe.

  Raises:
    OSError: `path` is one.
  """
  return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def read(path: str | os.PathLike, shape: Any = dict) -> list[dict[str, Any]]:
  """Reads the records of a file; a last line cut short by a kill is left out.

  Args:
    path: of JSON Lines; none is no records.
    shape: of each record, as for `reading.require`.

  Raises:
    reading.ReadError: what cannot be read, or a damaged line that is not the
      last, named by its number.
  """
  try:
    lines = reading.read_text(path, limit=_LIMIT).splitlines()
  except FileNotFoundError:
    return []
  out = []
  for number, line in enumerate(lines, 1):
    where = f"{os.fspath(path)}, line {number}"
    try:
      value = reading.parse_json(line, where, nan=True)
    except reading.ReadError:
      if number < len(lines):
        raise
    else:
      out.append(reading.require(value, shape, where))
  return out


def find(
  known: Iterable[dict[str, Any]], job: dict[str, Any]
) -> dict[str, Any] | None:
  """The first record that has all fields of a job as JSON has them, if any."""
  job = json.loads(json.dumps(job, default=_plain))
  return next((r for r in known if job.items() <= r.items()), None)


def keep(
  path: str | os.PathLike, wanted: Callable[[dict[str, Any]], bool]
) -> None:
  """Rewrites the file, atomically, with only the records that are wanted.

  A resumed run drops what it will write again, and the line that a kill cut.
  """
  path = pathlib.Path(path)
  if path.exists():
    lines = [json.dumps(r) + "\n" for r in read(path) if wanted(r)]
    write_atomically(path, "".join(lines))


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes an indented JSON file so that no reader ever sees half of it."""
  write_atomically(path, json.dumps(value, indent=2, default=_plain) + "\n")


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes beside the file, then renames."""
  path = pathlib.Path(path)
  part = path.with_name(path.name + ".part")
  with open(part, "w", encoding="utf-8", opener=own_file) as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(part, path)


def provenance() -> dict[str, Any]:
  """Versions, device, processor count and git revision of this process."""
  device = jax.devices()[0]
  return {
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
    "device": {
      "kind": device.device_kind,
      "platform": device.platform,
      "count": jax.device_count(),
      "processes": jax.process_count(),
      "cpus": os.cpu_count(),
      "processor": _processor(),
    },
    "git": _git_revision(),
  }


def _processor() -> str:
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      for line in f:
        if line.startswith("model name"):
          return line.split(":", 1)[1].strip()
  except OSError:
    pass
  return platform.processor()


def _git_revision() -> str | None:
  """The checkout's short hash, "+" behind it where tracked files differ."""
  root = pathlib.Path(__file__).resolve().parents[1]

  def git(*args):
    return subprocess.run(
      ["git", "-C", str(root), *args],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def _plain(value: Any) -> Any:
  """JSON's fallback: arrays of one element as numbers, all else as text."""
  if hasattr(value, "item") and getattr(value, "size", 2) == 1:
    return value.item()
  return str(value)
