"""The curvature that steps of Muon, Adam and SGD meet, at matched losses.

  python -m experiments.muon_curvature
  python -m experiments.muon_curvature --text=python

A small transformer is trained on sentences of a random grammar whose choices
follow Zipf's law with each of --exponents (`experiments.analyses.pcfg`): the
imbalance that is said to favour Muon (arXiv 2606.04662). With --text it is
trained on bytes of text instead: "python" or a directory.

A run of each optimizer and seed is measured once at each of --levels: where
its held-out loss first comes below floor + level (start - floor), with the
start ln V and the floor the entropy of the grammar's choices (of text, 0).
There the step that the optimizer then takes, the actual difference of the
parameters, is looked at by `optim.diagnostics.directional_sharpness`, on
held-out data: first-order gain, curvature, normalised directional sharpness
(NDS) and its parts within and across layers; and once more with nothing but
the hidden matrices moved, the part that Muon does not leave to Adam.

Each measurement is a line of --record; a run whose lines all stand there
already is not trained again. Beside it lies the picture, and a table is
printed. Learning rates are constant after a warm-up. --search finds for each
optimizer and kind of data the one, of those of --optimizers times powers of 2,
with which seed 0 comes to the levels soonest; without it they are as given.
The gain and the penalty of a step depend on them, its NDS only by the path.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import optim
from experiments import errors, reports
from experiments.analyses import curvature_picture, sources
from experiments.comparison import search
from jaxlib_ext import config as config_lib
from jaxlib_ext import records, specs
from models import transformer

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "muon": optim.muon,
  "adam": lambda rate: optax.adam(rate, b1=0.9, b2=0.95, eps=1e-10),
  "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
}
RATES = {"muon": 0.01, "adam": 0.004, "sgd": 0.05}
_WARMUP = 10
_CHECK_EVERY = 5


@dataclasses.dataclass(frozen=True)
class Options:
  """What the flags say.

  Attributes:
    exponents: of the grammars; not used with `text`.
    text: None, "python" or a directory.
    optimizers: names of `OPTIMIZERS` and their learning rates.
    search: whether to search from these.
    seeds: runs of each, which differ in parameters and data.
    levels: where to measure, shares of the way from the floor to the start.
    steps: where a run ends that has not come to all levels.
    batch_size: rows of a step.
    measured: held-out rows of a measurement.
    d_model: width of the model.
    num_layers: its layers.
    record: JSON Lines file; the picture lies beside it.
  """

  exponents: tuple[float, ...]
  text: str | None
  optimizers: dict[str, float]
  search: bool
  seeds: int
  levels: tuple[float, ...]
  steps: int
  batch_size: int
  measured: int
  d_model: int
  num_layers: int
  record: pathlib.Path

  def __post_init__(self):
    for name in self.optimizers:
      if name not in OPTIMIZERS:
        raise errors.UserError(
          f"--optimizers: got {name!r}; allowed: {', '.join(OPTIMIZERS)}"
        )
    for level in self.levels:
      if not 0 < level < 1:
        raise errors.UserError(
          f"--levels: got {level:g}; allowed: between 0 and 1"
        )
    if self.d_model % 8:
      raise errors.UserError(
        f"--d_model: got {self.d_model}; allowed: multiples of 8"
      )


def blocks(params: Any) -> Any:
  """The layer of each parameter: those of the stack, and three around it."""
  return {
    name: jax.tree.map(lambda x: np.arange(x.shape[0]), leaf)
    if name == "layers"
    else name
    for name, leaf in params.items()
  }


class Model:
  """A model's compiled functions, the same for all optimizers.

  Args:
    cfg: the model.
  """

  def __init__(self, cfg: transformer.Config):
    self.cfg = cfg
    self.init = jax.jit(
      lambda seed: transformer.init(jax.random.key(seed), cfg)
    )
    self.loss = jax.jit(self._loss)
    self._sharpness = jax.jit(self._measured)
    self._steps: dict[tuple[str, float], tuple[Any, Any]] = {}

  def optimizer(self, name: str, rate: float) -> tuple[Any, Any]:
    """Its transformation, and `step(params, state, rows)`."""
    if (name, rate) not in self._steps:
      tx = OPTIMIZERS[name](optax.linear_schedule(0.0, rate, _WARMUP))

      def step(params, state, rows):
        grads = jax.grad(self._loss)(params, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

      self._steps[name, rate] = tx, jax.jit(step)
    return self._steps[name, rate]

  def _loss(self, params, rows):
    return transformer.loss(params, rows[:, :-1], rows[:, 1:], cfg=self.cfg)[0]

  def measure(self, before: Any, after: Any, rows: Any) -> list[dict[str, Any]]:
    """Sharpness of the whole step, and of its hidden matrices alone."""
    step = jax.tree.map(jnp.subtract, after, before)
    hidden = jax.tree.map(
      lambda label, x: x if label == "matrix" else jnp.zeros_like(x),
      optim.label_params(before),
      step,
    )
    return [self._sharpness(before, x, rows) for x in (step, hidden)]

  def _measured(self, params, step, rows):
    found = optim.diagnostics.directional_sharpness(
      lambda p: self._loss(p, rows), params, step, blocks=blocks(params)
    )
    return {**found._asdict(), "norm": optax.tree.norm(step)}


@functools.cache
def _model(cfg: transformer.Config) -> Model:
  return Model(cfg)


def _config(options: Options, vocab_size: int) -> transformer.Config:
  return transformer.Config(
    vocab_size=vocab_size,
    d_model=options.d_model,
    num_layers=options.num_layers,
    num_heads=options.d_model // 16 or 1,
    d_ff=options.d_model * 11 // 4,
  )


class Runner:
  """Trains and measures what the record does not hold.

  Args:
    options: the flags.
    bar: progress in steps.
  """

  def __init__(self, options: Options, bar: Any):
    self._options, self._bar = options, bar
    records.keep(options.record, lambda record: True)
    self._known = records.read(options.record)

  def late(self, source: Any, name: str, rates: Sequence[float]) -> list[float]:
    """How late seed 0 comes to the levels with these rates: mean step."""
    self._bar.total += self._options.steps * len(rates)
    return [
      float(np.mean([x.get("step", self._options.steps) for x in levels]))
      for levels in (self.run(source, name, 0, rate) for rate in rates)
    ]

  def run(
    self, source: Any, name: str, seed: int, rate: float
  ) -> list[dict[str, Any]]:
    """The records of all levels, in their order."""
    options = self._options
    cfg = _config(options, source.vocab_size)
    job = {
      "data": source.describe(),
      "optimizer": name,
      "learning_rate": rate,
      "seed": seed,
      "steps": options.steps,
      "batch_size": options.batch_size,
      "measured": options.measured,
      "d_model": options.d_model,
      "num_layers": options.num_layers,
    }
    jobs = [
      {
        **job,
        "level": level,
        "target": source.floor
        + level * (math.log(source.vocab_size) - source.floor),
      }
      for level in sorted(options.levels, reverse=True)
    ]
    jobs = json.loads(json.dumps(jobs))
    first = self._bar.n
    found = [records.find(self._known, j) for j in jobs]
    if None in found:
      for i, measured in self._train(_model(cfg), source, jobs):
        if found[i] is None:
          # Not part of the job: configs get new fields.
          model = config_lib.to_dict(cfg)
          found[i] = {
            **jobs[i], "model": model, **measured, **records.provenance()
          }  # fmt: skip
          records.append(options.record, found[i])
          self._known.append(found[i])
    self._bar.update(first + options.steps - self._bar.n)
    return found

  def _train(self, model, source, jobs):
    """Yields the number of a level and what was measured there."""
    options, seed = self._options, jobs[0]["seed"]
    tx, take = model.optimizer(jobs[0]["optimizer"], jobs[0]["learning_rate"])
    held_out = source.held_out(options.measured)
    params = model.init(seed)
    state = tx.init(params)
    reached = 0
    for step in range(options.steps):
      if step % _CHECK_EVERY == 0:
        loss = float(model.loss(params, held_out))
        self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if not math.isfinite(loss):
          break
      rows = source.batch(step, options.batch_size, seed)
      after, state = take(params, state, rows)
      if step % _CHECK_EVERY == 0 and loss <= jobs[reached]["target"]:
        whole, hidden = model.measure(params, after, held_out)
        point = {
          "reached": True,
          "step": step,
          "loss": loss,
          "parameters": specs.count(transformer.param_specs(model.cfg)),
          "whole": {k: float(x) for k, x in whole.items()},
          "hidden": {k: float(x) for k, x in hidden.items()},
        }
        while reached < len(jobs) and loss <= jobs[reached]["target"]:
          yield reached, point
          reached += 1
        if reached == len(jobs):
          return
      params = after
      self._bar.update()
    for i in range(reached, len(jobs)):
      yield i, {"reached": False}


def run(options: Options) -> list[dict[str, Any]]:
  """Every measurement's record, in the order of data, optimizers and seeds."""
  options.record.parent.mkdir(parents=True, exist_ok=True)
  if options.text:
    makers = {"text": lambda: sources.Text(options.text)}
  else:
    makers = {
      f"exponent {s:g}": lambda s=s: sources.Zipf(s) for s in options.exponents
    }
  count = len(makers) * len(options.optimizers) * options.seeds
  out = []
  with reports.progress(count * options.steps, 0, True) as bar:
    runner = Runner(options, bar)
    for label, make in makers.items():
      source = make()
      for name, rate in options.optimizers.items():
        bar.set_description_str(f"{label} {name}", refresh=False)
        if options.search:
          rate, _ = search.along(
            functools.partial(runner.late, source, name), rate
          )
        for seed in range(options.seeds):
          out += runner.run(source, name, seed, rate)
  return out


