"""The one description of a diffusion transformer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

ATTENTION = ("full", "piecewise", "in_context")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
  """A diffusion transformer over patches of images or videos.

  The fields from `attention` on decide how a forward pass attends and no
  parameter: the same parameters run under any of them.

  Attributes:
    input_shape: (height, width, channels), or with frames in front.
    patch: of one token, along each axis but the channels; divides them.
    d_model: D.
    num_layers: L.
    num_heads: H; the head size D / H is even and has a pair of channels for
      each axis of the grid.
    mlp_ratio: the feed-forward width over D.
    num_classes: of the labels; 0 is a model without labels.
    context: whether a second image or video may follow the target.
    coarse_residual: whether in-context attention adds a learned share of its
      coarse attention to every token, 0 at the start; needs a context. The
      share is a parameter, of no effect under other attention.
    rope_theta: base of the wavelengths of the positions, whose longest is
      2 pi times that; grids are short, so it is small.
    norm_eps: of the normalisation.
    init_std: standard deviation of the initial matrices.
    scan_layers: run the layers as a loop; else they are unrolled.
    compute_dtype: of activations.
    attention: "full", "piecewise" (`kernels_pallas.piecewise_attention`) or
      "in_context" (`kernels_pallas.in_context_attention`; needs a context).
    tile: tokens of one block along each axis of the grid. The tokens go
      through the layers in the order of the tiles, under full attention too;
      () leaves them in raster order and is for full attention only.
    density: share of the blocks that are exact.
    tail: what the others contribute to piecewise attention.
    keep: share of the context's blocks that in-context attention keeps.
    sharp: share of the query blocks that attend fully to what is kept.
    dense_layers: so many layers in front attend fully whatever `attention`.
  """

  input_shape: tuple[int, ...] = (32, 32, 3)
  patch: tuple[int, ...] = (2, 2)
  d_model: int = 128
  num_layers: int = 6
  num_heads: int = 4
  mlp_ratio: float = 4.0
  num_classes: int = 0
  context: bool = False
  coarse_residual: bool = False
  rope_theta: float = 100.0
  norm_eps: float = 1e-6
  init_std: float = 0.02
  scan_layers: bool = True
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  attention: Literal["full", "piecewise", "in_context"] = "full"
  tile: tuple[int, ...] = ()
  density: float = 0.15
  tail: str = "mean_global"
  keep: float = 0.125
  sharp: float = 0.5
  dense_layers: int = 0

  def __post_init__(self):
    for name in ("input_shape", "patch", "tile"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    self._check_grid()
    for name in ("d_model", "num_layers", "num_heads"):
      _check(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
    for name in ("mlp_ratio", "rope_theta", "norm_eps", "init_std"):
      value = getattr(self, name)
      _check(name, value > 0 and math.isfinite(value), value, "above 0")
    _check("num_classes", self.num_classes >= 0, self.num_classes, "at least 0")
    axes = len(self.grid)
    _check(
      "d_model",
      self.d_model % (2 * self.num_heads) == 0 and self.key_size // 2 >= axes,
      self.d_model,
      f"a multiple of 2 * num_heads = {2 * self.num_heads}, with a head size "
      f"of at least {2 * axes}",
    )
    _check(
      "compute_dtype",
      self.compute_dtype in DTYPES,
      self.compute_dtype,
      f"one of {DTYPES}",
    )
    self._check_attention()

  def _check_grid(self) -> None:
    shape, patch = self.input_shape, self.patch
    _check(
      "input_shape",
      len(shape) in (3, 4) and min(shape) >= 1,
      shape,
      "(height, width, channels) or (frames, height, width, channels)",
    )
    _check(
      "patch",
      len(patch) == len(shape) - 1
      and min(patch) >= 1
      and not any(n % p for n, p in zip(shape, patch, strict=False)),
      patch,
      f"a divisor of each of {shape[:-1]}",
    )

  def _check_attention(self) -> None:
    _check(
      "attention",
      self.attention in ATTENTION,
      self.attention,
      f"one of {ATTENTION}",
    )
    tile, grid = self.tile, self.grid
    if tile or self.attention != "full":
      _check(
        "tile",
        len(tile) == len(grid)
        and min(tile) >= 1
        and not any(n % t for n, t in zip(grid, tile, strict=True)),
        tile,
        f"a divisor of each axis of the grid {grid} of tokens",
      )
    for name in ("density", "keep", "sharp"):
      value = getattr(self, name)
      least = value >= 0 if name == "sharp" else value > 0
      _check(name, least and value <= 1, value, "a share, at most 1")
    _check(
      "dense_layers",
      0 <= self.dense_layers <= self.num_layers,
      self.dense_layers,
      f"0 to num_layers={self.num_layers}",
    )
    _check(
      "context",
      self.context or self.attention != "in_context",
      self.context,
      "true where attention is 'in_context'",
    )
    _check(
      "coarse_residual",
      self.context or not self.coarse_residual,
      self.coarse_residual,
      "true only with a context",
    )

  @property
  def grid(self) -> tuple[int, ...]:
    """Tokens along each axis."""
    shape = self.input_shape[:-1]
    return tuple(n // p for n, p in zip(shape, self.patch, strict=True))

  @property
  def num_tokens(self) -> int:
    """T: tokens of one image or video."""
    return math.prod(self.grid)

  @property
  def patch_size(self) -> int:
    """Numbers in one patch."""
    return math.prod(self.patch) * self.input_shape[-1]

  @property
  def key_size(self) -> int:
    """K: the size of a head."""
    return self.d_model // self.num_heads

  @property
  def d_ff(self) -> int:
    """The feed-forward width."""
    return round(self.mlp_ratio * self.d_model)


def _check(name: str, ok: bool, got: Any, allowed: str) -> None:
  if not ok:
    raise ValueError(f"{name}: got {got!r}; allowed: {allowed}")
