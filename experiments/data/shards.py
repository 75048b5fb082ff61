"""Token files on disk, memory-mapped.

A shard is a `.npy` file with a vector of uint16 or uint32, or a `.bin` file:
with the header of llm.c, which says the type, or headerless, of little-endian
uint16 or uint32 (see `bins.read`). A directory that `write` made also has
tokenizer.json and meta.json; the latter names the shards of each split, in
order, with the tokens and bytes they hold. Documents lie one behind another,
sorted by name, each followed by the tokenizer's end of a document; they may
run across shards.

Without a meta.json, files with "val" or "eval" in their names are held out; if
there are none, the last file by name is; a single file is split near its end.
"""

from __future__ import annotations

import bisect
import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments import errors
from experiments.data import bins, sources, tokenization
from experiments.data import corpus as corpus_lib
from experiments.data import files as files_lib
from jaxlib_ext import reading, records

FORMAT = 1
SHARD_TOKENS = 1 << 27
_SPLITS = ("train", "val")
_CHUNK = 1 << 20
_SHAPE = {
  "tokenizer": str,
  "hash": str,
  "corpus": dict,
  "splits": {s: {"tokens": int, "files": [str]} for s in _SPLITS},
}
# Names that `write_parts` writes.
_OURS = re.compile(
  r"((train|val)_\d+\.(bin|npy)|tokenizer\.json|meta\.json)(\.part)?"
)


class Concatenation:
  """Several token arrays that read as one, sliced without a step.

  Args:
    arrays: vectors, at least one, of one dtype.
  """

  def __init__(self, arrays: Sequence[np.ndarray]):
    self._arrays = list(arrays)
    self._ends = np.cumsum([len(a) for a in arrays]).tolist()
    self.dtype = self._arrays[0].dtype

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: slice) -> np.ndarray:
    start, stop, step = index.indices(len(self))
    if step != 1:
      raise ValueError(f"index: got a step of {step}, allowed: 1")
    parts = [np.zeros(0, self.dtype)]
    i = bisect.bisect_right(self._ends, start)
    while start < stop:
      begin = self._ends[i] - len(self._arrays[i])
      end = min(stop, self._ends[i])
      parts.append(self._arrays[i][start - begin : end - begin])
      start, i = end, i + 1
    return np.concatenate(parts)


def read(
  path: str,
  tokenizer: str = "bytes",
  held_out: float = 0.05,
  cache: pathlib.Path | None = None,
) -> corpus_lib.Corpus:
  """Opens shards; reads them once to check that no id is out of range.

  Args:
    path: directory, file or glob.
    tokenizer: of shards without a meta.json: "bytes" or the path of the
      tokenizer.json that made them. Other shards bring their own.
    held_out: share of the tokens, used only to split a single file.
    cache: where a copy of the tokenizer is left.

  Raises:
    UserError: nothing to read, an unknown dtype, an id that the tokenizer
      does not have, or shards that differ from their meta.json.
  """
  found = files_lib.find(path)
  meta = pathlib.Path(path).expanduser() / "meta.json"
  if meta.is_file():
    return _read_written(meta, cache)
  files = []
  for name, file in found.files:
    if file.suffix in (".npy", ".bin"):
      files.append((name, file))
    else:
      found.leave_out("neither .npy nor .bin", name)
  if not files:
    raise errors.UserError(f"data.path: no .npy or .bin files in {path}")
  if tokenizer.startswith("bpe:"):
    raise errors.UserError(
      f"data.tokenizer: got {tokenizer!r}, but {path} has no meta.json: give "
      "the path of the tokenizer.json that made the shards, or bytes"
    )
  made = tokenization.make(tokenizer, (), cache)
  found.report(path)
  arrays = {name: bins.read(file, made.vocab_size) for name, file in files}
  digests = [(name, _check(file, arrays[name], made)) for name, file in files]
  train, held, how = _split(arrays, held_out)
  return corpus_lib.Corpus(
    train=_joined(train),
    eval=_joined(held),
    tokenizer=made,
    hash=sources.corpus_hash(digests),
    facts={"source": "shards", "shards": len(files), "split": how},
  )


