"""What a DiT draws under dense, piecewise and in-context attention.

All begin with the same noise and take the same steps, so that a sample can be
compared with dense attention's pixel by pixel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.diffusion import metrics, pictures
from experiments.diffusion import trainer as dit_trainer
from experiments.sparse import measure
from experiments.sparse.sources import Images
from models import dit

# Of piecewise attention where there is no context to match.
DENSITIES = (0.1, 0.15, 0.25)
TAILS = measure.FEW_TAILS


@dataclasses.dataclass(frozen=True)
class Method:
  """One way to attend.

  Attributes:
    label: of a row of the picture.
    density: share of the blocks that are exact.
    fields: of the model's config.
  """

  label: str
  density: float
  fields: dict[str, Any]


def methods(cfg: dit.Config) -> list[Method]:
  """In-context attention and piecewise attention of the same density.

  Without a context only the latter.
  """
  out = []
  for sharp in measure.SHARP if cfg.context else DENSITIES:
    density = sharp
    if cfg.context:
      number = 2 * cfg.num_tokens // math.prod(cfg.tile)
      density = measure.in_context_density(number, sharp)
    for tail in TAILS:
      fields = dict(attention="piecewise", density=density, tail=tail)
      out.append(Method(f"PISA {tail} {density:.0%}", density, fields))
    if cfg.context:
      fields = dict(attention="in_context", sharp=sharp, density=measure.FLAT)
      out.append(Method(f"ISA {density:.0%}", density, fields))
  return out


def compare(
  examples: Images,
  *,
  steps: int,
  full_steps: int,
  picture: pathlib.Path,
  done: Callable[[], None],
) -> list[dict[str, Any]]:
  """Draws with every method and compares with dense attention.

  Args:
    examples: labels, contexts and noise.
    steps: of Euler's method.
    full_steps: so many in front attend fully.
    picture: the PNG, dense attention above and the methods below it.
    done: called after each method.

  Returns:
    For each method PSNR and SSIM of all samples against dense attention's.
  """
  # A loop over the layers, for there are many programs to compile.
  cfg = dataclasses.replace(examples.trained.cfg, scan_layers=True)

  def draw(**fields):
    own = dataclasses.replace(cfg, **fields)
    run = jax.jit(
      functools.partial(dit.sample, cfg=own, steps=steps, full_steps=full_steps)
    )
    drawn = run(
      examples.trained.params,
      examples.noise,
      examples.labels,
      context=examples.context,
    )
    if not np.isfinite(np.asarray(drawn)).all():
      raise FloatingPointError(f"samples of {fields} are not finite")
    done()
    return dit_trainer.to_pixels(drawn)

  dense = draw(attention="full")
  rows = [("dense", dense)]
  if examples.context is not None:
    rows.insert(0, ("context", dit_trainer.to_pixels(examples.context)))
  results = []
  for method in methods(cfg):
    drawn = draw(**method.fields)
    rows.append((method.label, drawn))
    results.append(
      {
        "method": method.label,
        **method.fields,
        "density": round(method.density, 4),
        "psnr": round(metrics.psnr(drawn, dense), 3),
        "ssim": round(metrics.ssim(drawn, dense), 5),
      }
    )
  if dense.ndim == 5:  # the middle frame of a clip
    rows = [(label, clip[:, clip.shape[1] // 2]) for label, clip in rows]
  pictures.save_grid(picture, rows)
  return results
