"""One side of `experiments.bench_train`, in a process of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
  bench_train_torch,
  configs,
  reports,
  trainer,
  workers,
)
from jaxlib_ext import host, paths, sharding

# A constant rate from the first step: PyTorch's side then needs no schedule.
_FIXED = (
  "optimizer.name=adamw",
  "optimizer.schedule=constant",
  "training.warmup_steps=0",
)


@dataclasses.dataclass(frozen=True)
class Point:
  """What is trained.

  Attributes:
    name: of the row.
    overrides: of the config `tiny`, as `--set` takes them.
    vocab_size: that of the tokenizer the config would train.
  """

  name: str
  overrides: tuple[str, ...]
  vocab_size: int

  def config(self) -> configs.Config:
    """The config, with a learning rate that does not change."""
    return configs.resolve("tiny", (*self.overrides, *_FIXED))

  def tokens(self) -> np.ndarray:
    """The batch of every step, `[B, T + 1]`, drawn like text: by Zipf's law."""
    training = self.config().training
    share = 1.0 / np.arange(1, self.vocab_size + 1)
    shape = (training.batch_size, training.seq_len + 1)
    rng = np.random.default_rng(training.seed)
    drawn = rng.choice(self.vocab_size, shape, p=share / share.sum())
    return drawn.astype(np.int32)


def adamw(config: configs.Config) -> dict[str, float]:
  """The optimizer's numbers, optax's defaults filled in."""
  optimizer = config.optimizer
  numbers = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, **optimizer.arguments}
  return {
    "learning_rate": optimizer.learning_rate,
    "weight_decay": optimizer.weight_decay,
    **{name: numbers[name] for name in ("b1", "b2", "eps")},
  }


class Ours:
  """The trainer of `experiments.pretrain`, on one device.

  Args:
    point: what to train.
  """

  def __init__(self, point: Point):
    config = point.config()
    mesh = sharding.make_mesh(
      {"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]
    )
    cfg = config.model.build(point.vocab_size)
    self._dtype = jnp.dtype(cfg.compute_dtype)
    self._trainer = trainer.Trainer(config, cfg, mesh)
    self._state = self._trainer.init()
    self._tokens = self._trainer.place(point.tokens())
    self._step = self._trainer.compiled

  def weights(self) -> dict[str, np.ndarray]:
    """Leaf name → the parameter as it now is."""
    flat = jax.tree_util.tree_flatten_with_path(self._state.params)[0]
    return {paths.leaf_name(path): np.asarray(leaf) for path, leaf in flat}

  def losses(self, steps: int) -> Sequence[float]:
    """The losses of the next `steps` steps, each before its update."""
    out = []
    for _ in range(steps):
      self._state, metrics = self._step(self._state, self._tokens)
      out.append(float(metrics["loss"]))
    return out

  def seconds(self, steps: int) -> float:
    """Seconds of `steps` steps, waited for at the end only."""
    start = time.perf_counter()
    for _ in range(steps):
      self._state, _ = self._step(self._state, self._tokens)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start

  def describe(self) -> dict[str, Any]:
    """What turns seconds into rates."""
    return {
      "parameters": self._trainer.num_params,
      "flops_per_token": self._trainer.flops_per_token(),
      "matmul_rate": reports.matmul_rate(self._dtype),
    }


def session(framework: str, point: Point, weights: str) -> Any:
  """Makes one side; ours writes the initial weights to `weights`, others read.

  Args:
    framework: "ours", "eager" or "compiled".
    point: what to train.
    weights: path of an .npz file.
  """
  if framework == "ours":
    side = Ours(point)
    np.savez(weights, **side.weights())
    return side
  config = point.config()
  with np.load(weights) as loaded:
    return bench_train_torch.Session(
      config.model.build(point.vocab_size),
      dict(loaded),
      point.tokens(),
      adamw(config),
      compiled=framework == "compiled",
    )


def answer(side: Any, request: Mapping[str, Any]) -> Any:
  """Calls the method that a request names."""
  if request["do"] == "describe":
    return side.describe()
  return getattr(side, request["do"])(request["steps"])


def _first_session(framework: str, point: Mapping[str, Any], weights: str):
  if framework == "ours":
    host.keep_freed_memory()
  return session(framework, Point(**point), weights)


if __name__ == "__main__":
  workers.serve(_first_session, answer)
