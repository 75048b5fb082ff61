"""What a run draws: images side by side, and its loss."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments import reports
from jaxlib_ext import records

_GAP = 2
_FONT_SIZE = 12


def save_grid(
  path: str | os.PathLike,
  rows: Sequence[tuple[str, np.ndarray]],
  *,
  scale: int = 2,
) -> None:
  """Writes rows of images under each other, a label in front of each.

  Args:
    path: of the PNG, replaced atomically.
    rows: labels (may be empty) and uint8 `[n, H, W, 3]`; all images are of
      one size, the numbers may differ.
    scale: pixels of the picture along each side of a pixel.

  Raises:
    ValueError: no rows, or images of several sizes.
  """
  sizes = {images.shape[1:] for _, images in rows}
  if len(sizes) != 1:
    raise ValueError(f"rows: got images of shapes {sizes}; allowed: one")
  height, width, _ = sizes.pop()
  height, width = height * scale + _GAP, width * scale + _GAP
  font = ImageFont.load_default(_FONT_SIZE)
  margin = max(round(font.getlength(label)) for label, _ in rows)
  margin += 8 if margin else 0
  columns = max(len(images) for _, images in rows)
  sheet = Image.new(
    "RGB", (margin + columns * width, len(rows) * height), "white"
  )
  draw = ImageDraw.Draw(sheet)
  for i, (label, images) in enumerate(rows):
    y = i * height
    draw.text((2, y + height // 2), label, "black", font, anchor="lm")
    for j, image in enumerate(images):
      big = image.repeat(scale, axis=0).repeat(scale, axis=1)
      sheet.paste(Image.fromarray(big), (margin + j * width, y))
  path = pathlib.Path(path)
  part = path.with_name(path.name + ".part")
  with open(part, "wb", opener=records.own_file) as f:
    sheet.save(f, format="PNG")
  os.replace(part, path)


def plot_loss(
  path: str | os.PathLike, metrics: Sequence[dict[str, Any]], *, title: str
) -> None:
  """Draws training and held-out loss against steps, both logarithmic.

  Args:
    path: of the PNG, replaced atomically.
    metrics: records with "step", "loss" and sometimes "eval_loss".
    title: above the plot.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
  for key, label, style in (
    ("loss", "training (times as trained)", dict(lw=0.8, color="0.6")),
    ("eval_loss", "held out (uniform times)", dict(marker="o", ms=3)),
  ):
    points = [(m["step"], m[key]) for m in metrics if key in m]
    axes.loglog(*zip(*points, strict=True), label=label, **style)
  axes.set(xlabel="step", ylabel="mean squared velocity error", title=title)
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  reports.save_figure(figure, path, dpi=120, suffixes=(".png",))
  pyplot.close(figure)
