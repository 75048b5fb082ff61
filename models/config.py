"""The one description of a decoder-only transformer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

# What a layer may mix its tokens by: softmax attention to every token, to a
# window, or to chosen blocks, or one of `models.mixers`.
SOFTMAX = ("full", "window", "sparse", "in_context")
LINEAR = ("mdn", "gdn", "kda", "gla", "linear", "mamba2")
MIXERS = SOFTMAX + LINEAR

_POSITIVE = (
  "vocab_size",
  "d_model",
  "num_layers",
  "num_heads",
  "d_ff",
  "conv_width",
  "block_size",
  "context",
)
_CHOICES = {
  "remat": ("none", "full", "dots"),
  "compute_dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
  "output_gate": ("own", "silu", "sigmoid"),
  "tail": ("drop", "mean", "mean_global", "mean_local", "mean_var"),
  "norm": ("rms", "single_rms"),
}


class LinearSizes(NamedTuple):
  """Sizes of the linear mixers, with the defaults filled in.

  Attributes:
    heads: H, value heads.
    key_heads: G, query and key heads.
    key: K, size of a query or key.
    value: V, size of a value.
  """

  heads: int
  key_heads: int
  key: int
  value: int


@dataclasses.dataclass(frozen=True)
class Config:
  """A LLaMA: RMSNorm, rotary positions, grouped heads, SwiGLU, no biases.

  Its attention may give way to sparse or linear attention in any pattern of
  layers. Every field is an int, float, str, bool or a tuple of str or int, so
  a config is also JSON.

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
    norm: of the residual stream: RMSNorm with a gain per feature ("rms") or
      with a single one ("single_rms"; OSP's, arXiv:2506.19697), so that no
      feature has a scale of its own.
    tie_embeddings: use the transposed embedding as the output head.
    embed_projection: multiply the embedding's rows, and what the head reads,
      by a square matrix each (OSP's), which spreads their outliers over all
      features; `models.osp` merges both away after training.
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
    mixers: how the layers mix tokens, repeated in order until L: `("full",)`
      is softmax attention everywhere, `("gdn", "gdn", "gdn", "full")` a 3:1
      hybrid; "gdn,gdn,gdn,full" is read as that tuple. "window" is softmax
      attention to the last tokens and the first, "sparse" to chosen blocks,
      with the other blocks pooled (`kernels_pallas.piecewise_attention`),
      "in_context" to these in what is kept of a row's first tokens
      (`kernels_pallas.in_context_attention`); the rest is in `models.mixers`.
    window: tokens, itself included, that a query of "window" sees: one number,
      one per query head, or one per query head for each "window" of `mixers`,
      in order (MoA, arXiv:2406.14909).
    sink: first tokens that "window" sees besides.
    density: share of the blocks that "sparse" attends to exactly, and most
      query blocks of "in_context".
    block_size: tokens of a block of "window", "sparse" and "in_context".
    tail: what becomes of the other blocks of "sparse", as for
      `kernels_pallas.block_sparse_attention`.
    context: of "in_context", how many tokens at the start of a row are the
      context, of which the others see only a part.
    keep: which share of it.
    sharp: of "in_context", the share of query blocks that attend fully.
    linear_heads: value heads of the linear mixers; 0 means H.
    linear_key_heads: query and key heads of the linear mixers, a divisor of
      their value heads; 0 means as many.
    linear_key_dim: size of a query or key of the linear mixers (the state
      size of Mamba-2); 0 means K.
    linear_value_dim: size of a value of the linear mixers (the head size of
      Mamba-2); 0 means `linear_key_dim`.
    conv_width: taps of the linear mixers' short convolutions.
    min_log_mu: lower bound of the log momentum of "mdn"; 0 is none. The
      released models have one because their kernels need it; ours do not.
    output_gate: what the linear mixers but "mamba2" pass their output gate
      through: "own" is as published, the sigmoid in "mdn" and "kda" and SiLU
      in the others. A sigmoid lets half the output through at the start.
    tau_factor: of "mdn", whose eta is `1 + tanh(e / sqrt(D / tau_factor))`.
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
  norm: Literal["rms", "single_rms"] = "rms"
  tie_embeddings: bool = False
  embed_projection: bool = False
  scan_layers: bool = True
  remat: Literal["none", "full", "dots"] = "none"
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  z_loss: float = 0.0
  init_std: float = 0.02
  mixers: tuple[str, ...] = ("full",)
  window: tuple[int, ...] = (256,)
  sink: int = 4
  density: float = 0.125
  block_size: int = 64
  tail: Literal["drop", "mean", "mean_global", "mean_local", "mean_var"] = (
    "mean"
  )
  context: int = 256
  keep: float = 0.125
  sharp: float = 0.5
  linear_heads: int = 0
  linear_key_heads: int = 0
  linear_key_dim: int = 0
  linear_value_dim: int = 0
  conv_width: int = 4
  min_log_mu: float = 0.0
  output_gate: Literal["own", "silu", "sigmoid"] = "own"
  tau_factor: float = 1.0

  def __post_init__(self):
    object.__setattr__(self, "mixers", _names(self.mixers))
    object.__setattr__(self, "window", _numbers(self.window))
    for field in dataclasses.fields(self):
      _check_type(field.name, getattr(self, field.name), field.default)
    for name in _POSITIVE:
      _check(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
    for name, allowed in _CHOICES.items():
      value = getattr(self, name)
      _check(name, value in allowed, value, f"one of {allowed}")
    for name in ("rope_theta", "norm_eps", "init_std", "tau_factor"):
      value = getattr(self, name)
      _check(name, value > 0 and math.isfinite(value), value, "above 0")
    _check(
      "z_loss",
      0 <= self.z_loss < math.inf,
      self.z_loss,
      "at least 0",
    )
    self._check_heads()
    self._check_mixers()
    self._check_sparse()

  def _check_heads(self) -> None:
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
    if self.head_dim == 0 and (
      set(SOFTMAX) & set(self.mixers) or not self.linear_key_dim
    ):
      _check(
        "d_model",
        self.d_model % (2 * heads) == 0,
        self.d_model,
        f"a multiple of 2 * num_heads = {2 * heads} where head_dim is 0",
      )

  def _check_mixers(self) -> None:
    _check("mixers", len(self.mixers) > 0, self.mixers, "at least one name")
    for name in self.mixers:
      _check("mixers", name in MIXERS, name, f"names among {MIXERS}")
    for name in ("linear_heads", "linear_key_dim", "linear_value_dim"):
      _check(name, getattr(self, name) >= 0, getattr(self, name), "0 or more")
    heads, groups = self.linear_sizes.heads, self.linear_key_heads
    _check(
      "linear_key_heads",
      groups >= 0 and (groups == 0 or heads % groups == 0),
      groups,
      f"0 or a divisor of the {heads} value heads of the linear mixers",
    )
    _check(
      "min_log_mu",
      -math.inf < self.min_log_mu <= 0,
      self.min_log_mu,
      "a bound below 0, or 0 for none",
    )

  def _check_sparse(self) -> None:
    heads, windows = self.num_heads, self.mixers.count("window")
    allowed = {1, heads, heads * windows} - {0}
    _check(
      "window",
      len(self.window) in allowed
      and all(type(n) is int and n >= 1 for n in self.window),
      self.window,
      f"numbers of at least 1, {sorted(allowed)} of them",
    )
    _check("sink", self.sink >= 0, self.sink, "at least 0")
    for name in ("density", "keep"):
      value = getattr(self, name)
      _check(name, 0 < value <= 1, value, "in (0, 1]")
    _check("sharp", 0 <= self.sharp <= 1, self.sharp, "in [0, 1]")

  @property
  def kv_heads(self) -> int:
    """G, with the default filled in."""
    return self.num_kv_heads or self.num_heads

  @property
  def key_size(self) -> int:
    """K, with the default filled in."""
    return self.head_dim or self.d_model // self.num_heads

  @property
  def linear_sizes(self) -> LinearSizes:
    """Sizes of the linear mixers, with the defaults filled in."""
    heads = self.linear_heads or self.num_heads
    key = self.linear_key_dim or self.key_size
    return LinearSizes(
      heads=heads,
      key_heads=self.linear_key_heads or heads,
      key=key,
      value=self.linear_value_dim or key,
    )

  @property
  def pattern(self) -> tuple[str, ...]:
    """The mixers of one period, of a single name where all layers agree."""
    used = self.mixers[: self.num_layers]
    windows = set()
    if len(self.window) > 1:  # Not written out where there is one, of any H.
      windows = {
        self.window_at(i) for i, name in enumerate(used) if name == "window"
      }
    same = len(set(used)) == 1 and len(windows) <= 1
    return used[:1] if same else used

  def window_at(self, position: int) -> tuple[int, ...]:
    """The windows of the query heads at a position of the pattern."""
    heads = self.num_heads
    if len(self.window) == 1:
      return self.window * heads
    start = self.mixers[:position].count("window") * heads
    return self.window[start % len(self.window) :][:heads]

  def layers_at(self, position: int) -> int:
    """How many of the L layers stand at a position of the pattern."""
    return -(-(self.num_layers - position) // len(self.pattern))


def _names(mixers: Any) -> Any:
  """The pattern as a tuple, from what JSON or a command line make of one."""
  if isinstance(mixers, str):
    return tuple(name.strip() for name in mixers.split(","))
  return tuple(mixers) if isinstance(mixers, list) else mixers


def _numbers(window: Any) -> Any:
  """The windows as a tuple, from one number or what JSON makes of one."""
  if isinstance(window, list):
    return tuple(window)
  return (window,) if type(window) is int else window


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
