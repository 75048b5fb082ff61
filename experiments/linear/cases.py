"""Shapes, ops, arrays and tolerances of `experiments.bench_linear`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas

# Relative to the largest entry of an array. Each side is allowed, in float32,
# 1e-5 (outputs) and 1e-4 (gradients) of what float64 gives, and the two add
# up; in bfloat16 each rounds its results once more, by 2**-9 of an entry.
TOLERANCES = {"float32": (2e-5, 2e-4), "bfloat16": (2.0**-8, 2.0**-7)}

# What autodiff of the token scan may keep.
_SCAN_BYTES = 2**32


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes: B, T, H (as many key heads as value heads), K, V."""

  batch: int
  length: int
  heads: int
  key: int
  value: int

  @property
  def token_heads(self) -> int:
    """How many steps of one head a pass takes."""
    return self.batch * self.length * self.heads


SHAPES = {
  # For a CPU.
  "T4096_H4_D128": Shape(1, 4096, 4, 128, 128),
  "T2048_H4_D64": Shape(1, 2048, 4, 64, 64),
  # Those of flash-linear-attention's benchmarks, by its names.
  "B1_T8192_H96_D128": Shape(1, 8192, 96, 128, 128),
  "B2_T16384_H16_D128": Shape(2, 16384, 16, 128, 128),
  "B4_T2048_H16_D128": Shape(4, 2048, 16, 128, 128),
  "B4_T4096_H64_D128": Shape(4, 4096, 64, 128, 128),
  "B8_T2048_H32_D256": Shape(8, 2048, 32, 256, 256),
  "B8_T1024_H8_D64": Shape(8, 1024, 8, 64, 64),
  # What one device of the released Momentum DeltaNets trains on.
  "mdn-400M": Shape(8, 4096, 6, 128, 256),
  "mdn-1.3B": Shape(4, 4096, 6, 256, 512),
}
CPU_SHAPES = ("T4096_H4_D128", "T2048_H4_D64")

# Op to the function and the names of its gates.
OPS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
  "mdn": (
    kernels_pallas.momentum_delta_rule,
    ("log_decay", "log_momentum", "beta", "eta"),
  ),
  "gdn": (kernels_pallas.gated_delta_rule, ("log_decay", "beta")),
  "kda": (kernels_pallas.kda, ("log_decay", "beta")),
  "linear": (kernels_pallas.linear_attention, ("log_decay",)),
  "gla": (kernels_pallas.linear_attention, ("log_decay",)),
}
# With a decay for each channel of the keys; and without the delta rule.
CHANNELS = ("kda", "gla")
PLAIN = ("linear", "gla")


def make(
  op: str, shape: Shape, dtype: str
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
  """Random arguments of an op by name, and cotangents of its outputs."""
  rng = np.random.default_rng(0)
  tokens = (shape.batch, shape.length, shape.heads)
  draw = lambda *size: rng.standard_normal(size, np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  vectors = dict(
    q=unit(draw(*tokens, shape.key)),
    k=unit(draw(*tokens, shape.key)),
    v=draw(*tokens, shape.value),
  )
  channels = (*tokens, shape.key) if op in CHANNELS else tokens
  # As the layers make them: decays of a few hundredths to a few units.
  gates = dict(
    log_decay=-np.exp(rng.uniform(-4, 1, channels)),
    log_momentum=-np.exp(rng.uniform(-3, 1, tokens)),
    beta=rng.uniform(0, 1, tokens),
    eta=rng.uniform(0, 2, tokens),
  )
  arrays = {name: jnp.asarray(x, dtype) for name, x in vectors.items()}
  arrays |= {name: jnp.asarray(gates[name], "float32") for name in OPS[op][1]}
  state = lambda: jnp.asarray(
    draw(shape.batch, shape.heads, shape.key, shape.value)
  )
  states = tuple(state() for _ in range(2 if op == "mdn" else 1))
  return arrays, (jnp.asarray(draw(*tokens, shape.value), dtype), *states)


def first_tokens(arrays: Any, length: int) -> Any:
  """What `make` gave, cut to its first tokens."""
  vectors, (o, *states) = arrays
  cut = lambda x: x[:, :length]
  return {name: cut(x) for name, x in vectors.items()}, (cut(o), *states)


def scan_length(op: str, shape: Shape) -> int:
  """The largest of T, T / 2, T / 4 .. that the scan can be differentiated at.

  Autodiff keeps about two arrays per token of the size of the states.
  """
  matrices = 4 if op == "mdn" else 2
  each = 4 * matrices * shape.batch * shape.heads * shape.key * shape.value
  length = shape.length
  while length > 1 and length * each > _SCAN_BYTES:
    length //= 2
  return length


def largest_errors(
  got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Of each array of `want`, the largest difference over the largest entry."""
  tiny = np.finfo(np.float32).tiny
  return {
    name: float(np.abs(got[name] - x).max() / max(np.abs(x).max(), tiny))
    for name, x in want.items()
  }


def disagreement(found: Mapping[str, float], dtype: str) -> str | None:
  """Says which of `largest_errors` `TOLERANCES` do not allow, or None."""
  output, gradient = TOLERANCES[dtype]
  for name, error in found.items():
    allowed = gradient if name.startswith("d") else output
    if not error <= allowed:
      return f"{name} differs by {error:.1e}, allowed {allowed:.1e}"
  return None
