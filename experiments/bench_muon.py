"""Time and memory of one Muon step beside `optax.contrib.muon` and AdamW.

  python -m experiments.bench_muon --model=60M --repeats=9

Values come first: the singular values of each Muon's updates, for gradients
whose own are even and whose own fall to a thousandth. Then the compiled steps
of all contenders take turns, so that a busy machine slows them alike. In both
Muons the embedding and the head go to Adam. "unstacked" is one leaf per layer,
"stacked" one leaf for all layers. One JSON line per run is appended to
`experiments/records/bench_muon.jsonl`.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import optim
from experiments import errors
from jaxlib_ext import records, specs
from models import transformer


def unstack(tree: Any, num_layers: int) -> Any:
  """Turns the stacked layers into a list of one subtree per layer."""
  layers = [
    jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(num_layers)
  ]
  return {**tree, "layers": layers}


def _optax_dimensions(params: Any) -> Any:
  """Our labels, said in `optax.contrib.muon`'s way."""
  return jax.tree.map(
    lambda label, x: (
      optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)
      if label == "matrix"
      else None
    ),
    optim.label_params(params),
    params,
  )


def contenders() -> dict[str, tuple[optax.GradientTransformation, str]]:
  """Name to optimizer and layout of the layers."""
  optax_muon = functools.partial(
    optax.contrib.muon, muon_weight_dimension_numbers=_optax_dimensions
  )
  ours = functools.partial(optim.muon, shape_scale="keller")
  return {
    "optax.contrib.muon/unstacked": (optax_muon(1e-3), "unstacked"),
    "optax.contrib.muon/stacked": (optax_muon(1e-3), "stacked"),
    "optim.muon/unstacked": (ours(1e-3), "unstacked"),
    "optim.muon/stacked": (ours(1e-3), "stacked"),
    "optim.muon(float32)/stacked": (ours(1e-3, ns_dtype="float32"), "stacked"),
    "optim.muon(keller)/stacked": (
      ours(1e-3, coefficients="keller"),
      "stacked",
    ),
    "optax.adamw/unstacked": (optax.adamw(1e-3), "unstacked"),
  }


def singular_value_range(
  tx: optax.GradientTransformation, grads: Any, learning_rate: float = 1e-3
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
    factor = learning_rate * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5
    before, after = (
      np.linalg.svd(np.asarray(x[0], np.float64), compute_uv=False)
      for x in (g, u)
    )
    for threshold, ends in out.items():
      k = np.sum(before >= float(threshold) * np.linalg.norm(before))
      ends[0] = float(min(ends[0], after[k - 1] / factor))
      ends[1] = float(max(ends[1], after[0] / factor))
  return out


def gradients(params: Any, key: jax.Array, decaying: bool) -> Any:
  """Normal entries; `decaying`: each column 1 to 1e-3 times as large."""
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))

  def draw(key, x):
    g = 1e-3 * jax.random.normal(key, x.shape, x.dtype)
    return g * jnp.geomspace(1, 1e-3, x.shape[-1]) if decaying else g

  return treedef.unflatten(
    [draw(k, x) for k, x in zip(keys, leaves, strict=True)]
  )


def compile_step(
  tx: optax.GradientTransformation, params: Any, grads: Any
) -> Any:
  """One update and its application, parameters and state donated."""

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  jitted = jax.jit(step, donate_argnums=(0, 1))
  return jitted.lower(params, jax.eval_shape(tx.init, params), grads).compile()


def compare(cfg: transformer.Config, repeats: int) -> dict[str, Any]:
  """Values, temporaries and interleaved times of all contenders.

  Returns:
    "ranges": singular values per contender and kind of gradient; "temp_bytes";
    "seconds": all samples; "median" and "spread" (the least and greatest of
    them); "ratio": median over `optax.contrib.muon/unstacked`, repeat by
    repeat; "load": of the machine before and after.
  """
  stacked = jax.jit(
    functools.partial(specs.init, specs=transformer.param_specs(cfg))
  )(jax.random.key(0))
  params = {"stacked": stacked, "unstacked": unstack(stacked, cfg.num_layers)}
  txs = contenders()
  ranges = {}
  for kind in ("even", "decaying"):
    grads = gradients(stacked, jax.random.key(1), kind == "decaying")
    for name, (tx, layout) in txs.items():
      if "muon" in name and layout == "stacked":
        ranges[f"{name}/{kind}"] = singular_value_range(tx, grads)

  grads = {k: gradients(p, jax.random.key(1), False) for k, p in params.items()}
  steps, held = {}, {}
  for name, (tx, layout) in txs.items():
    steps[name] = compile_step(tx, params[layout], grads[layout])
    held[name] = jax.tree.map(jnp.copy, params[layout]), tx.init(params[layout])

  seconds = {name: [] for name in txs}
  load = [os.getloadavg()]
  for repeat in range(repeats + 1):
    for name, (_, layout) in txs.items():
      start = time.perf_counter()
      held[name] = jax.block_until_ready(
        steps[name](*held[name], grads[layout])
      )
      if repeat:  # The first round warms up.
        seconds[name].append(time.perf_counter() - start)
  load.append(os.getloadavg())

  base = np.array(seconds["optax.contrib.muon/unstacked"])
  return {
    "ranges": ranges,
    "temp_bytes": {
      name: step.memory_analysis().temp_size_in_bytes
      for name, step in steps.items()
    },
    "seconds": seconds,
    "median": {k: float(np.median(v)) for k, v in seconds.items()},
    "spread": {k: [min(v), max(v)] for k, v in seconds.items()},
    "ratio": {k: float(np.median(v / base)) for k, v in seconds.items()},
    "load": load,
  }


def main() -> None:
  """Checks the values, takes the times, appends the record."""
  values = flags.FLAGS
  try:
    cfg = transformer.llama(values.model)
  except ValueError as e:
    raise errors.UserError(f"--model: {e}") from e
  result = compare(cfg, values.repeats)
  for name, ends in result["ranges"].items():
    low, high = ends["0.001"]
    print(f"{name:42s} singular values {low:.3f} to {high:.3f}")
  for name, median in result["median"].items():
    low, high = result["spread"][name]
    print(
      f"{name:32s} {median:7.3f} s ({low:.3f} to {high:.3f})  "
      f"{result['ratio'][name]:5.2f} of optax  "
      f"{result['temp_bytes'][name] / 1e6:7.0f} MB temporaries"
    )
  records.append(
    values.record,
    {"model": values.model, **result, **records.provenance()},
  )


def _define_flags() -> None:
  flags.DEFINE_string("model", "60M", "Preset of `transformer.llama`.")
  flags.DEFINE_integer(
    "repeats", 9, "Steps timed per contender.", lower_bound=1
  )
  flags.DEFINE_string(
    "record",
    "experiments/records/bench_muon.jsonl",
    "The JSON Lines file that gets the record.",
  )


if __name__ == "__main__":
  errors.run_main("bench_muon", main, _define_flags)
