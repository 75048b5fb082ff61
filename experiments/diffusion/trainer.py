"""The training step of a diffusion transformer, on one device.

A `Trainer` is bookkeeping around jitted functions (initialise, step,
evaluate, sample). It neither reads files nor prints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optim
from experiments import config_checks, device_memory, optimizers
from experiments.diffusion import configs
from experiments.diffusion import data as data_lib
from jaxlib_ext import sharding, specs
from models import dit, flops

# ITU-R BT.601, as JPEG.
_LUMA = (0.299, 0.587, 0.114)


class TrainState(NamedTuple):
  """All that a step changes, and all that a checkpoint holds.

  Attributes:
    step: int32 scalar, completed steps; all randomness follows from it.
    params: the parameters.
    ema: their running mean.
    opt_state: the optimizer's.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any


def to_model(x: jax.Array) -> jax.Array:
  """uint8 to the range of the model, float32 in [-1, 1]."""
  return jnp.asarray(x, jnp.float32) / 127.5 - 1


def to_pixels(x: jax.Array) -> np.ndarray:
  """The inverse of `to_model`, rounded and clipped."""
  pixels = np.rint((np.asarray(x, np.float32) + 1) * 127.5)
  return np.clip(pixels, 0, 255).astype(np.uint8)


def grey(x: jax.Array) -> jax.Array:
  """Colours `[..., 3]` to their luma, in all three channels."""
  return jnp.broadcast_to((x @ jnp.asarray(_LUMA))[..., None], x.shape)


def check_sizes(config: configs.Config, cfg: dit.Config) -> None:
  """Refuses a model, an image or a batch that there is no memory for.

  From shapes alone; the optimizer's state is not counted
  (`Trainer.check_memory` does).

  Args:
    config: of the run.
    cfg: its model, for any number of classes.

  Raises:
    UserError: naming what is needed and what there is.
  """
  config_checks.unrolled(cfg)
  rows = max(config.training.batch_size, config.samples.count)
  wide = jnp.dtype(cfg.compute_dtype).itemsize
  tokens = cfg.num_tokens * (1 + cfg.context)
  device_memory.check_model(
    dit.param_specs(cfg),
    _mesh(),
    # An example in float32 and the input of each layer, once at least.
    activations=4 * rows * math.prod(cfg.input_shape)
    + config.training.batch_size * tokens * cfg.num_layers * cfg.d_model * wide,
    copies=2,
  )


def _mesh() -> jax.sharding.Mesh:
  return sharding.make_mesh({"data": 1})


