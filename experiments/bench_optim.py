"""Time and memory of one step of each optimizer, beside optax's.

  python -m experiments.bench_optim --model=60M --rounds=9

Values come first, where a peer computes the same thing: with one set of
coefficients in float32 our Muon's first update is that of
`optax.contrib.muon`, SCALE's columns have the length that its formula gives
in float64; and the singular values of each Muon's updates are shown, for
gradients whose own are even and whose own fall to a thousandth. Then the
compiled steps of a group take turns, so that a busy machine slows them alike;
parameters and state are donated. In the groups of Muon and of GaLore the
embedding and the head go to Adam on both sides. "unstacked" is one leaf per
layer, "stacked" one leaf for all layers.

Targets: Muon at most half of optax's time where bfloat16 matmuls are native
and at most 0.7 of it elsewhere, SCALE at most 0.6 of AdamW's. One JSON line
per group is appended to `experiments/records/bench_optim.jsonl`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import optim
from experiments import bench_optim_sides as contenders
from experiments import (
  bench_train,
  contender,
  errors,
  reports,
)
from jaxlib_ext import host, records, specs
from models import transformer

# Two float32 Newton-Schulz iterations in other orders of summation: rounding
# of 2^-24 times their slope at 0, which is 485, a few times.
_SAME = 1e-3


class DisagreementError(Exception):
  """An optimizer gives other values than it should; nothing is timed."""


def singular_value_range(
  tx: optax.GradientTransformation, grads: Any
) -> dict[str, list[float]]:
  """Range of the first update's singular values, over one layer's matrices.

  Keller's shape factor and the learning rate are divided out. Values that are
  next to nothing in the gradient say little of the optimizer, so the k
  greatest are looked at, k of the gradient's being at least the threshold
  times its Frobenius norm.

  Returns:
    Least and greatest for each threshold, "0.01" and "0.001".
  """
  updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
  out = {"0.01": [np.inf, 0.0], "0.001": [np.inf, 0.0]}
  for label, g, u in zip(
    *map(jax.tree.leaves, (optim.label_params(grads), grads, updates)),
    strict=True,
  ):
    if label != "matrix":
      continue
    factor = contenders.RATE * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5
    before, after = (
      np.linalg.svd(np.asarray(x[0], np.float64), compute_uv=False)
      for x in (g, u)
    )
    for threshold, ends in out.items():
      k = np.sum(before >= float(threshold) * np.linalg.norm(before))
      ends[0] = float(min(ends[0], after[k - 1] / factor))
      ends[1] = float(max(ends[1], after[0] / factor))
  return out


def gradients(params: Any, decaying: bool) -> Any:
  """Normal entries; `decaying`: each column 1 to 1e-3 times as large."""
  rng = np.random.default_rng(1)

  def draw(x):
    size = np.geomspace(1, 1e-3, x.shape[-1]) if decaying else 1.0
    g = 1e-3 * size * rng.standard_normal(x.shape, np.float32)
    return jnp.asarray(g, x.dtype)

  return jax.tree.map(draw, params)


def _check_muon(stacked: Any, grads: Any) -> dict[str, float]:
  """The first updates of two Muons of one schedule, leaf by leaf."""
  ours = optim.muon(
    contenders.RATE,
    shape_scale="keller",
    coefficients="keller",
    ns_dtype="float32",
  )
  peer = contenders.GROUPS["muon"]()[f"{contenders.OPTAX_MUON}/stacked"].tx
  got, wanted = (
    jax.jit(tx.update)(grads, tx.init(stacked), stacked)[0]
    for tx in (ours, peer)
  )
  worst = 0.0
  for label, a, b in zip(
    *map(jax.tree.leaves, (optim.label_params(stacked), got, wanted)),
    strict=True,
  ):
    if label == "matrix":
      error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
      worst = max(worst, error)
  return {"muon against optax.contrib.muon": worst}


def _check_scale(stacked: Any, grads: Any) -> dict[str, float]:
  """SCALE's first updates of the matrices against the formula in float64."""
  tx = optim.column_normalized_sgd(contenders.RATE)
  got, _ = jax.jit(tx.update)(grads, tx.init(stacked), stacked)
  worst = 0.0
  for label, u, g in zip(
    *map(jax.tree.leaves, (optim.label_params(stacked), got, grads)),
    strict=True,
  ):
    if label == "matrix":
      g = np.asarray(g[0], np.float64)
      wanted = -contenders.RATE * g / np.sqrt(np.mean(g**2, axis=0))
      error = (
        np.abs(np.asarray(u[0], np.float64) - wanted).max() / contenders.RATE
      )
      worst = max(worst, float(error))
  return {"scale against its formula": worst}


_CHECKS = {"muon": _check_muon, "elementwise": _check_scale}


def check(group: str, stacked: Any, grads: Any) -> dict[str, float]:
  """Largest relative errors of what there is another account of.

  Raises:
    DisagreementError: one is not small.
  """
  found = _CHECKS.get(group, lambda *_: {})(stacked, grads)
  for name, error in found.items():
    if not error <= _SAME:
      raise DisagreementError(
        f"{name}: off by {error:.1e}, allowed {_SAME:.0e}"
      )
  return found


