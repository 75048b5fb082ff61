"""Sparse attention beside dense attention, phase by phase.

  python -m experiments.bench_sparse --lengths=16384 --tails=mean

Values are checked before anything is timed: at the measured size some query
blocks of the output against every score written down in float64, at a short
length all gradients. Then all phases and contenders take turns:

  statistics   mean keys and values (and what else the tail needs)
  selection    `select_blocks`, its own means included
  attention    `block_sparse_attention` on given lists
  together     `piecewise_attention`: all of it
  dense        our own chunked attention, `dense.full_attention`
  jax          `jax.nn.dot_product_attention`

Speed is set against the ideal 1 / (density + 1 / block) of a tail of one key
for each block. One JSON line for each length, tail and number of queries that
share a list is appended to `experiments/records/bench_sparse.jsonl`.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import kernels_pallas
from experiments import bench_train, contender, errors, reports
from jaxlib_ext import host, records
from kernels_pallas.sparse import core, dense, problem, statistics

DENSE, PEER = "dense", "jax"
_CHECKED_BLOCKS, _SHORT = 4, 1024
# float32 scores of some units, a thousand terms; bfloat16 rounds to 2^-9.
_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


class DisagreementError(Exception):
  """Ours gives other values than the definition; there is nothing to time."""


class Trial:
  """The contenders at one length.

  Args:
    length: T.
    heads: H.
    size: K and V.
    block: keys of a block.
    block_q: queries of a block.
    density: listed share of the blocks.
    tail: as for `block_sparse_attention`.
    dtype: of q, k and v.
  """

  def __init__(
    self,
    length: int,
    heads: int,
    size: int,
    block: int,
    block_q: int,
    density: float,
    tail: str,
    dtype: str,
  ):
    self.block, self.block_q = block, block_q
    self.density, self.tail = density, tail
    self.arrays = _arrays(length, heads, size, dtype)
    self.tolerance = _TOLERANCE[dtype]
    self.select = functools.partial(
      kernels_pallas.select_blocks,
      block_q=block_q,
      block_kv=block,
      density=density,
    )
    self.attend = functools.partial(
      kernels_pallas.block_sparse_attention,
      block_q=block_q,
      block_kv=block,
      tail=tail,
    )
    self.together = functools.partial(
      kernels_pallas.piecewise_attention,
      density=density,
      block_size=block,
      block_q=block_q,
      tail=tail,
    )

  def check(self) -> dict[str, float]:
    """Largest errors of the output and, at a short length, the gradients.

    Raises:
      DisagreementError: one is not small.
    """
    found = {"o": self._output_error()} | self._gradient_errors()
    for name, error in found.items():
      if not error <= self.tolerance:
        raise DisagreementError(
          f"{name} is off by {error:.1e}, allowed {self.tolerance:.0e}"
        )
    return found

  @functools.cached_property
  def blocks(self) -> kernels_pallas.BlockIndices:
    """The lists of all contenders."""
    select = jax.jit(self.select)
    return jax.block_until_ready(select(self.arrays["q"], self.arrays["k"]))

  def _output_error(self):
    q, k, v = (self.arrays[x] for x in "qkv")
    blocks = self.blocks
    out = jax.jit(self.attend)(q, k, v, blocks)
    worst = 0.0
    number = q.shape[1] // self.block_q
    chosen = np.linspace(0, number - 1, min(number, _CHECKED_BLOCKS))
    for i in chosen.astype(int):
      rows = slice(i * self.block_q, (i + 1) * self.block_q)
      with jax.enable_x64(True):
        wanted = self.attend(
          *(np.asarray(x, np.float64) for x in (q[:, rows], k, v)),
          (blocks.indices[:, :, i : i + 1], blocks.counts[:, :, i : i + 1]),
          implementation="reference",
        )
        wanted = np.asarray(wanted)
      error = np.asarray(out[:, rows], np.float64) - wanted
      worst = max(worst, np.abs(error).max() / np.abs(wanted).max())
    return float(worst)

  def _gradient_errors(self):
    short = {name: np.asarray(x[:, :_SHORT]) for name, x in self.arrays.items()}
    with jax.enable_x64(True):
      # The lists of both are those of the narrow arrays.
      blocks = self.select(short["q"], short["k"])

      def gradients(arrays, implementation):
        def loss(arrays):
          out = self.attend(
            **arrays, blocks=blocks, implementation=implementation
          )
          return jnp.sum(jnp.square(out.astype(jnp.float64)))

        return jax.jit(jax.grad(loss))(arrays)

      wide = {name: x.astype(np.float64) for name, x in short.items()}
      wanted = jax.tree.map(np.asarray, gradients(wide, "reference"))
      got = jax.tree.map(
        lambda x: np.asarray(x, np.float64), gradients(short, "xla")
      )
    return {
      f"d{name}": float(np.abs(got[name] - x).max() / np.abs(x).max())
      for name, x in wanted.items()
    }

  def sides(self, modes: Sequence[str]) -> dict[str, contender.Contender]:
    """The compiled phases and contenders."""
    q, v, blocks = self.arrays["q"], self.arrays["v"], self.blocks
    options = problem.Options(
      q.shape[-1] ** -0.5, self.block_q, self.block, self.tail
    )

    def pooled(q, k, v):
      inputs = problem.Inputs(q, k, v, blocks.indices, blocks.counts)
      tail = statistics.tail(core.pad(inputs, options), options)
      return () if tail is None else tail._replace(bias=None)

    cotangents = (jnp.ones_like(v),)
    make = lambda f, modes=modes: contender.Contender(
      f, self.arrays, cotangents, modes
    )
    first = modes[:1]
    return {
      "statistics": make(pooled, first),
      "selection": make(lambda q, k, v: self.select(q, k), first),
      "attention": make(lambda q, k, v: self.attend(q, k, v, blocks), modes),
      "together": make(self.together),
      DENSE: make(dense.full_attention),
      PEER: make(lambda q, k, v: jax.nn.dot_product_attention(q, k, v), first),
    }


def _arrays(length, heads, size, dtype):
  """Neighbouring tokens are alike, as in an image or a text."""
  rng = np.random.default_rng(0)
  shape = (1, length, heads, size)

  def draw(smooth):
    x = rng.standard_normal(shape)
    slow = rng.standard_normal((1, -(-length // 64), heads, size))
    x = x + smooth * np.repeat(slow, 64, axis=1)[:, :length]
    return jnp.asarray(x / np.sqrt(1 + smooth**2), dtype)

  return {"q": draw(1.0), "k": draw(1.0), "v": draw(0.5)}


def measure(trial: Trial, rounds: int, modes: Sequence[str]) -> dict[str, Any]:
  """Checks, compiles and times a trial.

  Returns:
    "errors"; "density", the achieved one; "ideal"; "seconds" of each round,
    "spread" and "temp_bytes" by mode and contender; "speedup" over dense by
    mode and rival, round by round (median, min, max); "of_ideal".

  Raises:
    DisagreementError: the values are wrong.
  """
  found = trial.check()
  sides = trial.sides(modes)
  density = float(trial.blocks.density)
  pooled = 0.0 if trial.tail == "drop" else 1 / trial.block
  ideal = 1 / (density + pooled)
  seconds, spread, speedup, of_ideal = {}, {}, {}, {}
  for mode in modes:
    turns = {n: side for n, side in sides.items() if mode in side.modes}
    for side in turns.values():
      side.seconds(mode, 1)
    seconds[mode] = {name: [] for name in turns}
    for _ in range(rounds):
      # Gigabytes that the round before has freed go back to the system in
      # the time of whoever allocates next: of nobody.
      turns["together"].seconds(mode, 1)
      for name, side in turns.items():
        seconds[mode][name].append(side.seconds(mode, 1))
    spread[mode] = {
      name: bench_train.spread(x) for name, x in seconds[mode].items()
    }
    speedup[mode] = {
      f"{name} over {rival}": bench_train.spread(
        [
          a / b
          for a, b in zip(
            seconds[mode][rival], seconds[mode][name], strict=True
          )
        ]
      )
      for name in ("attention", "together")
      for rival in (DENSE, PEER)
      if rival in turns
    }
    of_ideal[mode] = {
      name: speedup[mode][f"{name} over {DENSE}"]["median"] / ideal
      for name in ("attention", "together")
    }
  return {
    "errors": found,
    "density": density,
    "ideal": ideal,
    "seconds": seconds,
    "spread": spread,
    "temp_bytes": {name: side.temp_bytes() for name, side in sides.items()},
    "speedup": speedup,
    "of_ideal": of_ideal,
  }


def report(record: Mapping[str, Any]) -> str:
  """The lines printed for one record."""
  lines = [
    f"T {record['length']}, H {record['heads']}, K {record['size']}, blocks "
    f"of {record['block_q']} queries and {record['block']} keys, tail "
    f"{record['tail']}, {record['dtype']}: density {record['density']:.4f}, "
    f"ideal speed-up {record['ideal']:.2f}; largest error "
    f"{max(record['errors'].values()):.1e}"
  ]
  for mode, spreads in record["spread"].items():
    for name, spread in spreads.items():
      low, middle, high = (1e3 * spread[x] for x in ("min", "median", "max"))
      size = reports.bytes_text(record["temp_bytes"][name][mode])
      lines.append(
        f"  {mode:8s} {name:10s} {middle:8.1f} ms ({low:.1f} to {high:.1f}), "
        f"{size} of temporaries"
      )
    for name, ratio in record["speedup"][mode].items():
      lines.append(
        f"  {mode:8s} {name}: {ratio['median']:.2f} times as fast "
        f"({ratio['min']:.2f} to {ratio['max']:.2f})"
      )
    for name, share in record["of_ideal"][mode].items():
      lines.append(f"  {mode:8s} {name}: {share:.2f} of the ideal speed-up")
  return "\n".join(lines)


def _numbers(flag: str, texts: Sequence[str], least: int) -> list[int]:
  for text in texts:
    if not text.isdigit() or int(text) < least:
      raise errors.UserError(
        f"--{flag}: got {text!r}, allowed: ints from {least} up"
      )
  return [int(text) for text in texts]


def main() -> None:
  """Measures the lengths, blocks and tails asked for."""
  values = flags.FLAGS
  for tail in values.tails:
    if tail not in problem.TAILS:
      raise errors.UserError(
        f"--tails: got {tail!r}, allowed: {', '.join(problem.TAILS)}"
      )
  blocks = _numbers("block_q", values.block_q, 1)
  lengths = _numbers("lengths", values.lengths, max(values.block, *blocks))
  host.keep_freed_memory()
  modes = contender.MODES if values.gradients else contender.MODES[:1]
  for length, block_q, tail in itertools.product(lengths, blocks, values.tails):
    sizes = dict(
      length=length,
      heads=values.heads,
      size=values.head_size,
      block=values.block,
      block_q=block_q,
      density=values.density,
      tail=tail,
      dtype=values.dtype,
    )
    try:
      trial = Trial(**sizes)
      record = measure(trial, values.rounds, modes)
    except DisagreementError as e:
      sys.exit(f"bench_sparse: {tail} at T {length}: {e}; no time is taken")
    except ValueError as e:
      raise errors.UserError(str(e)) from e
    record = {**sizes, "asked": values.density, **record}
    record["load"] = os.getloadavg()
    print(report(record), flush=True)
    if values.record:
      os.makedirs(os.path.dirname(values.record) or ".", exist_ok=True)
      records.append(values.record, {**record, **records.provenance()})


def _define_flags() -> None:
  flags.DEFINE_list("lengths", ["4096", "16384"], "T, one or several.")
  flags.DEFINE_list("tails", ["drop", "mean", "mean_global"], "Which tails.")
  flags.DEFINE_float("density", 0.125, "Listed share of the blocks.")
  flags.DEFINE_integer("heads", 2, "Heads.", lower_bound=1)
  flags.DEFINE_integer("head_size", 64, "K and V.", lower_bound=1)
  flags.DEFINE_integer("block", 64, "Keys of a block.", lower_bound=1)
  flags.DEFINE_list("block_q", ["64", "128"], "Queries of a list, one or more.")
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of q, k and v."
  )
  flags.DEFINE_bool("gradients", False, "Also time the gradients.")
  flags.DEFINE_integer("rounds", 7, "Turns of each contender.", lower_bound=1)
  flags.DEFINE_string(
    "record",
    "experiments/records/bench_sparse.jsonl",
    "The JSON Lines file that gets a record per length, block and tail, or "
    "nothing.",
  )


if __name__ == "__main__":
  errors.run_main("bench_sparse", main, _define_flags)
