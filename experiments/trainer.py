"""The training step: state, shardings, one compiled function.

A `Trainer` is pure bookkeeping around three jitted functions (initialise,
step, evaluate). It neither reads files nor prints.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import optim
from experiments import (
  config_checks,
  configs,
  device_memory,
  errors,
  optimizers,
)
from jaxlib_ext import quantization, sharding, specs
from models import flops, transformer


class TrainState(NamedTuple):
  """All that a step changes, and all that a checkpoint holds.

  Attributes:
    step: int32 scalar, completed steps; the data order follows from it.
    params: the parameters; matrices are `QTensor`s under `eco`.
    opt_state: the optimizer's.
  """

  step: jax.Array
  params: Any
  opt_state: Any


def check_sizes(
  config: configs.Config, cfg: transformer.Config, mesh: jax.sharding.Mesh
) -> None:
  """Refuses a model or a batch that no device has the memory for.

  From shapes alone, in milliseconds; the optimizer's state is not counted
  (`Trainer.check_memory` does).

  Args:
    config: of the run.
    cfg: its model, with any vocabulary that it has at least.
    mesh: the devices.

  Raises:
    UserError: naming what is needed and what there is.
  """
  config_checks.unrolled(cfg)
  config_checks.block_size(cfg, config.training.seq_len)
  name, training = config.optimizer.name, config.training
  bits = 64
  if optimizers.quantized(name):
    bits = quantization.Format.parse(config.quantization.format).bits
  rows = training.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
  wide = jnp.dtype(cfg.compute_dtype).itemsize
  # The input of each layer is kept for the backward pass, and a slice of the
  # logits has a position of each row at least.
  kept = 1 if optimizers.needs_loss(name) else cfg.num_layers
  tokens = rows * (training.seq_len + 1)
  device_memory.check_model(
    transformer.param_specs(cfg),
    mesh,
    activations=tokens * (4 + kept * cfg.d_model * wide)
    + 4 * rows * cfg.vocab_size // mesh.shape["tensor"],
    most_bits=bits,
  )


class Trainer:
  """One model, one optimizer and one mesh.

  Args:
    config: with the optimizer's defaults filled in.
    cfg: the model.
    mesh: with axes "data", "fsdp" and "tensor".

  Raises:
    UserError: a batch or a parameter that the mesh does not divide.
  """

  def __init__(
    self,
    config: configs.Config,
    cfg: transformer.Config,
    mesh: jax.sharding.Mesh,
  ):
    training = config.training
    self.config, self.cfg, self.mesh = config, cfg, mesh
    self.quantized = optimizers.quantized(config.optimizer.name)
    self._by_value = optimizers.needs_loss(config.optimizer.name)
    self.tx = optimizers.build(
      config.optimizer, training.steps, training.warmup_steps, training.seed
    )
    rules = sharding.Rules()
    batch_spec = rules.spec(("batch", None), mesh)
    self.batch_sharding = NamedSharding(mesh, batch_spec)
    self._loss = functools.partial(
      transformer.loss,
      cfg=cfg,
      residual_sharding=NamedSharding(
        mesh, rules.spec(("batch", "length", None), mesh)
      ),
    )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if training.batch_size % parts:
      raise errors.UserError(
        f"training.batch_size: {training.batch_size} sequences do not divide "
        f"over mesh.data * mesh.fsdp = {parts}"
      )
    tree = transformer.param_specs(cfg)
    try:
      self._weights = sharding.shardings(tree, mesh, rules)
    except ValueError as e:
      raise errors.UserError(f"mesh: {e}") from e
    self.num_params = specs.count(tree)
    self.shardings = self._try_optimizer()

  def _init(self) -> TrainState:
    key = jax.random.key(self.config.training.seed)
    params = transformer.init(key, self.cfg)
    if self.quantized:
      params = quantization.quantize_tree(
        params, self.config.quantization.format
      )
    return self._begin(params)

  def _begin(self, params: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params))

  def _state_shardings(self) -> TrainState:
    params = jax.eval_shape(self._init).params
    return TrainState(
      NamedSharding(self.mesh, PartitionSpec()),
      sharding.expand(params, self._weights),
      sharding.state_shardings(self.tx, params, self._weights),
    )

  def _try_optimizer(self) -> TrainState:
    """Has the optimizer refuse its arguments before anything is computed.

    Returns:
      The shardings of the state.
    """
    update = self.tx.update
    if self._by_value:
      value = lambda params: jnp.zeros((), jnp.float32)
      update = functools.partial(update, value_fn=value)
    with optimizers.refusals(self.config.optimizer.name):
      shardings = self._state_shardings()
      state = jax.eval_shape(self._init)
      grads = jax.eval_shape(quantization.dequantize_tree, state.params)
      jax.eval_shape(update, grads, state.opt_state, state.params)
    return shardings

  @functools.cached_property
  def target(self) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with their shardings."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(self._init),
      self.shardings,
    )

  def init(self) -> TrainState:
    """The state before the first step; on any mesh the same to rounding."""
    return jax.jit(self._init, out_shardings=self.shardings)()

  def begin(self, params: Any) -> TrainState:
    """The state before the first step, with given parameters."""
    return jax.jit(self._begin, out_shardings=self.shardings)(params)

  def _step(self, state: TrainState, tokens: jax.Array):
    loss = lambda weights: self._loss(weights, tokens[:, :-1], tokens[:, 1:])
    if self._by_value:
      updates, opt_state, metrics = self._from_values(loss, state)
    else:
      updates, opt_state, metrics = self._from_gradients(loss, state)
    params = optim.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics

  def _from_gradients(self, loss, state):
    weights = quantization.dequantize_tree(state.params, jnp.float32)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(weights)
    updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
    metrics = {"loss": metrics["nll"], "grad_norm": optax.tree.norm(grads)}
    return updates, opt_state, metrics

  def _from_values(self, loss, state):
    """Of an optimizer without gradients: forward passes, one for the record."""
    at = lambda params: loss(quantization.dequantize_tree(params, jnp.float32))
    updates, opt_state = self.tx.update(
      state.params,
      state.opt_state,
      state.params,
      value_fn=lambda params: at(params)[0],
    )
    return updates, opt_state, {"loss": at(state.params)[1]["nll"]}

  @functools.cached_property
  def step(self) -> jax.stages.Wrapped:
    """`(state, tokens [B, T + 1]) -> (state, metrics)`, state donated."""
    return jax.jit(
      self._step,
      donate_argnums=0,
      out_shardings=(self.shardings, NamedSharding(self.mesh, PartitionSpec())),
    )

  @functools.cached_property
  def compiled(self) -> jax.stages.Compiled:
    """`step` compiled ahead of time, which `step` then uses."""
    training = self.config.training
    tokens = jax.ShapeDtypeStruct(
      (training.batch_size, training.seq_len + 1),
      jnp.int32,
      sharding=self.batch_sharding,
    )
    return self.step.lower(self.target, tokens).compile()

  @functools.cached_property
  def _evaluate(self):
    def evaluate(params, tokens, weights):
      _, metrics = self._loss(
        params, tokens[:, :-1], tokens[:, 1:], weights=weights
      )
      return metrics["nll"] * jnp.sum(weights)

    return jax.jit(
      evaluate, out_shardings=NamedSharding(self.mesh, PartitionSpec())
    )

  def evaluate(self, params: Any, batches: Any) -> float:
    """Mean nats per held-out token over `(tokens, weights)` batches."""
    total, count = 0.0, 0.0
    for tokens, weights in batches:
      nll = self._evaluate(
        params, self.place(tokens[self.rows]), self.place(weights[self.rows])
      )
      total, count = total + float(nll), count + float(weights.sum())
    return total / count

  def flushed(self, state: TrainState) -> Any:
    """Under `eco`, the parameters after `optim.eco_flush`."""
    flush = jax.jit(optim.eco_flush, out_shardings=self.shardings.params)
    return flush(state.params, state.opt_state)

  @functools.cached_property
  def rows(self) -> slice:
    """The rows of a batch that this process's devices hold."""
    size = self.config.training.batch_size
    held = self.batch_sharding.addressable_devices_indices_map((size, 1))
    spans = [index[0].indices(size) for index in held.values()]
    return slice(min(s[0] for s in spans), max(s[1] for s in spans))

  def place(self, batch: np.ndarray) -> jax.Array:
    """This process's rows of a batch → one array over the whole mesh."""
    size, first = self.config.training.batch_size, self.rows.start

    def part(index):
      start, stop, _ = index[0].indices(size)
      return batch[start - first : stop - first]

    return jax.make_array_from_callback(
      (size, *batch.shape[1:]), self.batch_sharding, part
    )

  def state_bytes(self) -> dict[str, float]:
    """Bytes of parameters and optimizer state on each device."""
    return optim.state_bytes(self.tx, self.target.params)

  def check_memory(self) -> None:
    """Refuses a state that no device has the memory for.

    Raises:
      UserError: naming what is needed and what there is.
    """
    size = self.state_bytes()
    device_memory.check(
      {"parameters": size["params"], "optimizer state": size["state"]},
      self.mesh,
    )

  def planned_bytes(self) -> int:
    """What the compiled step will hold on each device."""
    return device_memory.planned(self.compiled)

  def peak_bytes(self) -> int:
    """The most bytes held on one device so far; on CPUs, the plan."""
    return device_memory.peak(self.compiled, self.mesh.local_devices[0])

  def flops_per_token(self) -> float:
    """Matmul FLOPs of one training token, thrice those of a forward pass.

    Two per weight and those of mixing (`models.flops`); recomputation does not
    count.
    """
    cfg = self.cfg
    embedding = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model
    mixing = flops.mixing(cfg, self.config.training.seq_len)
    return 6.0 * (self.num_params - embedding) + 3.0 * mixing
