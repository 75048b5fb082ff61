"""One run of `experiments.linear_lm`: models of equal size, a short loop.

`experiments.loop` trains for hours, in a directory of its own, on text. Runs
here take a minute, and many differ in nothing but learning rate and seed, so
both are arguments of one compiled step; and answers have weights.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import optim
from experiments import configs, errors, optimizers, trainer
from experiments.linear import tasks as task_lib
from jaxlib_ext import specs
from models import decode, losses, transformer

# Everyone's, but for the learning rate.
OPTIMIZER = optimizers.with_defaults(
  configs.Optimizer(name="adamw", learning_rate=0.0, clip_norm=1.0)
)

# What parameters agree to.
_TOLERANCE = 0.01


def _config(task, fields, vocab_size, d_ff) -> transformer.Config:
  # Unrolled layers are faster on a CPU than scanned ones.
  base = {**task.model, "scan_layers": False, "vocab_size": vocab_size}
  return transformer.Config(**{**base, **fields, "d_ff": d_ff})


def target_size(task: task_lib.Task, vocab_size: int) -> int:
  """How many parameters every mixer gets: those of softmax attention."""
  cfg = _config(task, {}, vocab_size, task.model["d_ff"])
  return specs.count(transformer.param_specs(cfg))


def matched(
  task: task_lib.Task,
  fields: dict[str, Any],
  vocab_size: int,
  target: int,
) -> transformer.Config:
  """The model whose feed-forward width gives `target` parameters.

  Args:
    task: the job.
    fields: of the model, besides the task's own: its mixers.
    vocab_size: of the data.
    target: how many parameters.

  Raises:
    UserError: no width gives them to a percent.
  """

  def size(d_ff):
    cfg = _config(task, fields, vocab_size, d_ff)
    return specs.count(transformer.param_specs(cfg))

  one, two = size(1), size(2)
  d_ff = max(1, 1 + round((target - one) / (two - one)))
  got = size(d_ff)
  if abs(got - target) > _TOLERANCE * target:
    raise errors.UserError(
      f"--mixers: {'+'.join(fields['mixers'])} has {got:,} parameters in task "
      f"{task.name}, too far from {target:,}"
    )
  return _config(task, fields, vocab_size, d_ff)


def check_depth(
  task: task_lib.Task, mixer: str, mixers: tuple[str, ...]
) -> None:
  """Refuses a pattern that the model has too few layers for.

  Raises:
    UserError: it has.
  """
  layers = task.model["num_layers"]
  if len(mixers) > layers:
    raise errors.UserError(
      f"--mixers: {mixer} needs {len(mixers)} layers, the models of task "
      f"{task.name} have {layers}"
    )


class Learner:
  """A model and its compiled functions, for any learning rate and seed.

  Args:
    cfg: the model.
    training: the runs' lengths; its seed is not used.
  """

  def __init__(self, cfg: transformer.Config, training: configs.Training):
    self.cfg, self._training = cfg, training
    self._init = jax.jit(self._initial)
    self._step = jax.jit(self._stepped, donate_argnums=0)
    self._score = jax.jit(self._scored)

  def _optimizer(self, rate):
    training = self._training
    optimizer = dataclasses.replace(OPTIMIZER, learning_rate=rate)
    return optimizers.build(optimizer, training.steps, training.warmup_steps, 0)

  def _initial(self, seed):
    params = transformer.init(jax.random.key(seed), self.cfg)
    # Its state does not depend on the rate.
    state = self._optimizer(0.0).init(params)
    return trainer.TrainState(jnp.zeros((), jnp.int32), params, state)

  def _stepped(self, state, rate, batch):
    def loss(params):
      return transformer.loss(
        params,
        batch.tokens,
        batch.targets,
        weights=batch.weights,
        cfg=self.cfg,
      )[0]

    value, grads = jax.value_and_grad(loss)(state.params)
    tx = self._optimizer(rate)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optim.apply_updates(state.params, updates)
    return trainer.TrainState(state.step + 1, params, opt_state), value

  def _scored(self, params, batch):
    """Sums over the answers: nats, right ones, all."""
    logits = transformer.apply(params, batch.tokens, cfg=self.cfg).logits
    nll, _ = losses.cross_entropy(logits, batch.targets)
    right = jnp.argmax(logits, axis=-1) == batch.targets
    return jnp.stack(
      [jnp.sum(x * batch.weights) for x in (nll, right, jnp.ones_like(nll))]
    )

  def evaluate(
    self, params: Any, batches: Iterator[tuple[str, task_lib.Batch]]
  ) -> dict[str, Any]:
    """Held-out nats per answer, and the share of right ones by level."""
    sums = collections.defaultdict(lambda: jnp.zeros(3))
    for level, batch in batches:
      sums[level] += self._score(params, batch)
    totals = {level: x.tolist() for level, x in sums.items()}
    nll, _, count = map(sum, zip(*totals.values(), strict=True))
    return {
      "eval_loss": nll / count,
      "accuracy": {level: x[1] / x[2] for level, x in totals.items()},
    }

  def run(
    self,
    source: task_lib.Text | task_lib.Synthetic,
    rate: float,
    seed: int,
    bar: Any,
  ) -> dict[str, Any]:
    """Trains once.

    Args:
      source: the data.
      rate: the learning rate's peak.
      seed: of the parameters and of the training data.
      bar: is told of every step.

    Returns:
      The final numbers, sizes, and "curve": at each evaluation the step, the
      mean training loss since the last, and what `evaluate` gives. A run
      that diverges ends there, with an infinite "final_eval_loss".
    """
    training = self._training
    state = self._init(seed)
    curve, recent = [], []
    for step in range(1, training.steps + 1):
      batch = source.batch(step - 1, seed)
      state, loss = self._step(state, jnp.float32(rate), batch)
      recent.append(loss)
      bar.update()
      if step % training.eval_every and step < training.steps:
        continue
      point = {"step": step, "loss": float(jnp.mean(jnp.stack(recent)))}
      point |= self.evaluate(state.params, source.held_out())
      curve.append(point)
      recent = []
      bar.set_postfix_str(f"loss {point['eval_loss']:.4f}", refresh=False)
      if not math.isfinite(point["loss"] + point["eval_loss"]):
        point["eval_loss"] = math.inf
        bar.update(training.steps - step)
        break
    return {
      "parameters": specs.count(transformer.param_specs(self.cfg)),
      "state_bytes": decode.cache_bytes(self.cfg, training.seq_len),
      "tokens": step * training.batch_size * training.seq_len,
      "final_eval_loss": curve[-1]["eval_loss"],
      "accuracy": curve[-1]["accuracy"],
      "curve": curve,
    }