def _read_written(
  meta: pathlib.Path, cache: pathlib.Path | None
) -> corpus_lib.Corpus:
  try:
    content = _read_meta(meta)
  except (OSError, ValueError) as e:
    raise errors.UserError(f"data.path: cannot read {e}") from e
  if content.get("unfinished"):
    raise errors.UserError(f"data.path: {meta} says: not finished writing")
  splits = content["splits"]
  tokenizer = tokenization.load(meta.with_name("tokenizer.json"))
  tokenizer.name = content["tokenizer"]
  arrays = {}
  for split in _SPLITS:
    found = [(f, bins.read(meta.with_name(f))) for f in splits[split]["files"]]
    arrays[split] = _joined([array for _, array in found])
    if len(arrays[split]) != splits[split]["tokens"]:
      raise errors.UserError(
        f"data.path: {meta} lists {splits[split]['tokens']} tokens of "
        f"{split}, its shards hold {len(arrays[split])}"
      )
    for name, array in found:
      _check(meta.with_name(name), array, tokenizer)
  tokenization.keep(tokenizer, cache)
  return corpus_lib.Corpus(
    train=arrays["train"],
    eval=arrays["val"],
    tokenizer=tokenizer,
    hash=content["hash"],
    facts={
      **content["corpus"],
      "shards": sum(len(s["files"]) for s in splits.values()),
    },
    train_bytes=splits["train"].get("bytes"),
    eval_bytes=splits["val"].get("bytes"),
  )


def _read_meta(meta: pathlib.Path) -> dict[str, Any]:
  """What `write_parts` wrote; OSError or ValueError if it is something else."""
  content = reading.read_json(meta, {"format": int, "unfinished?": bool})
  if content["format"] != FORMAT:
    raise reading.ReadError(
      f"{meta}: format: got {content['format']}; allowed: {FORMAT}"
    )
  if not content.get("unfinished"):
    reading.require(content, _SHAPE, str(meta))
    for split in _SPLITS:
      where = f"{meta}: splits: {split}"
      facts = content["splits"][split]
      if facts.get("bytes") is not None:
        reading.require(facts["bytes"], int, f"{where}: bytes")
      for name in facts["files"]:
        reading.plain_name(name, f"{where}: files")
  return content


