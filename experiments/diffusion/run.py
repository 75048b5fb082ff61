"""A run of `experiments.train_dit`: a directory in, a trained model out.

As `experiments.loop`, whose directory, checkpoints and claims it shares:
everything a run knows lies in its directory, and every decision depends on
the step number alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import loop, reports
from experiments import stored as stored_lib
from experiments.diffusion import configs, metrics, pictures, trainer
from experiments.diffusion import data as data_lib
from jaxlib_ext import config as config_lib
from jaxlib_ext import records
from models import dit


class Run(loop.Run):
  """One run in one directory.

  Args:
    config: as `configs.resolve` gives it.
    workdir: as of `experiments.loop.Run`.

  Raises:
    UserError: bad data, or a directory that is refused.
  """

  FILES = tuple(n for n in loop.Run.FILES if n != "tokenizer.json")
  DIRECTORIES = (*loop.Run.DIRECTORIES, "samples")

  def __init__(self, config: configs.Config, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    self.main = True
    shape = config.build(num_classes=1).input_shape
    # Before anything is read or written, and again with the data's classes.
    trainer.check_sizes(config, config.build(num_classes=1))
    with self._claimed(read_only=False):
      self.corpus = data_lib.load(config.data, shape)
      if self.stored:
        stored_lib.check_corpus(self.stored["corpus"]["hash"], self.corpus.hash)
      cfg = config.build(len(self.corpus.classes))
      trainer.check_sizes(config, cfg)
      self.trainer = trainer.Trainer(config, cfg)
      self.trainer.check_memory()
      self._begin(cfg)

  def _batches(self) -> Callable[[int], data_lib.Batch]:
    training = self.config.training
    return self.corpus.batches(training.batch_size, training.seed)

  def _advance(self, state: Any, batch: Any) -> tuple[Any, Any]:
    return self.trainer.step(state, batch)

  def _draws(self, step: int) -> bool:
    return loop.due(step, self.config.samples.every)

  def _held_out(self) -> Any:
    training = self.config.training
    return self.corpus.eval_batches(training.batch_size, training.eval_batches)

  def _evaluation(self, state: trainer.TrainState) -> dict[str, float]:
    return {"eval_loss": self._loss(state, shift=0)}

  def _loss(self, state, shift):
    return self.trainer.evaluate(state.ema, self._held_out(), shift)

  def _draw(self, state: trainer.TrainState, name: str) -> dict[str, float]:
    """Draws samples into `samples/`; their likeness where there is a truth."""
    batch = next(self.corpus.eval_batches(self.config.samples.count, 1))
    drawn = self.trainer.sample(state.ema, batch)
    directory = self.workdir / "samples"
    directory.mkdir(exist_ok=True)
    rows = [("sample", drawn)]
    likeness = {}
    if self.trainer.cfg.context:
      context = trainer.to_pixels(trainer.grey(trainer.to_model(batch.x)))
      rows = [("context", context), *rows, ("original", batch.x)]
      likeness = {"sample_psnr": metrics.psnr(drawn, batch.x)}
      likeness["grey_psnr"] = metrics.psnr(context, batch.x)
    if drawn.ndim == 5:  # a row for each clip
      rows = [
        (label, clips[i]) for i in range(len(drawn)) for label, clips in rows
      ]
    pictures.save_grid(directory / name, rows)
    return likeness

  def _banner(self, first: int) -> None:
    """What a reader needs to judge the numbers that follow."""
    run, cfg, training = self.trainer, self.trainer.cfg, self.config.training
    optimizer, corpus = self.config.optimizer, self.corpus
    self._say(
      f"data       {len(corpus.train):,} examples of {cfg.input_shape}, "
      f"{len(corpus.held_out):,} held out, {len(corpus.classes)} classes\n"
      f"model      {run.num_params:,} parameters: {cfg.num_layers} layers of "
      f"{cfg.d_model}, {training.seq_len} tokens, {cfg.attention} attention, "
      f"{cfg.compute_dtype}\n"
      f"optimizer  {optimizer.name}, learning rate "
      f"{optimizer.learning_rate:g}: a step holds "
      f"{reports.bytes_text(run.planned_bytes())}\n"
      f"training   {training.steps} steps of {training.batch_size} examples, "
      f"{'from the start' if not first else f'resuming after step {first}'}"
    )

  def _finish(self, state: trainer.TrainState) -> dict[str, Any]:
    """The plot, the samples, the summary and the last words."""
    lines, evals = stored_lib.history(
      self.metrics_path, self.config.training.steps
    )
    summary = {
      "name": self.config.name,
      "step": self.config.training.steps,
      "parameters": self.trainer.num_params,
      "final_loss": lines[-1]["loss"],
      "final_eval_loss": evals[-1],
      "best_eval_loss": min(evals),
      **self._draw(state, "final.png"),
      "peak_bytes": self.trainer.peak_bytes(),
      "wall_time": lines[-1]["seconds"],
      "corpus": self.corpus.describe(),
      **records.provenance(),
    }
    if self.trainer.cfg.context:
      summary["eval_loss_other_context"] = self._loss(state, shift=1)
    pictures.plot_loss(
      self.workdir / "loss.png",
      lines,
      title=f"{self.config.name}: {self.config.optimizer.name}",
    )
    records.write_json(self.workdir / "summary.json", summary)
    self._say(
      f"held-out loss {summary['final_eval_loss']:.4f} (mean squared error of "
      f"the velocity, uniform times)\nwritten to {self.workdir}: "
      "summary.json, metrics.jsonl, loss.png, samples/, tensorboard/, "
      "checkpoints/"
    )
    return summary


class Trained(NamedTuple):
  """A model that a run has left.

  Attributes:
    cfg: the model; replace `attention` and what belongs to it at will.
    params: the running mean of the parameters.
    config: of the run.
    corpus: its data.
    step: completed steps.
  """

  cfg: dit.Config
  params: Any
  config: configs.Config
  corpus: data_lib.Corpus
  step: int


def load(workdir: pathlib.Path, path: str = "") -> Trained:
  """Reads the latest checkpoint of a run.

  Args:
    workdir: of the run.
    path: where the data lie now, if elsewhere.

  Raises:
    UserError: no such run, no readable checkpoint, or other data.
  """
  workdir = pathlib.Path(workdir)
  stored = stored_lib.facts(workdir, "workdir")
  parse = lambda cls, values: stored_lib.parse(cls, values, workdir, "workdir")
  config = parse(configs.Config, stored["config"])
  cfg = parse(dit.Config, stored["model"])
  if path:
    config = config_lib.replace(config, "data.path", path)
  corpus = data_lib.load(config.data, cfg.input_shape)
  stored_lib.check_corpus(stored["corpus"]["hash"], corpus.hash)
  target = trainer.Trainer(config, cfg).target
  step, state = stored_lib.state(workdir, target, "workdir")
  return Trained(cfg, state.ema, config, corpus, step)
