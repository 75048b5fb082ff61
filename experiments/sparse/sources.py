"""Real queries, keys and values: what the attention of a trained run got."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, errors, loop, stored
from experiments.diffusion import run as dit_run
from experiments.diffusion import trainer as dit_trainer
from jaxlib_ext import config as config_lib
from kernels_pallas.sparse import tiling
from models import config as model_config
from models import dit, dit_flow, transformer

# The share of the noise in the first and in the last example of a DiT.
_TIMES = (0.1, 0.9)


@dataclasses.dataclass(frozen=True)
class Source:
  """The attention inputs of every layer of a model, on several examples.

  Attributes:
    name: "text", or the name of a DiT's config.
    q: float32 `[L, B, T, H, K]`, rotated.
    k: likewise, a head for each of q's.
    v: likewise.
    causal: whether a query sees no later key.
    block: tokens of a block; divides T.
    grid: tokens along each axis of one image or video; (T,) of text.
    tile: of the grid, in whose order the tokens are; () is raster order.
    parts: 2 where an image's context follows it, else 1.
    model: fields of the model's config.
    facts: what tells the parameters and the examples from others.
  """

  name: str
  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  causal: bool
  block: int
  grid: tuple[int, ...]
  tile: tuple[int, ...]
  parts: int
  model: dict[str, Any]
  facts: dict[str, Any]

  @property
  def layout(self) -> str:
    """The order of the tokens: "sequence", "tiled" or "raster"."""
    if self.causal:
      return "sequence"
    return "tiled" if self.tile else "raster"

  @property
  def context(self) -> int:
    """Tokens of the context; 0 is none."""
    return math.prod(self.grid) if self.parts == 2 else 0

  def places(self) -> np.ndarray:
    """Where each token lies in its grid: int `[T, axes]`."""
    places = np.indices(self.grid).reshape(len(self.grid), -1)
    if self.tile:
      places = tiling.tile(places, self.grid, self.tile)
    return np.tile(places, self.parts).T

  def raster(self) -> Source:
    """The same in raster order, in blocks of the same size."""
    q, k, v = (self._untiled(x) for x in (self.q, self.k, self.v))
    return dataclasses.replace(self, q=q, k=k, v=v, tile=())

  def _untiled(self, x):
    parts = np.split(x, self.parts, axis=2)
    parts = [tiling.untile(p, self.grid, self.tile, axis=2) for p in parts]
    return np.concatenate(parts, axis=2)


@dataclasses.dataclass(frozen=True)
class Text:
  """A trained language model and held-out windows.

  Attributes:
    cfg: the model.
    params: its parameters.
    tokens: int `[B, T]`, T whole blocks.
    targets: int `[B, T]`, the token that follows each.
    facts: as of a `Source`.
  """

  cfg: model_config.Config
  params: Any
  tokens: np.ndarray
  targets: np.ndarray
  facts: dict[str, Any]


def language_model(workdir: pathlib.Path, examples: int, block: int) -> Text:
  """A model that `experiments.pretrain` has trained.

  Args:
    workdir: of the run.
    examples: held-out windows of the length it was trained with.
    block: tokens of a block; what follows the last whole one is cut off.

  Raises:
    UserError: no such run, no readable checkpoint, other data, a model
      without full attention or with sparse layers, or windows shorter than
      two blocks.
  """
  config = stored.read(workdir, "--lm").config
  run = loop.Run(config, workdir, read_only=True)
  cfg = run.trainer.cfg
  # What a window never sees, or a pooled tail has, its keys are not made for.
  if {"full"} != set(cfg.pattern) & set(model_config.SOFTMAX):
    raise errors.UserError(
      f"--lm: {workdir} has the mixers {cfg.pattern}; allowed: full, and "
      f"beside it {', '.join(model_config.LINEAR)}"
    )
  length = config.training.seq_len // block * block
  if length < 2 * block:
    raise errors.UserError(
      f"--block: got {block}; allowed: at most half of the "
      f"{config.training.seq_len} tokens that {workdir} was trained with"
    )
  step, state = stored.state(workdir, run.trainer.target, "--lm")
  windows, _ = next(
    data.eval_batches(
      run.corpus.eval,
      batch_size=examples,
      seq_len=config.training.seq_len,
      max_batches=1,
    )
  )
  facts = {
    "step": step,
    "parameters": _digest(state.params),
    "data": run.corpus.hash,
    "examples": examples,
  }
  tokens, targets = windows[:, :length], windows[:, 1 : length + 1]
  return Text(cfg, state.params, tokens, targets, facts)


def text(workdir: pathlib.Path, examples: int, block: int) -> Source:
  """Of a `language_model`, with the same arguments and errors."""
  run = language_model(workdir, examples, block)
  apply = functools.partial(transformer.apply, cfg=run.cfg, return_qkv=True)
  out = jax.jit(apply)(run.params, jnp.asarray(run.tokens))
  q, k, v = (np.asarray(x, np.float32) for x in out.qkv)
  repeat = q.shape[3] // k.shape[3]
  return Source(
    name="text",
    q=q,
    k=np.repeat(k, repeat, axis=3),
    v=np.repeat(v, repeat, axis=3),
    causal=True,
    block=block,
    grid=(run.tokens.shape[1],),
    tile=(),
    parts=1,
    model=config_lib.to_dict(run.cfg),
    facts=run.facts,
  )


def _digest(params) -> str:
  """12 hex digits of all parameters."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Images:
  """A trained DiT and held-out examples.

  Attributes:
    trained: the run.
    x: float32 `[B, *input_shape]` in [-1, 1].
    noise: standard normal, like x.
    labels: int `[B]` or None.
    context: like x, or None.
  """

  trained: dit_run.Trained
  x: jax.Array
  noise: jax.Array
  labels: jax.Array | None
  context: jax.Array | None


def images(workdir: pathlib.Path, examples: int) -> Images:
  """A run of `experiments.train_dit`, and held-out examples with noise.

  Raises:
    UserError: as `diffusion.run.load`; a model whose tokens are not tiled.
  """
  trained = dit_run.load(workdir)
  if not trained.cfg.tile:
    raise errors.UserError(
      f"--dit: {workdir} has tokens in raster order; allowed: a model.tile"
    )
  batch = next(trained.corpus.eval_batches(examples, 1))
  x = dit_trainer.to_model(batch.x)
  return Images(
    trained,
    x,
    jax.random.normal(jax.random.key(0), x.shape),
    jnp.asarray(batch.labels) if trained.cfg.num_classes else None,
    dit_trainer.grey(x) if trained.cfg.context else None,
  )


def heads(examples: Images) -> Source:
  """Of a DiT, each example with another share of noise."""
  trained = examples.trained
  cfg = dataclasses.replace(trained.cfg, attention="full")
  t = jnp.linspace(*_TIMES, len(examples.x))
  noisy, _ = dit_flow.interpolate(examples.x, examples.noise, t)
  apply = jax.jit(functools.partial(dit.apply, cfg=cfg, return_qkv=True))
  _, qkv = apply(
    trained.params, noisy, t, examples.labels, context=examples.context
  )
  return Source(
    trained.config.name,
    *(np.asarray(x, np.float32) for x in qkv),
    causal=False,
    block=math.prod(cfg.tile),
    grid=cfg.grid,
    tile=cfg.tile,
    parts=1 if examples.context is None else 2,
    model=config_lib.to_dict(cfg),
    facts={
      "step": trained.step,
      "parameters": _digest(trained.params),
      "data": trained.corpus.hash,
      "examples": len(t),
      "times": [round(float(x), 3) for x in t],
    },
  )