class Trainer:
  """One model and one optimizer.

  Args:
    config: with the optimizer's defaults filled in.
    cfg: the model.
  """

  def __init__(self, config: configs.Config, cfg: dit.Config):
    training = config.training
    self.config, self.cfg = config, cfg
    self.mesh = _mesh()
    self._where = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
    self.tx = optimizers.build(
      config.optimizer, training.steps, training.warmup_steps, training.seed
    )
    self.num_params = specs.count(dit.param_specs(cfg))

  def _init(self) -> TrainState:
    key = jax.random.key(self.config.training.seed)
    params = dit.init(key, self.cfg)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, params, self.tx.init(params))

  @functools.cached_property
  def target(self) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with their sharding."""
    with optimizers.refusals(self.config.optimizer.name):
      state = jax.eval_shape(self._init)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._where),
      state,
    )

  def check_memory(self) -> None:
    """Refuses a state that there is no memory for.

    Raises:
      UserError: naming what is needed and what there is.
    """
    size = optim.state_bytes(self.tx, self.target.params)
    device_memory.check(
      {
        "parameters and their mean": 2 * size["params"],
        "optimizer state": size["state"],
      },
      self.mesh,
    )

  def init(self) -> TrainState:
    """The state before the first step."""
    # As a state that is restored, so that `step` is compiled once for both.
    return jax.jit(self._init, out_shardings=self._where)()

  def _arguments(self, x, labels) -> dict[str, Any]:
    """What the model is told of examples [B, *input_shape] besides."""
    return dict(
      labels=labels if self.cfg.num_classes else None,
      context=grey(x) if self.cfg.context else None,
    )

  def _step(self, state: TrainState, batch: data_lib.Batch):
    training = self.config.training
    key = jax.random.fold_in(jax.random.key(training.seed), state.step)
    key_flip, key_loss = jax.random.split(key)
    x = to_model(batch.x)
    if self.config.data.flip:
      flip = jax.random.bernoulli(key_flip, 0.5, x.shape[:1])
      flip = flip.reshape(-1, *[1] * (x.ndim - 1))
      x = jnp.where(flip, jnp.flip(x, axis=-2), x)

    def loss(params):
      return dit.loss(
        params,
        key_loss,
        x,
        **self._arguments(x, batch.labels),
        cfg=self.cfg,
        times=training.times,
        label_dropout=training.label_dropout,
      )

    value, grads = jax.value_and_grad(loss)(state.params)
    updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
    params = optim.apply_updates(state.params, updates)
    done = state.step.astype(jnp.float32)
    decay = jnp.minimum(training.ema, (1 + done) / (10 + done))
    ema = jax.tree.map(
      lambda a, b: decay * a + (1 - decay) * b, state.ema, params
    )
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state), metrics

  @functools.cached_property
  def step(self) -> jax.stages.Wrapped:
    """`(state, Batch) -> (state, metrics)`, state donated."""
    return jax.jit(self._step, donate_argnums=0)

  @functools.cached_property
  def compiled(self) -> jax.stages.Compiled:
    """`step` compiled ahead of time, which `step` then uses."""
    size = self.config.training.batch_size
    batch = data_lib.Batch(
      jax.ShapeDtypeStruct((size, *self.cfg.input_shape), jnp.uint8),
      jax.ShapeDtypeStruct((size,), jnp.int32),
    )
    return self.step.lower(self.target, batch).compile()

  @functools.cached_property
  def _evaluate(self):
    def evaluate(params, key, batch, shift):
      x = to_model(batch.x)
      own = self._arguments(x, batch.labels)
      if own["context"] is not None:
        own["context"] = jnp.roll(own["context"], shift, axis=0)
      return dit.loss(params, key, x, **own, cfg=self.cfg, times="uniform")

    return jax.jit(evaluate)

  def evaluate(
    self, params: Any, batches: Iterable[data_lib.Batch], shift: int = 0
  ) -> float:
    """Mean loss over uniform times, with the same noise at every call.

    Args:
      params: to evaluate.
      batches: of the data.
      shift: gives each example the context of the one so many before it in
        its batch; that 1 is worse than 0 shows that the context is used.
    """
    key = jax.random.key(self.config.training.seed + 1)
    losses = [
      self._evaluate(params, jax.random.fold_in(key, i), batch, shift)
      for i, batch in enumerate(batches)
    ]
    return float(jnp.mean(jnp.stack(losses)))

  @functools.cached_property
  def _sample(self):
    settings = self.config.samples

    def sample(params, key, batch):
      x = to_model(batch.x)
      return dit.sample(
        params,
        jax.random.normal(key, x.shape),
        **self._arguments(x, batch.labels),
        cfg=self.cfg,
        steps=settings.steps,
        guidance=settings.guidance,
      )

    return jax.jit(sample)

  def sample(self, params: Any, batch: data_lib.Batch) -> np.ndarray:
    """Samples of the labels and contexts of a batch, uint8, in its shape."""
    key = jax.random.key(self.config.training.seed + 2)
    return to_pixels(self._sample(params, key, batch))

  def planned_bytes(self) -> int:
    """What the compiled step will hold."""
    return device_memory.planned(self.compiled)

  def peak_bytes(self) -> int:
    """The most bytes held so far; on a CPU, the plan."""
    return device_memory.peak(self.compiled, self.mesh.local_devices[0])

  def flops_per_token(self) -> float:
    """Matmul FLOPs of a token's training: 6 per weight, 12 D per layer and key.

    The keys are those that its attention meets (`models.flops`); what one
    vector per example goes through (time, class, modulations) does not count.
    """
    cfg = self.cfg
    weights = cfg.num_layers * cfg.d_model * (4 * cfg.d_model + 2 * cfg.d_ff)
    length, block = self.config.training.seq_len, math.prod(cfg.tile)
    dense = cfg.num_layers if cfg.attention == "full" else cfg.dense_layers
    keys = length
    if cfg.attention == "piecewise":
      keys = flops.pooled_keys(length, cfg.density, block)
    elif cfg.attention == "in_context":
      target = cfg.num_tokens
      keys = flops.in_context_keys(
        target, length - target, cfg.keep, cfg.sharp, cfg.density, block
      )
    met = dense * length + (cfg.num_layers - dense) * keys
    return 6.0 * weights + 12.0 * cfg.d_model * met
