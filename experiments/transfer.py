"""Beginning a run with the parameters of another."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from experiments import errors, stored, trainer
from jaxlib_ext import paths
from models import stack

_FIELD = "training.init_from"


def initial_state(
  workdir: pathlib.Path, own: trainer.Trainer, corpus_hash: str
) -> trainer.TrainState:
  """A new run's first state, its parameters another run's last.

  Args:
    workdir: of the other run.
    own: the new run's trainer.
    corpus_hash: of the new run's data.

  Raises:
    UserError: no such run; other data or another tokenizer; quantized
      parameters; a model whose parameters have other names or shapes.
  """
  run = stored.read(workdir, _FIELD)
  if run.corpus_hash != corpus_hash:
    raise errors.UserError(
      f"{_FIELD}: {workdir} was trained on other data or tokens: hash "
      f"{run.corpus_hash}, here {corpus_hash}"
    )
  try:
    other = trainer.Trainer(run.config, run.model, own.mesh)
  except ValueError as e:
    raise errors.UserError(f"{_FIELD}: {workdir}: {e}") from e
  if own.quantized or other.quantized:
    raise errors.UserError(
      f"{_FIELD}: got a run with optimizer.name="
      f"{run.config.optimizer.name} for one with "
      f"{own.config.optimizer.name}; allowed: optimizers of "
      "parameters that are not quantized"
    )
  _, state = stored.state(workdir, other.target, _FIELD)
  return own.begin(_fit(state.params, run.model, own, workdir))


def _fit(params: Any, cfg, own: trainer.Trainer, workdir) -> Any:
  """The parameters in the structure of the new run's model."""
  try:
    layers = stack.regroup(params["layers"], cfg, own.cfg)
  except ValueError as e:
    raise errors.UserError(f"{_FIELD}: {workdir}: {e}") from e
  params = {**params, "layers": layers}
  names = lambda tree: {
    paths.leaf_name(path): (x.shape, x.dtype)
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
  got, want = names(params), names(own.target.params)
  wrong = sorted(set(got.items()) ^ set(want.items()))
  if wrong:
    name = wrong[0][0]
    raise errors.UserError(
      f"{_FIELD}: {workdir} has another model: its {name!r} is "
      f"{got.get(name)}, here {want.get(name)}"
    )
  return params
