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


# (d_model, heads, key size, value size, min_log_mu, tau_factor): the shapes of
# the released Momentum DeltaNets (arXiv:2605.05838), 21 layers, GPT-2's
# vocabulary, untied.
_MDN = {
  "400M": (1024, 6, 128, 256, -2.0, 1.0),
  "1.3B": (2048, 6, 256, 512, -1.0, 8.0),
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
  _check(size, _LLAMA)
  d_model, d_ff, num_layers, num_heads = _LLAMA[size]
  shape = {
    "vocab_size": 32000,
    "d_model": d_model,
    "d_ff": d_ff,
    "num_layers": num_layers,
    "num_heads": num_heads,
  }
  return config_lib.Config(**{**shape, **overrides})


def mdn(size: str, **overrides: Any) -> config_lib.Config:
  """The Momentum DeltaNet of a named size.

  Args:
    size: "400M" or "1.3B".
    **overrides: fields of `Config`; `mixers=("gdn",)` is a Gated DeltaNet of
      the same shape.

  Returns:
    The config.

  Raises:
    ValueError: an unknown size, or a bad field value.
  """
  _check(size, _MDN)
  d_model, heads, key, value, min_log_mu, tau_factor = _MDN[size]
  # Two thirds of four times the width, up to a multiple of 256.
  d_ff = -(-(8 * d_model // 3) // 256) * 256
  shape = {
    "vocab_size": 50257,
    "d_model": d_model,
    "d_ff": d_ff,
    "num_layers": 21,
    "num_heads": heads,
    "head_dim": key,
    "mixers": ("mdn",),
    "linear_value_dim": value,
    "min_log_mu": min_log_mu,
    "tau_factor": tau_factor,
  }
  return config_lib.Config(**{**shape, **overrides})


def preset(name: str, **overrides: Any) -> config_lib.Config:
  """The model of a name: a `llama` by its size, an `mdn` as "mdn-400M".

  Args:
    name: "60M" or another of `llama`'s, "mdn-400M" or "mdn-1.3B".
    **overrides: fields of `Config`.

  Returns:
    The config.

  Raises:
    ValueError: an unknown name, or a bad field value.
  """
  makers = {size: (llama, size) for size in _LLAMA}
  makers |= {f"mdn-{size}": (mdn, size) for size in _MDN}
  _check(name, makers, "preset")
  make, size = makers[name]
  return make(size, **overrides)


def longgen_mixers(num_layers: int) -> tuple[str, ...]:
  """The pattern of LongGen (arXiv:2410.01485): the middle third is "full".

  The layers before and after have the mixer "window".

  Args:
    num_layers: L, at least 3.

  Returns:
    A value for `Config.mixers`, of L names.

  Raises:
    ValueError: fewer layers.
  """
  if num_layers < 3:
    raise ValueError(f"num_layers: got {num_layers}; allowed: at least 3")
  full = round(num_layers / 3)
  before = (num_layers - full) // 2
  after = num_layers - full - before
  return ("window",) * before + ("full",) * full + ("window",) * after


def _check(got: str, allowed: dict[str, Any], field: str = "size") -> None:
  if got not in allowed:
    near = difflib.get_close_matches(str(got).upper(), allowed, cutoff=0.3)
    hint = f"; nearest: {near}" if near else ""
    raise ValueError(f"{field}: got {got!r}; allowed: {list(allowed)}{hint}")
