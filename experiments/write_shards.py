"""Turns text into token shards that training maps into memory.

  python -m experiments.write_shards --source=files --path=DIR \
    --tokenizer=bpe:8192 --output=SHARDS
  python -m experiments.pretrain --set=data.source=shards \
    --set=data.path=SHARDS

The format is described in `experiments.data.shards`.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments import data, errors
from experiments.data import shards
from jaxlib_ext import config as config_lib

_SOURCE = flags.DEFINE_string("source", "python", "python or files.")
_PATH = flags.DEFINE_string("path", "", "File, directory or glob, for files.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "bytes", "bytes, bpe:SIZE or the path of a tokenizer.json."
)
_HELD_OUT = flags.DEFINE_float(
  "held_out", 0.05, "Share of the bytes held out, in whole files."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the shards.")
_SHARD_TOKENS = flags.DEFINE_integer(
  "shard_tokens", shards.SHARD_TOKENS, "Tokens per shard."
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace the shards in a directory that is not empty."
)


def main(argv: Sequence[str]) -> None:
  """Writes the shards; a user's mistake ends in one line and exit code 2."""
  try:
    if len(argv) > 1:
      raise errors.UserError(f"unexpected argument {argv[1]!r}")
    print(_write())
  except (errors.UserError, OSError) as e:
    _fail(e)


def _write() -> str:
  if not _OUTPUT.value:
    raise errors.UserError("--output: expected the directory to write")
  if _SOURCE.value not in ("files", "python"):
    raise errors.UserError(
      f"--source: got {_SOURCE.value!r}; "
      f"{config_lib.nearest(_SOURCE.value, ('files', 'python'))}"
    )
  output = pathlib.Path(_OUTPUT.value).expanduser()
  # Before the tokenizing, which may take long.
  shards.claim(output, overwrite=_OVERWRITE.value)
  corpus = data.load_corpus(
    _SOURCE.value,
    _PATH.value,
    tokenizer=_TOKENIZER.value,
    held_out=_HELD_OUT.value,
  )
  meta = shards.write(
    corpus,
    output,
    shard_tokens=_SHARD_TOKENS.value,
    overwrite=_OVERWRITE.value,
  )
  files = sum(len(split["files"]) for split in meta["splits"].values())
  return f"{corpus.summary()}\nwritten to {output}: {files} shards, meta.json"


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    return _fail(e)


def _fail(error: Exception) -> None:
  print(f"write_shards: {error}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
