"""What `experiments.linear_lm` trains on, and how large and how long."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments import configs, data, errors
from experiments.linear import synthetic
from jaxlib_ext import config as config_lib

Batch = synthetic.Batch


class Text:
  """Windows of a tokenised corpus, every token but the first an answer."""

  def __init__(self, corpus: data.Corpus, training: configs.Training):
    self._corpus, self._training = corpus, training
    self._streams = {}
    self.vocab_size = corpus.tokenizer.vocab_size

  def describe(self) -> dict[str, Any]:
    """What a record should say about it."""
    return self._corpus.describe()

  def batch(self, step: int, seed: int) -> Batch:
    """The training batch of a step."""
    if seed not in self._streams:
      self._streams[seed] = data.Stream(
        self._corpus.train,
        batch_size=self._training.batch_size,
        seq_len=self._training.seq_len,
        seed=seed,
      )
    tokens = self._streams[seed].batch(step)
    return _shifted(tokens, np.ones(tokens[:, 1:].shape, np.float32))

  def held_out(self) -> Iterator[tuple[str, Batch]]:
    """Every held-out batch, and the name of its level."""
    for tokens, weights in data.eval_batches(
      self._corpus.eval,
      batch_size=self._training.batch_size,
      seq_len=self._training.seq_len,
      max_batches=self._training.eval_batches,
    ):
      yield "next token", _shifted(tokens, weights)


def _shifted(tokens: np.ndarray, weights: np.ndarray) -> Batch:
  return Batch(tokens[:, :-1], tokens[:, 1:], weights)


class Synthetic:
  """A task of `experiments.linear.synthetic`."""

  def __init__(
    self,
    source: synthetic.Recall | synthetic.Group,
    training: configs.Training,
  ):
    self._source, self._training = source, training
    self.vocab_size = source.vocab_size

  def describe(self) -> dict[str, Any]:
    """What a record should say about it."""
    return {
      "kind": type(self._source).__name__,
      **config_lib.to_dict(self._source),
    }

  def batch(self, step: int, seed: int) -> Batch:
    """The training batch of a step."""
    size = self._training.batch_size
    return self._source.batch(step, size=size, seed=seed)

  def held_out(self) -> Iterator[tuple[str, Batch]]:
    """Every held-out batch, and the name of its level."""
    size = self._training.batch_size
    for level in self._source.levels:
      for step in range(self._training.eval_batches):
        yield str(level), self._source.held_out(step, size=size, level=level)


@dataclasses.dataclass(frozen=True)
class Task:
  """A job for every mixer.

  Attributes:
    name: of the flag and the records.
    title: of the plot.
    level_name: what its levels count.
    model: fields of `models.config.Config`; d_ff is softmax attention's, the
      others get the width that gives as many parameters.
    training: lengths; a step is as many tokens for every mixer.
    learning_rate: in the middle of where the search begins.
    source: of a synthetic task; None is text.
  """

  name: str
  title: str
  level_name: str
  model: dict[str, Any]
  training: configs.Training
  learning_rate: float
  source: synthetic.Recall | synthetic.Group | None = None

  def __post_init__(self):
    if self.source and self.source.seq_len != self.training.seq_len:
      raise ValueError(
        f"training.seq_len: got {self.training.seq_len}; allowed: that of "
        f"the rows, {self.source.seq_len}"
      )

  @property
  def levels(self) -> tuple[int, ...]:
    """How hard held-out rows are; of text, nobody knows."""
    return self.source.levels if self.source else ()

  def load(self, cache_dir: pathlib.Path) -> Text | Synthetic:
    """The data; of text, the tokenizer is kept in `cache_dir`."""
    if self.source:
      return Synthetic(self.source, self.training)
    corpus = data.load_corpus(
      "python", tokenizer="bpe:1024", cache_dir=cache_dir
    )
    return Text(corpus, self.training)


def _training(**kwargs) -> configs.Training:
  steps = kwargs["steps"]
  return configs.Training(
    **{"warmup_steps": steps // 10, "eval_every": max(1, steps // 10)} | kwargs,
    checkpoint_every=0,
    log_every=0,
  )


# Of the synthetic tasks. From tied embeddings of this size recall sets in
# within the steps of a run, from untied ones of the usual 0.02 it does not.
_SMALL = dict(
  d_model=64,
  num_layers=2,
  num_heads=2,
  d_ff=128,
  linear_key_dim=16,
  tie_embeddings=True,
  init_std=0.1,
)

TASKS = {
  t.name: t
  for t in (
    Task(
      name="text",
      title="Python source text",
      level_name="",
      model=dict(d_model=96, num_layers=4, num_heads=3, d_ff=192),
      training=_training(
        steps=160,
        batch_size=8,
        seq_len=256,
        eval_every=40,
        eval_batches=10,
      ),
      learning_rate=6e-3,
    ),
    Task(
      name="mqar",
      title="Multi-query associative recall",
      level_name="key-value pairs",
      model=_SMALL,
      training=_training(steps=600, batch_size=32, seq_len=64, eval_batches=8),
      learning_rate=4e-3,
      source=synthetic.Recall(
        seq_len=64, levels=(4, 8, 16), keys=32, values=32
      ),
    ),
    Task(
      name="overwrite",
      title="Recall of keys bound three times",
      level_name="keys",
      model=_SMALL,
      training=_training(steps=600, batch_size=32, seq_len=64, eval_batches=8),
      learning_rate=4e-3,
      source=synthetic.Recall(
        seq_len=64, levels=(2, 4, 8), keys=32, values=32, rewrites=3
      ),
    ),
    Task(
      name="parity",
      title="Running parity",
      level_name="length of the word",
      model=_SMALL,
      training=_training(steps=600, batch_size=32, seq_len=64, eval_batches=8),
      learning_rate=4e-3,
      source=synthetic.Group(seq_len=64, levels=(8, 16, 32, 64)),
    ),
  )
}


def get(name: str, steps: int = 0) -> Task:
  """The named task.

  Args:
    name: of `TASKS`.
    steps: instead of its own number; 0 is its own.

  Raises:
    UserError: no such task.
  """
  if name not in TASKS:
    raise errors.UserError(
      f"--task: no task {name!r}; {config_lib.nearest(name, TASKS)}"
    )
  task = TASKS[name]
  if steps:
    old = task.training
    training = _training(
      steps=steps,
      batch_size=old.batch_size,
      seq_len=old.seq_len,
      eval_batches=old.eval_batches,
    )
    task = dataclasses.replace(task, training=training)
  return task
