"""Turns text into token shards that training maps into memory.

  python -m experiments.write_shards --source=files --path=DIR \
    --tokenizer=bpe:8192 --output=SHARDS
  python -m experiments.pretrain --set=data.source=shards \
    --set=data.path=SHARDS

The format is described in `experiments.data.shards`.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import errors
from experiments.data import corpus as corpus_lib
from experiments.data import load, shards
from jaxlib_ext import config as config_lib


def main() -> None:
  """Writes the shards."""
  values = flags.FLAGS
  if not values.output:
    raise errors.UserError("--output: expected the directory to write")
  if values.source not in ("files", "python"):
    raise errors.UserError(
      f"--source: got {values.source!r}; "
      f"{config_lib.nearest(values.source, ('files', 'python'))}"
    )
  output = pathlib.Path(values.output).expanduser()
  # Before the tokenizing, which may take long.
  shards.claim(output, overwrite=values.overwrite)
  texts = load.open_texts(
    values.source,
    values.path,
    tokenizer=values.tokenizer,
    held_out=values.held_out,
  )
  meta = shards.write_parts(
    (texts.encode(texts.train), texts.encode(texts.eval)),
    (texts.train_bytes, texts.eval_bytes),
    output,
    tokenizer=texts.tokenizer,
    hash_=texts.hash,
    facts=texts.facts,
    shard_tokens=values.shard_tokens,
    overwrite=values.overwrite,
  )
  splits = meta["splits"]
  facts = {
    **texts.facts,
    "hash": texts.hash,
    "tokenizer": texts.tokenizer.name,
    "train_tokens": splits["train"]["tokens"],
    "train_bytes": texts.train_bytes,
    "eval_tokens": splits["val"]["tokens"],
    "eval_bytes": texts.eval_bytes,
  }
  files = sum(len(split["files"]) for split in splits.values())
  print(
    f"{corpus_lib.summary(facts)}\nwritten to {output}: {files} shards, "
    "meta.json"
  )


def _define_flags() -> None:
  flags.DEFINE_string("source", "python", "python or files.")
  flags.DEFINE_string("path", "", "File, directory or glob, for files.")
  flags.DEFINE_string(
    "tokenizer", "bytes", "bytes, bpe:SIZE or the path of a tokenizer.json."
  )
  flags.DEFINE_float(
    "held_out", 0.05, "Share of the bytes held out, in whole files."
  )
  flags.DEFINE_string("output", None, "Directory for the shards.")
  flags.DEFINE_integer("shard_tokens", shards.SHARD_TOKENS, "Tokens per shard.")
  flags.DEFINE_bool(
    "overwrite", False, "Replace the shards in a directory that is not empty."
  )


if __name__ == "__main__":
  errors.run_main("write_shards", main, _define_flags)