def main() -> None:
  """Runs, prints and draws."""
  values = flags.FLAGS
  options = Options(
    exponents=_numbers("exponents", values.exponents),
    text=values.text,
    optimizers=_optimizers(values.optimizers),
    search=values.search,
    seeds=values.seeds,
    levels=_numbers("levels", values.levels),
    steps=values.steps,
    batch_size=values.batch_size,
    measured=values.measured,
    d_model=values.d_model,
    num_layers=values.num_layers,
    record=pathlib.Path(values.record),
  )
  points = run(options)
  print(curvature_picture.table(points), flush=True)
  curvature_picture.draw(points, options.record)


def _numbers(flag: str, texts: list[str]) -> tuple[float, ...]:
  try:
    return tuple(float(text) for text in texts)
  except ValueError as e:
    raise errors.UserError(f"--{flag}: expected numbers: {e}") from e


def _optimizers(texts: list[str]) -> dict[str, float]:
  out = {}
  for text in texts:
    name, _, rate = text.partition(":")
    out[name] = RATES.get(name, 0.0)
    if rate:
      (out[name],) = _numbers("optimizers", [rate])
  return out


def _define_flags() -> None:
  flags.DEFINE_list("exponents", ["0", "0.5", "1", "1.5"], "Of Zipf's law.")
  flags.DEFINE_string("text", None, "Instead of grammars: python, or a folder.")
  flags.DEFINE_list(
    "optimizers",
    list(RATES),
    f"Among {', '.join(RATES)}; with another learning rate as adam:0.002.",
  )
  flags.DEFINE_bool("search", False, "Search the learning rates.")
  flags.DEFINE_integer("seeds", 2, "Runs of each.", lower_bound=1)
  flags.DEFINE_list(
    "levels", ["0.7", "0.5", "0.4", "0.3", "0.2"], "Where to measure."
  )
  flags.DEFINE_integer("steps", 240, "Of a run, at most.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 16, "Rows of a step.", lower_bound=1)
  flags.DEFINE_integer("measured", 32, "Held-out rows.", lower_bound=1)
  flags.DEFINE_integer("d_model", 64, "Width.", lower_bound=8)
  flags.DEFINE_integer("num_layers", 2, "Layers.", lower_bound=1)
  flags.DEFINE_string(
    "record",
    "experiments/records/muon_curvature.jsonl",
    "The JSON Lines file that gets the records; the picture lies beside it.",
  )


if __name__ == "__main__":
  errors.run_main("muon_curvature", main, _define_flags)
