"""FLOPs of mixing tokens, by the definition of each mixer."""

from __future__ import annotations

from models import config as config_lib


def mixing(cfg: config_lib.Config, length: int) -> float:
  """Returns the FLOPs per token of a forward pass that have no weights.

  Two for each multiplication of a product. Softmax attention has a score and
  a value for each key that a query meets: of "full" all keys, later ones too,
  as an implementation that masks computes them; of "window" the window and the
  first tokens; of "sparse" and "in_context" the keys that are attended exactly
  and one for each block that is pooled. A linear mixer reads and writes its
  state, K V numbers a head, whatever the length.

  Args:
    cfg: the model.
    length: tokens of a sequence.
  """
  return sum(
    cfg.layers_at(i) * _layer(cfg, i, length) for i in range(len(cfg.pattern))
  )


def _layer(cfg, position, length):
  mixer = cfg.pattern[position]
  if mixer in config_lib.LINEAR:
    size = cfg.linear_sizes
    # What is read by the query and written; the delta rule reads by the key
    # as well.
    products = 3 if mixer in ("mdn", "gdn", "kda") else 2
    return 2 * products * size.heads * size.key * size.value
  if mixer == "window":
    keys = sum(min(w + cfg.sink, length) for w in cfg.window_at(position))
  else:
    keys = cfg.num_heads * _keys(cfg, mixer, length)
  return 4 * cfg.key_size * keys


def _keys(cfg, mixer, length):
  """How many keys a query meets, on average."""
  if mixer == "full":
    return length
  if mixer == "sparse":
    return pooled_keys(length, cfg.density, cfg.block_size)
  context = min(cfg.context, length)
  return in_context_keys(
    length - context, context, cfg.keep, cfg.sharp, cfg.density, cfg.block_size
  )


def pooled_keys(length: float, density: float, block: int) -> float:
  """Returns the keys of a query that attends to a share of blocks exactly.

  Args:
    length: all keys.
    density: the share.
    block: keys of a block; each block is one key more, its mean.
  """
  return length * min(1.0, density + 1 / block)


def in_context_keys(
  target: float,
  context: float,
  keep: float,
  sharp: float,
  density: float,
  block: int,
) -> float:
  """Returns the keys of a query of in-context attention, on average.

  Args:
    target: keys that are not of the context.
    context: keys of the context.
    keep: which share of these is kept.
    sharp: share of the queries that attend to all that is kept.
    density: of the other queries, as for `pooled_keys`.
    block: likewise.
  """
  kept = target + keep * context
  return sharp * kept + (1 - sharp) * pooled_keys(kept, density, block)