def measure(
  group: str, cfg: transformer.Config, rounds: int, native: bool
) -> dict[str, Any]:
  """Values, temporaries and interleaved times of a group.

  Args:
    group: of `bench_optim_sides.GROUPS`.
    cfg: the model whose parameters are updated.
    rounds: turns of each contender.
    native: whether bfloat16 matmuls are, for the targets.

  Returns:
    "errors" and, of Muons, "ranges" of singular values; "temp_bytes",
    "state_bytes", "seconds" (all samples), "first_seconds" (the first step,
    in which subspaces are found) and "spread" per contender; "ratio": of the
    first contender's time, round by round (median, min, max); "targets".

  Raises:
    DisagreementError: the values are wrong.
  """
  init = functools.partial(specs.init, specs=transformer.param_specs(cfg))
  stacked = jax.jit(init)(jax.random.key(0))
  grads = gradients(stacked, decaying=False)
  out = {"errors": check(group, stacked, grads)}
  sides = contenders.GROUPS[group]()
  if group == "muon":
    out["ranges"] = _ranges(sides, grads)
  layouts = {
    "stacked": (stacked, grads),
    "unstacked": tuple(
      contenders.unstack(x, cfg.num_layers) for x in (stacked, grads)
    ),
  }
  steps, seconds, first, calls = {}, {}, {}, {}
  for name, side in sides.items():
    params, g = layouts[side.layout]
    steps[name] = contender.Update(side.tx, side.prepare(params), g)
    first[name] = steps[name].seconds(1)
    calls[name] = contender.calls(steps[name].seconds(1))
    seconds[name] = []
  for _ in range(rounds):
    for name, step in steps.items():
      seconds[name].append(step.seconds(calls[name]))
  base = seconds[next(iter(sides))]
  wanted = contenders.targets(native).get(group, {})
  return out | {
    "temp_bytes": {name: step.temp_bytes() for name, step in steps.items()},
    "state_bytes": {name: step.state_bytes for name, step in steps.items()},
    "seconds": seconds,
    "first_seconds": first,
    "spread": {k: bench_train.spread(v) for k, v in seconds.items()},
    "ratio": {
      k: bench_train.spread([a / b for a, b in zip(v, base, strict=True)])
      for k, v in seconds.items()
    },
    "targets": {k: v for k, v in wanted.items() if k in sides},
  }


def _ranges(sides: Mapping[str, contenders.Side], even: Any) -> Any:
  kinds = {"even": even, "decaying": gradients(even, decaying=True)}
  return {
    f"{name}/{kind}": singular_value_range(side.tx, grads)
    for kind, grads in kinds.items()
    for name, side in sides.items()
    if name.endswith("/stacked")
  }


def report(record: Mapping[str, Any]) -> str:
  """The lines printed for one group."""
  lines = [
    f"{record['group']}, LLaMA {record['model']}: {what}: {error:.1e}"
    for what, error in record["errors"].items()
  ]
  for name, ends in record.get("ranges", {}).items():
    low, high = ends["0.001"]
    lines.append(f"  {name:36s} singular values {low:.3f} to {high:.3f}")
  base = next(iter(record["spread"]))
  for name, spread in record["spread"].items():
    ratio = record["ratio"][name]
    lines.append(
      f"  {name:28s} {spread['median']:7.3f} s ({spread['min']:.3f} to "
      f"{spread['max']:.3f}, first {record['first_seconds'][name]:.3f})  "
      f"{ratio['median']:5.2f} of {base} ({ratio['min']:.2f} to "
      f"{ratio['max']:.2f}), state "
      f"{reports.bytes_text(record['state_bytes'][name])}, temporaries "
      f"{reports.bytes_text(record['temp_bytes'][name])}"
    )
  for name, share in record["targets"].items():
    met = record["ratio"][name]["median"] <= share
    lines.append(
      f"  target: {name} at most {share} of {base}: "
      f"{'met' if met else 'missed'}"
    )
  return "\n".join(lines)


def main() -> None:
  """Measures the groups asked for."""
  values = flags.FLAGS
  try:
    cfg = transformer.llama(values.model)
  except ValueError as e:
    raise errors.UserError(f"--model: {e}") from e
  unknown = sorted(set(values.groups) - set(contenders.GROUPS))
  if unknown:
    raise errors.UserError(
      f"--groups: got {unknown}, allowed: {list(contenders.GROUPS)}"
    )
  host.keep_freed_memory()
  rates = {d: reports.matmul_rate(d) for d in ("bfloat16", "float32")}
  # Emulated products are no faster than those they are made of.
  native = rates["bfloat16"] > 1.2 * rates["float32"]
  for group in values.groups:
    load = [os.getloadavg()]
    try:
      record = measure(group, cfg, values.rounds, native)
    except DisagreementError as e:
      sys.exit(f"bench_optim: {e}; no time is taken")
    load.append(os.getloadavg())
    record = {"group": group, "model": values.model, **record}
    print(report(record), flush=True)
    if values.record:
      os.makedirs(os.path.dirname(values.record) or ".", exist_ok=True)
      extra = {"matmul_rate": rates, "native_bfloat16": native, "load": load}
      records.append(values.record, record | extra | records.provenance())


def _define_flags() -> None:
  flags.DEFINE_string("model", "60M", "Preset of `transformer.llama`.")
  flags.DEFINE_list("groups", list(contenders.GROUPS), "Which groups.")
  flags.DEFINE_integer("rounds", 9, "Turns of each contender.", lower_bound=1)
  flags.DEFINE_string(
    "record",
    "experiments/records/bench_optim.jsonl",
    "The JSON Lines file that gets one record per group; empty for none.",
  )


if __name__ == "__main__":
  errors.run_main("bench_optim", main, _define_flags)
