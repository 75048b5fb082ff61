"""The pretraining loop: a directory in, a trained model and its records out.

Everything a run knows lies in its directory, and every decision depends on
the step number alone, so a run that was killed and started again writes the
same numbers as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments import (
  configs,
  data,
  errors,
  optimizers,
  reports,
  signals,
  stored,
  trainer,
  transfer,
  workdirs,
)
from jaxlib_ext import checkpoint, records, sharding
from jaxlib_ext import config as config_lib
from models import sampling

# Bytes of a step from which on CPUs one is dispatched at a time.
_LARGE_STEP = 1 << 30


class Run:
  """One pretraining run in one directory.

  Holds the directory's lock until `train` ends or the run is dropped.

  Args:
    config: as `configs.resolve` gives it.
    workdir: made if absent; refused are another config's directory, one in
      which another process runs, and one with files that are not a run's.
    read_only: nothing is written: for those who want the model and the data
      of a run, which may be going on.

  Raises:
    UserError: bad data, an impossible mesh, or a directory that is refused.
  """

  FILES = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
    "tokenizer.json",
  )
  DIRECTORIES = ("checkpoints", "tensorboard")

  def __init__(
    self,
    config: configs.Config,
    workdir: pathlib.Path,
    *,
    read_only: bool = False,
  ):
    self.config, self.workdir = config, workdir
    self.main = jax.process_index() == 0
    mesh = self._mesh()
    # Before anything is read or written, and again with the data's vocabulary.
    trainer.check_sizes(config, config.model.build(vocab_size=1), mesh)
    with self._claimed(read_only):
      self.corpus = self._load_corpus()
      cfg = self._model_config()
      trainer.check_sizes(config, cfg, mesh)
      self.trainer = trainer.Trainer(config, cfg, mesh)
      self.trainer.check_memory()
      self._begin(cfg)

  @property
  def metrics_path(self) -> pathlib.Path:
    """Where the records are."""
    return self.workdir / "metrics.jsonl"

  def _mesh(self) -> jax.sharding.Mesh:
    axes = dataclasses.asdict(self.config.mesh)
    try:
      mesh = sharding.make_mesh(axes)
    except ValueError as e:
      raise errors.UserError(
        f"mesh: {e} (JAX_NUM_CPU_DEVICES=N simulates N on a CPU)"
      ) from e
    if jax.process_count() > 1 and mesh.size != jax.device_count():
      raise errors.UserError(
        f"mesh: {axes} uses {mesh.size} devices; a run of several processes "
        f"must use all {jax.device_count()}"
      )
    return mesh

  @contextlib.contextmanager
  def _claimed(self, read_only: bool) -> Iterator[None]:
    """Refuses what is not this run's directory before anything is written.

    The lock is kept for the run if what follows succeeds.
    """
    self.stored = self._look()
    self._writes = self.main and not read_only
    with contextlib.ExitStack() as held:
      if self._writes:
        self.workdir.mkdir(parents=True, exist_ok=True)
        held.enter_context(workdirs.Lock(self.workdir))
        held.callback(workdirs.discard_start, self.workdir)
        self.stored = self._look()
        workdirs.discard_start(self.workdir)
      yield
      self._held = held.pop_all()

  def _look(self) -> dict[str, Any] | None:
    """What config.json says, if the run has begun."""
    if not workdirs.check(self.workdir, self.FILES, self.DIRECTORIES):
      return None
    facts = stored.facts(self.workdir, "--workdir")
    stored.check_config(facts["config"], self.config, self.workdir)
    return facts

  def _load_corpus(self) -> data.Corpus:
    """One process trains the tokenizer, the others read what it wrote."""
    cache = self.workdir if self.stored else self.workdir / workdirs.START
    made = cache / "tokenizer.json"
    load = lambda: data.load_corpus(
      source=self.config.data.source,
      path=self.config.data.path,
      tokenizer=self.config.data.tokenizer,
      held_out=self.config.data.held_out,
      cache_dir=cache if self._writes or made.exists() else None,
    )
    if self.main:
      corpus = load()
    multihost_utils.sync_global_devices("tokenizer")
    if not self.main:
      corpus = load()
    if self.stored:
      stored.check_corpus(self.stored["corpus"]["hash"], corpus.hash)
    return corpus

  def _model_config(self):
    try:
      cfg = self.config.model.build(self.corpus.tokenizer.vocab_size)
    except ValueError as e:
      raise errors.UserError(f"model: {e}") from e
    length = self.config.training.seq_len
    if "in_context" in cfg.pattern and cfg.context >= length:
      raise errors.UserError(
        f"model.context: got {cfg.context}; allowed: less than "
        f"training.seq_len={length} where a mixer is in_context"
      )
    data.check_vocab(cfg.vocab_size, self.corpus.tokenizer)
    return cfg

  def _begin(self, cfg) -> None:
    """Writes config.json, by which the directory is this run's."""
    multihost_utils.sync_global_devices("accepted")
    if self._writes:
      records.write_json(
        self.workdir / "config.json",
        {
          "config": config_lib.to_dict(self.config),
          "model": config_lib.to_dict(cfg),
          "corpus": self.corpus.describe(),
        },
      )
      workdirs.keep_start(self.workdir)

  def restore(self) -> trainer.TrainState:
    """The latest readable checkpoint's state, or the initial one."""
    self.checkpoints = checkpoint.Checkpointer(self.workdir / "checkpoints")
    damaged, state = [], None
    for step, found in self.checkpoints.restore_latest(self.trainer.target):
      if not isinstance(found, checkpoint.CheckpointError):
        state = found
        break
      damaged.append(step)
      print(f"checkpoint of step {step} is damaged: {found}", file=sys.stderr)
    if damaged and state is None:
      raise errors.UserError(
        f"none of the checkpoints in {self.workdir / 'checkpoints'} can be "
        "read; move that directory away to begin again"
      )
    for step in damaged:
      self.checkpoints.set_aside(step, self.workdir / f"damaged_step_{step}")
    return self._initial() if state is None else state

  def _initial(self) -> trainer.TrainState:
    """The state before the first step."""
    start = self.config.training.init_from
    if not start:
      return self.trainer.init()
    return transfer.initial_state(
      pathlib.Path(start), self.trainer, self.corpus.hash
    )

  def train(self) -> dict[str, Any]:
    """Runs to the end or to a signal.

    Returns:
      What `summary.json` holds; empty where a signal ended the run early.

    Raises:
      UserError: no readable checkpoint, damaged records, or a loss that is
        not finite.
    """
    with self._held:
      return self._train()

  def _train(self) -> dict[str, Any]:
    training = self.config.training
    state = self.restore()
    first = step = int(state.step)
    stored.metrics(self.metrics_path)
    if self.main:
      records.keep(self.metrics_path, lambda m: m["step"] <= first)
    batch_of = self._batches()
    self._banner(first)
    with (
      signals.Interrupt() as interrupt,
      data.Prefetcher(batch_of, first) as batches,
      reports.Meter(self, first) as meter,
    ):
      signalled = None
      while step < training.steps and not signalled:
        if self._one_at_a_time:
          jax.block_until_ready(state)
        state, metrics = self._advance(state, next(batches))
        step += 1
        signalled = interrupt.seen()
        last = step == training.steps
        evaluate = last or due(step, training.eval_every)
        log = evaluate or due(step, training.log_every)
        save = last or signalled or due(step, training.checkpoint_every)
        draw = self._draws(step)
        if not (log or save or draw):
          continue
        # Before a save too: a loss that is not finite must not be kept.
        record = meter.measure(step, metrics)
        if evaluate:
          record |= self._evaluation(state)
        if log:
          meter.write(step, record)
        if draw:
          self._draw(state, f"step_{step:06}.png")
        if save:
          self.checkpoints.save(step, state)
        meter.restart(step)
    self.checkpoints.close()
    if step < training.steps:
      self._say(
        f"{signalled}: saved step {step} of {training.steps}; "
        "the same command continues"
      )
      return {}
    return self._finish(state)

  def _batches(self) -> Callable[[int], Any]:
    """This process's part of a step's batch, from the step's number."""
    training = self.config.training
    stream = data.Stream(
      self.corpus.train,
      batch_size=training.batch_size,
      seq_len=training.seq_len,
      seed=training.seed,
    )
    return lambda step: stream.batch(step, self.trainer.rows)

  @functools.cached_property
  def _one_at_a_time(self) -> bool:
    """Whether a step is dispatched only when the one before it has ended.

    XLA:CPU allocates what a step holds when it is dispatched: steps that wait
    would each hold it, in memory that has to be faulted in first.
    """
    device = self.trainer.mesh.devices.flat[0]
    return (
      device.platform == "cpu" and self.trainer.planned_bytes() > _LARGE_STEP
    )

  def _advance(self, state: Any, batch: Any) -> tuple[Any, Any]:
    return self.trainer.step(state, self.trainer.place(batch))

  def _draws(self, step: int) -> bool:
    """Whether a picture is due after a step; text has none."""
    del step
    return False

  def _evaluation(self, state: Any) -> dict[str, float]:
    training = self.config.training
    loss = self.trainer.evaluate(
      state.params,
      data.eval_batches(
        self.corpus.eval,
        batch_size=training.batch_size,
        seq_len=training.seq_len,
        max_batches=training.eval_batches,
      ),
    )
    out = {"eval_loss": loss}
    if self.corpus.eval_bytes_per_token:
      out["eval_bits_per_byte"] = self._bits_per_byte(loss)
    return out

  def _bits_per_byte(self, nats_per_token: float) -> float:
    return nats_per_token / math.log(2) / self.corpus.eval_bytes_per_token

  def _say(self, text: str) -> None:
    if self.main:
      print(text, flush=True)

  def _banner(self, first: int) -> None:
    """What a reader needs to judge the numbers that follow."""
    run, cfg = self.trainer, self.trainer.cfg
    size, training = run.state_bytes(), self.config.training
    optimizer = self.config.optimizer
    ends = self.corpus.tokenizer.eod is not None
    self._say(
      f"data       {self.corpus.summary()}"
      f"{'' if ends else '; the tokenizer has no known end of a document'}\n"
      f"model      {run.num_params:,} parameters: {cfg.num_layers} layers of "
      f"{cfg.d_model}, vocabulary {cfg.vocab_size}, {cfg.compute_dtype}\n"
      f"optimizer  {optimizer.name}, learning rate {optimizer.learning_rate:g}"
      f", weight decay {optimizer.weight_decay:g}: parameters "
      f"{reports.bytes_text(size['params'])} + state "
      f"{reports.bytes_text(size['state'])} per device, a step holds "
      f"{reports.bytes_text(run.planned_bytes())}\n"
      f"training   {training.steps} steps of {training.batch_size} x "
      f"{training.seq_len} tokens on {run.mesh.size} "
      f"{run.mesh.devices.flat[0].device_kind} device(s), "
      f"{'from the start' if not first else f'resuming after step {first}'}"
    )

  def _finish(self, state: trainer.TrainState) -> dict[str, Any]:
    """The plot, the sample, the summary and the last words."""
    metrics, evals = stored.history(
      self.metrics_path, self.config.training.steps
    )
    baselines = self.corpus.baselines()
    sample = self._sample(state.params)
    final = evals[-1]
    size = self.trainer.state_bytes()
    summary = {
      "name": self.config.name,
      "step": self.config.training.steps,
      "tokens": metrics[-1]["tokens"],
      "parameters": self.trainer.num_params,
      "final_loss": metrics[-1]["loss"],
      "final_eval_loss": final,
      "best_eval_loss": min(evals),
      "perplexity": math.exp(final),
      "bits_per_byte": metrics[-1].get("eval_bits_per_byte"),
      "baselines": baselines,
      "params_bytes": size["params"],
      "optimizer_state_bytes": size["state"],
      "peak_bytes": self.trainer.peak_bytes(),
      "wall_time": metrics[-1]["seconds"],
      "sample": sample,
      "corpus": self.corpus.describe(),
      **records.provenance(),
    }
    if optimizers.flushes(self.config.optimizer.name):
      flushed = state._replace(params=self.trainer.flushed(state))
      flushed = self._evaluation(flushed)
      summary["flushed_eval_loss"] = flushed["eval_loss"]
    if self.main:
      reports.plot_loss(
        self.workdir / "loss.png",
        metrics,
        title=f"{self.config.name}: {self.config.optimizer.name}",
        lines={
          name: value["nats_per_token"] for name, value in baselines.items()
        },
      )
      records.write_json(self.workdir / "summary.json", summary)
    self._last_words(summary)
    return summary

  def _last_words(self, summary: dict[str, Any]) -> None:
    bits, training = summary["bits_per_byte"], self.config.training
    held_out = len(self.corpus.eval)
    batch = training.batch_size * training.seq_len
    read = min(held_out, (training.eval_batches or held_out) * batch)
    lines = [
      f"held-out loss {summary['final_eval_loss']:.4f} nats per token, "
      f"perplexity {summary['perplexity']:.2f}"
      + (f", {bits:.3f} bits per byte" if bits else "")
      + f" ({read:,} of {held_out:,} held-out tokens, evenly spread)"
    ]
    for name, value in summary["baselines"].items():
      lines.append(
        f"  all held-out files by {name}: {value['bits_per_byte']:.3f} bits "
        "per byte"
      )
    lines += [
      "a sample:",
      *(f"  | {line}" for line in summary["sample"].splitlines()),
      f"written to {self.workdir}: summary.json, metrics.jsonl, loss.png, "
      "tensorboard/, checkpoints/",
    ]
    self._say("\n".join(lines))

  def _sample(self, params: Any, length: int = 160) -> str:
    """Continues the first held-out tokens."""
    prompt = np.asarray(self.corpus.eval[:32], np.int32)
    tokens = sampling.sample(
      jax.random.key(self.config.training.seed),
      params,
      jnp.asarray(prompt[None]),
      cfg=self.trainer.cfg,
      steps=length,
      temperature=0.8,
      top_p=0.95,
    )
    text = self.corpus.tokenizer.decode
    return f"{text(prompt)}⟶{text(np.asarray(tokens)[0, -length:])}"


def due(step: int, every: int) -> bool:
  """Whether what happens `every` steps is due after `step`; 0 is never."""
  return every > 0 and step % every == 0
