"""Named model shapes."""

from __future__ import annotations

import difflib
from typing import Any

from models import config as config_lib

# (d_model, d_ff, layers, heads): the LLaMA shapes that the pretraining runs
# of GaLore (arXiv:2403.03507, table 5) and SCALE share, 32000 tokens, untied;
# "9M" is ours, of the same family, for machines without an accelerator.
_LLAMA = {
  "9M": (128, 352, 4, 4),
  "60M": (512, 1376, 8, 8),
  "130M": (768, 2048, 12, 12),
  "350M": (1024, 2736, 24, 16),
  "1B": (2048, 5461, 24, 32),
  "7B": (4096, 11008, 32, 32),
}


def llama(size: str, **overrides: Any) -> config_lib.Config:
  """The LLaMA of a named size.

  Args:
    size: "9M", "60M", "130M", "350M", "1B" or "7B".
    **overrides: fields of `Config`.

  Returns:
    The config.

  Raises:
    ValueError: an unknown size, or a bad field value.
  """
  if size not in _LLAMA:
    near = difflib.get_close_matches(str(size).upper(), _LLAMA, cutoff=0.3)
    hint = f"; nearest: {near}" if near else ""
    raise ValueError(f"size: got {size!r}; allowed: {list(_LLAMA)}{hint}")
  d_model, d_ff, num_layers, num_heads = _LLAMA[size]
  shape = {
    "vocab_size": 32000,
    "d_model": d_model,
    "d_ff": d_ff,
    "num_layers": num_layers,
    "num_heads": num_heads,
  }
  return config_lib.Config(**{**shape, **overrides})
