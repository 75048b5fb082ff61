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
from experiments.sparse import sources
from models import transformer

TAILS = ("drop", "mean", "mean_global")


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
  """Dense attention, blocks with every tail, and windows of the same share.

  Args:
    length: T, whole blocks.
    block: tokens of a block.
    densities: of the blocks.
  """
  out = [Method("full", 1.0, dict(mixers=("full",)))]
  for density in densities:
    seen = np.arange(1, length // block + 1)
    listed = np.maximum(1, np.floor(density * seen + 1e-9))
    # Pairs, of which a query's own block has half.
    pairs = listed - 0.5 + 0.5 / block
    share = float(pairs.sum() / (seen - 0.5 + 0.5 / block).sum())
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
  return out


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