def write(
  corpus: corpus_lib.Corpus,
  output: pathlib.Path,
  *,
  shard_tokens: int = SHARD_TOKENS,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes a corpus as shards: `write_parts` of its tokens."""
  return write_parts(
    (_chunks(corpus.train), _chunks(corpus.eval)),
    (corpus.train_bytes, corpus.eval_bytes),
    output,
    tokenizer=corpus.tokenizer,
    hash_=corpus.hash,
    facts=corpus.facts,
    shard_tokens=shard_tokens,
    overwrite=overwrite,
  )


def write_parts(
  tokens: tuple[Iterable[np.ndarray], Iterable[np.ndarray]],
  sizes: tuple[int | None, int | None],
  output: pathlib.Path,
  *,
  tokenizer: tokenization.Tokenizer,
  hash_: str,
  facts: dict[str, Any],
  shard_tokens: int = SHARD_TOKENS,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes shards, tokenizer.json and meta.json, one array at a time.

  Each file is renamed into place whole. meta.json says that the directory is
  unfinished until the end.

  Args:
    tokens: of training and of evaluation, in arrays of any size.
    sizes: the bytes that each encodes, or None.
    output: made if absent.
    tokenizer: made the tokens.
    hash_: of the corpus.
    facts: of the corpus, JSON-ready.
    shard_tokens: tokens of every shard but the last of a split.
    overwrite: replace the shards in `output`; its other files stay.

  Returns:
    What meta.json holds.

  Raises:
    UserError: what `claim` raises, or a bad `shard_tokens`.
  """
  claim(output, overwrite=overwrite)
  if shard_tokens < 1:
    raise errors.UserError(
      f"shard_tokens: got {shard_tokens}, allowed: at least 1"
    )
  for name in _replaced(output):
    (output / name).unlink(missing_ok=True)
  # From here on the files are known as ours, should this be killed.
  records.write_json(
    output / "meta.json", {"format": FORMAT, "unfinished": True}
  )
  tokenizer.save(output / "tokenizer.json")
  splits = {}
  for split, parts, size in zip(_SPLITS, tokens, sizes, strict=True):
    wide = tokenizer.dtype.itemsize > 2
    files, count = bins.write(output, split, parts, shard_tokens, wide=wide)
    splits[split] = {"tokens": count, "bytes": size, "files": files}
    if not count:
      raise errors.UserError(f"data: no tokens in the split {split}")
  meta = {
    "format": FORMAT,
    "tokenizer": tokenizer.name,
    "vocab_size": tokenizer.vocab_size,
    "end_of_document": tokenizer.eod,
    "dtype": tokenizer.dtype.name,
    "order": "documents sorted by name",
    "hash": hash_,
    "corpus": facts,
    "splits": splits,
  }
  records.write_json(output / "meta.json", meta)
  return meta


def claim(output: pathlib.Path, *, overwrite: bool) -> None:
  """Makes the directory that shards go to.

  Raises:
    UserError: it is a file, holds something and `overwrite` is False, or
      holds files of the names that are written which no meta.json lists.
  """
  if output.exists() and not output.is_dir():
    raise errors.UserError(f"--output: {output} is not a directory")
  if output.exists() and any(output.iterdir()) and not overwrite:
    raise errors.UserError(
      f"--output: {output} is not empty; --overwrite replaces its shards"
    )
  output.mkdir(parents=True, exist_ok=True)
  _replaced(output)


def _replaced(output: pathlib.Path) -> list[str]:
  """Names of our own files in a directory; raises UserError for others'."""
  there = sorted(p.name for p in output.iterdir() if _OURS.fullmatch(p.name))
  meta, listed = output / "meta.json", set()
  if "meta.json" in there:
    try:
      content = _read_meta(meta)
    except (OSError, ValueError) as e:
      raise errors.UserError(
        f"--output: its meta.json is not of shards written here: {e}"
      ) from e
    if content.get("unfinished"):
      return there
    for split in _SPLITS:
      listed.update(content["splits"][split]["files"])
    listed |= {"meta.json", "tokenizer.json"}
  others = [name for name in there if name not in listed]
  if others:
    raise errors.UserError(
      f"--output: {output} holds {others[0]!r}, which no meta.json lists; "
      "move it away, or choose another directory"
    )
  return there


def _chunks(tokens: corpus_lib.Tokens) -> Iterator[np.ndarray]:
  for start in range(0, len(tokens), _CHUNK):
    yield tokens[start : start + _CHUNK]


def _check(
  path: pathlib.Path, array: np.ndarray, tokenizer: tokenization.Tokenizer
) -> bytes:
  """Returns the tokens' SHA-256; raises UserError for an id out of range."""
  digest = hashlib.sha256()
  for start in range(0, len(array), _CHUNK):
    chunk = array[start : start + _CHUNK]
    digest.update(chunk)
    if chunk.max() >= tokenizer.vocab_size:
      raise errors.UserError(
        f"data.path: {path} has token id {chunk.max()}, but the tokenizer "
        f"{tokenizer.name!r} has {tokenizer.vocab_size} ids; data.tokenizer "
        "must be the tokenizer.json that made the shards"
      )
  return digest.digest()


def _split(
  arrays: dict[str, np.ndarray], held_out: float
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
  """Training arrays, held-out arrays, and how they were split."""
  names = sorted(arrays)
  if len(names) == 1:
    only = arrays[names[0]]
    cut = len(only) - int(len(only) * held_out)
    return [only[:cut]], [only[cut:]], "tail of the only shard"
  held = {n for n in names if _is_held_out(n)}
  how = "shards named val or eval"
  if len(held) == len(names):
    raise errors.UserError(
      f"data.path: all {len(names)} shards are held out by their names"
    )
  if not held:
    held, how = {names[-1]}, f"last shard, {names[-1]}"
  return (
    [arrays[n] for n in names if n not in held],
    [arrays[n] for n in names if n in held],
    how,
  )


def _is_held_out(name: str) -> bool:
  file = name.rsplit("/", 1)[-1].lower()
  return "val" in file or "eval" in file


def _joined(arrays: Iterable[np.ndarray]) -> corpus_lib.Tokens:
  arrays = list(arrays)
  if not sum(map(len, arrays)):
    raise errors.UserError("data.path: a split of the shards has no tokens")
  return arrays[0] if len(arrays) == 1 else Concatenation(arrays)
