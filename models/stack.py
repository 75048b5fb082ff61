"""Walking through layers that are stacked by their place in a pattern.

Layer i has the mixer `pattern[i % P]`, P the pattern's length, and is entry
`i // P` of the stack of that position, so that one `jax.lax.scan` of P layers
a step runs them all, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models import config as config_lib


def split(layers: Any, cfg: config_lib.Config) -> tuple[Any, ...]:
  """The stack of each position, of `params["layers"]`.

  They are the entries "0", "1", ... of a pattern, or all of `layers` where
  the pattern is of one mixer.
  """
  if len(cfg.pattern) == 1:
    return (layers,)
  return tuple(layers[str(i)] for i in range(len(cfg.pattern)))


def join(stacks: Sequence[Any], cfg: config_lib.Config) -> Any:
  """The inverse of `split`."""
  if len(cfg.pattern) == 1:
    return stacks[0]
  return {str(i): stack for i, stack in enumerate(stacks)}


def walk(
  layer: Callable[[str, jax.Array, Any], tuple[jax.Array, Any]],
  x: jax.Array,
  stacks: Sequence[Any],
  cfg: config_lib.Config,
  *,
  scan: bool,
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Takes `x` through all layers.

  Args:
    layer: `(mixer, x, entry) -> (x, out)`, of one layer.
    x: what the first layer gets.
    stacks: by position, a pytree whose leaves have the position's layers in
      front.
    cfg: the model.
    scan: run whole periods as one scan; the layers after the last whole one
      are unrolled.

  Returns:
    What the last layer gave, and the outs, stacked like `stacks`.
  """
  pattern, stacks = cfg.pattern, tuple(stacks)
  periods = cfg.num_layers // len(pattern) if scan else 0
  done = periods * len(pattern)
  outs = [[] for _ in pattern]

  def period(x, entries):
    new = []
    for mixer, entry in zip(pattern, entries, strict=True):
      x, out = layer(mixer, x, entry)
      new.append(out)
    return x, tuple(new)

  if periods:
    whole = stacks
    if done < cfg.num_layers:
      whole = jax.tree.map(lambda leaf: leaf[:periods], stacks)
    x, scanned = jax.lax.scan(period, x, whole)
    if done == cfg.num_layers:
      return x, scanned
    outs = [[out] for out in scanned]
  for i in range(done, cfg.num_layers):
    position, index = i % len(pattern), i // len(pattern)
    entry = jax.tree.map(lambda leaf, i=index: leaf[i], stacks[position])
    x, out = layer(pattern[position], x, entry)
    outs[position].append(jax.tree.map(lambda leaf: leaf[None], out))
  return x, tuple(_concatenate(out) for out in outs)


def _concatenate(trees):
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def interleave(
  stacks: Sequence[jax.Array], cfg: config_lib.Config
) -> jax.Array:
  """Arrays stacked by position as one `[L, ...]` in the order of layers."""
  if len(stacks) == 1:
    return stacks[0]
  n = len(stacks)
  return jnp.stack([stacks[i % n][i // n] for i in range(cfg.num_layers)])
