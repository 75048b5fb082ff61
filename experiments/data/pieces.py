"""Text in pieces of bounded size, cut where its tokens end in any case."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator

# Characters of a piece: at least PIECE, at most twice as many.
PIECE = 1 << 16
# A word's bytes that byte-pair training merges among each other: its time
# grows with their square. No word of ordinary text has as many.
WORD = 256
# Bytes of memory that the different words of a training text may take.
ROOM = 1 << 27

_INVALID = re.compile("[\udc80-\udcff]+")
# The pre-tokenizers of GPT-2 and of those behind it break at each of these.
_BREAKS = (
  re.compile(r"(?<=\S)\n(?=\S)"),
  re.compile(r"(?<=\S)(?= \S)"),
  re.compile(r"(?<=[A-Za-z])(?=[0-9])"),
)
_WORDS = re.compile(rb"[A-Za-z\x80-\xff]+|[0-9]+|[^\sA-Za-z0-9\x80-\xff]+|\s+")


def cut(blocks: Iterable[bytes]) -> Iterator[bytes]:
  """Cuts a document, given in blocks of any size, into pieces.

  Pieces tokenize as the whole document does. Text that has no break in 64Ki
  characters, neither white space nor a digit behind a letter, is the
  exception: there a piece ends at any character.
  """
  for text in _texts(blocks):
    yield text.encode("utf-8", errors="surrogateescape")


def runs(content: bytes) -> Iterator[str | bytes]:
  """Splits into valid text (str), in pieces, and invalid bytes (bytes)."""
  for text in _texts([content]):
    start = 0
    for match in _INVALID.finditer(text):
      if match.start() > start:
        yield text[start : match.start()]
      yield match.group().encode("utf-8", errors="surrogateescape")
      start = match.end()
    if start < len(text):
      yield text[start:]


def material(contents: Iterable[bytes]) -> Iterator[str]:
  """The valid text to train byte-pair merges on.

  A trainer holds every different word with 32 bytes for each of its own, so
  the text ends where its words would fill `ROOM`: for English or code after
  some 100 MB, for random letters after 4 MB. A line on stderr says so.
  """
  seen, used, size = set(), 0, 0
  for content in contents:
    size += len(content)
    yield from (p for p in runs(content) if isinstance(p, str))
    new = set(_WORDS.findall(content)) - seen
    used += sum(32 * len(word) + 128 for word in new)
    if used > ROOM:
      print(
        f"data.tokenizer: trained on the first {size:,} bytes, which have as "
        "many different words as there is room for",
        file=sys.stderr,
      )
      return
    seen |= new


def _texts(blocks: Iterable[bytes]) -> Iterator[str]:
  """Pieces as text, each invalid byte a lone surrogate."""
  decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
  text = ""
  for block in blocks:
    text += decoder.decode(block)
    start = 0
    while len(text) - start > 2 * PIECE:
      stop = _end(text, start)
      yield text[start:stop]
      start = stop
    text = text[start:]
  text += decoder.decode(b"", final=True)
  if text:
    yield text


def _end(text: str, start: int) -> int:
  low, high = start + PIECE, start + 2 * PIECE
  for pattern in _BREAKS:
    match = pattern.search(text, low, high)
    if match is not None:
      return match.end()
  return high
