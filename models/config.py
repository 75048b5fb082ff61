"""The one description of a decoder-only transformer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

_POSITIVE = (
  "vocab_size",
  "d_model",
  "num_layers",
  "num_heads",
  "d_ff",
)
_CHOICES = {
  "remat": ("none", "full", "dots"),
  "compute_dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A LLaMA: RMSNorm, rotary positions, grouped heads, SwiGLU, no biases.

  Every field is an int, float, str or bool, so a config is also JSON.

  Attributes:
    vocab_size: V, the number of token ids.
    d_model: D, width of the residual stream.
    num_layers: L.
    num_heads: H, query heads.
    num_kv_heads: G, key and value heads, a divisor of H; 0 means H.
    head_dim: K, size of one head, even; 0 means D / H.
    d_ff: F, width of the gated hidden layer.
    rope_theta: base of the rotary wavelengths.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: use the transposed embedding as the output head.
    scan_layers: run the layers as one `jax.lax.scan` (compile time does not
      grow with L) or unrolled.
    remat: what the backward pass recomputes: "none", "full" (each layer from
      its input) or "dots" (all but the weight matmuls).
    compute_dtype: of activations and matmul operands. Norm statistics,
      softmax, logits and loss are float32 always.
    param_dtype: of the stored parameters.
    z_loss: weight of the mean squared log-partition added to the loss.
    init_std: standard deviation of the initial matrices; those that write to
      the residual stream get `init_std / sqrt(2 L)`.
  """

  vocab_size: int = 256
  d_model: int = 256
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 0
  head_dim: int = 0
  d_ff: int = 688
  rope_theta: float = 10000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  scan_layers: bool = True
  remat: Literal["none", "full", "dots"] = "none"
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  z_loss: float = 0.0
  init_std: float = 0.02

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check_type(field.name, getattr(self, field.name), field.default)
    for name in _POSITIVE:
      _check(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
    for name, allowed in _CHOICES.items():
      value = getattr(self, name)
      _check(name, value in allowed, value, f"one of {allowed}")
    for name in ("rope_theta", "norm_eps", "init_std"):
      value = getattr(self, name)
      _check(name, value > 0 and math.isfinite(value), value, "above 0")
    _check(
      "z_loss",
      0 <= self.z_loss < math.inf,
      self.z_loss,
      "at least 0",
    )
    heads, groups = self.num_heads, self.num_kv_heads
    _check(
      "num_kv_heads",
      groups >= 0 and (groups == 0 or heads % groups == 0),
      groups,
      f"0 or a divisor of num_heads={heads}",
    )
    _check(
      "head_dim",
      self.head_dim >= 0 and self.head_dim % 2 == 0,
      self.head_dim,
      "0 or an even number",
    )
    if self.head_dim == 0:
      _check(
        "d_model",
        self.d_model % (2 * heads) == 0,
        self.d_model,
        f"a multiple of 2 * num_heads = {2 * heads} where head_dim is 0",
      )

  @property
  def kv_heads(self) -> int:
    """G, with the default filled in."""
    return self.num_kv_heads or self.num_heads

  @property
  def key_size(self) -> int:
    """K, with the default filled in."""
    return self.head_dim or self.d_model // self.num_heads


def _check(name: str, ok: bool, got: Any, allowed: str) -> None:
  if not ok:
    raise ValueError(f"{name}: got {got!r}; allowed: {allowed}")


def _check_type(name: str, value: Any, default: Any) -> None:
  kind = type(default)
  if kind is float and type(value) is int:
    return
  if type(value) is not kind:
    raise ValueError(
      f"{name}: got {value!r} of type {type(value).__name__}; "
      f"allowed: {kind.__name__}"
    )
