"""What sparse attention costs a language model that was trained without it.

Every layer of the model attends by the same method, on the same held-out
windows, with the same parameters.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import errors
from experiments.sparse import measure, sources
from models import transformer

TAILS = measure.FEW_TAILS


@dataclasses.dataclass(frozen=True)
class Method:
  """One way to attend.

  Attributes:
    label: of a row of the table.
    share: of the pairs of query and key that are exact.
    fields: of the model's config.
  """

  label: str
  share: float
  fields: dict[str, Any]


def methods(
  length: int, block: int, densities: Sequence[float]
) -> list[Method]:
  """Dense attention, blocks with every tail, windows, in-context attention.

  A window has the share of the blocks before it. In-context attention's own
  depends on the data; its bound is where the query blocks that see most are
  the sharp ones. The first half of a row is its context.

  Args:
    length: T, whole blocks.
    block: tokens of a block.
    densities: of the blocks.
  """
  out = [Method("full", 1.0, dict(mixers=("full",)))]
  for density in densities:
    seen = np.arange(1, length // block + 1)
    listed = np.maximum(1, np.floor(density * seen + 1e-9))
    share = _share(listed, block)
    for tail in TAILS:
      fields = dict(
        mixers=("sparse",), density=density, tail=tail, block_size=block
      )
      out.append(Method(f"blocks, {tail}", share, fields))
    tokens = np.arange(1, length + 1)
    sizes = np.arange(1, length + 1)
    shares = [np.minimum(tokens, n).sum() / tokens.sum() for n in sizes]
    window = int(sizes[np.argmin(np.abs(np.array(shares) - share))])
    fields = dict(mixers=("window",), window=(window,), sink=4)
    out.append(Method(f"window of {window} and 4 sinks", share, fields))
  number = length // block
  for sharp in measure.SHARP if number > 1 else ():
    fields = dict(
      mixers=("in_context",),
      context=number // 2 * block,
      keep=measure.KEEP,
      sharp=sharp,
      density=measure.FLAT,
      block_size=block,
    )
    share = _most_in_context(number, block, sharp)
    out.append(Method(f"in-context, sharp {sharp:g}, at most", share, fields))
  return out


def _most_in_context(number: int, block: int, sharp: float) -> float:
  """The largest share of exact pairs that in-context attention may have."""
  half = number // 2
  kept = max(1, int(measure.KEEP * half + 1e-9))
  listed = []
  for rows, before in ((half, 0), (number - half, kept)):
    seen = before + np.arange(1, rows + 1)
    full = seen > seen[-1] - int(sharp * rows + 0.5)
    flat = np.maximum(1, np.floor(measure.FLAT * seen + 1e-9))
    listed.append(np.where(full, seen, flat))
  return _share(np.concatenate(listed), block)


def _share(listed: np.ndarray, block: int) -> float:
  """The share of pairs in lists of so many blocks, each query's own in them."""
  seen = np.arange(1, len(listed) + 1)
  # Of its own block a query sees half.
  pairs = lambda blocks: (blocks - 0.5 + 0.5 / block).sum()
  return float(pairs(listed) / pairs(seen))


def compare(
  run: sources.Text,
  *,
  block: int,
  densities: Sequence[float],
  done: Callable[[], None],
) -> list[dict[str, Any]]:
  """The held-out loss of every method.

  Args:
    run: a trained model and held-out windows.
    block: tokens of a block.
    densities: of the blocks.
    done: called after each method.

  Returns:
    For each method its exact share, and the mean loss in nats per token.
  """
  results = []
  for method in methods(run.tokens.shape[1], block, densities):
    cfg = dataclasses.replace(run.cfg, **method.fields)
    loss = jax.jit(
      lambda params, tokens, targets, cfg=cfg: transformer.loss(
        params, tokens, targets, cfg=cfg
      )[1]["nll"]
    )
    values = [
      loss(run.params, jnp.asarray(x[None]), jnp.asarray(y[None]))
      for x, y in zip(run.tokens, run.targets, strict=True)
    ]
    mean = float(np.mean(values))
    if not np.isfinite(mean):
      raise FloatingPointError(f"the loss of {method.label} is not finite")
    results.append(
      {
        "method": method.label,
        "share": round(method.share, 4),
        **method.fields,
        "loss": round(mean, 5),
      }
    )
    done()
  return results


def load(workdir: pathlib.Path, examples: int, block: int) -> sources.Text:
  """A run of `experiments.pretrain` whose layers all attend fully.

  Raises:
    UserError: as `sources.language_model`; other layers.
  """
  run = sources.language_model(workdir, examples, block)
  if run.cfg.pattern != ("full",):
    raise errors.UserError(
      f"--lm: {workdir} has the mixers {run.cfg.pattern}; allowed with "
      "--sample: full"
    )
  return run
