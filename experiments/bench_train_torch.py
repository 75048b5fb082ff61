"""The LLaMA of `models.transformer` in eager PyTorch, to compare speed with.

Written as PyTorch users write it: modules, autocast, the fused attention and
the default AdamW. PyTorch is imported when a session is made; it is no
dependency of this library.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REQUIREMENT = "torch==2.13.0"


def _modules(torch: Any) -> tuple[Any, Any]:
  """The norm and the block, classes that need `torch` to be defined."""
  functional = torch.nn.functional

  class Norm(torch.nn.Module):
    def __init__(self, width, eps):
      super().__init__()
      self.weight = torch.nn.Parameter(torch.ones(width))
      self.eps = eps

    def forward(self, x):
      y = x.float()
      y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
      return (y * self.weight).to(x.dtype)

  class Block(torch.nn.Module):
    def __init__(self, cfg):
      super().__init__()
      linear = lambda d_in, d_out: torch.nn.Linear(d_in, d_out, bias=False)
      width, inner = cfg.d_model, cfg.num_heads * cfg.key_size
      self.size = cfg.key_size
      self.attn_norm = Norm(width, cfg.norm_eps)
      self.q, self.k, self.v = (linear(width, inner) for _ in range(3))
      self.o = linear(inner, width)
      self.mlp_norm = Norm(width, cfg.norm_eps)
      self.gate, self.up = (linear(width, cfg.d_ff) for _ in range(2))
      self.down = linear(cfg.d_ff, width)

    def forward(self, x, cos, sin):
      b, t, _ = x.shape
      y = self.attn_norm(x)
      q, k, v = (
        f(y).view(b, t, -1, self.size).transpose(1, 2)
        for f in (self.q, self.k, self.v)
      )
      y = functional.scaled_dot_product_attention(
        _rotate(torch, q, cos, sin), _rotate(torch, k, cos, sin), v,
        is_causal=True,
      )  # fmt: skip
      x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
      y = self.mlp_norm(x)
      return x + self.down(functional.silu(self.gate(y)) * self.up(y))

  return Norm, Block


def _rotate(torch, x, cos, sin):
  first, second = x.float().chunk(2, -1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return torch.cat(rotated, -1).to(x.dtype)


def _model(torch: Any, cfg: Any, length: int) -> Any:
  norm, block = _modules(torch)

  class Model(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = torch.nn.Embedding(cfg.vocab_size, cfg.d_model)
      self.layers = torch.nn.ModuleList(
        block(cfg) for _ in range(cfg.num_layers)
      )
      self.final_norm = norm(cfg.d_model, cfg.norm_eps)
      self.head = torch.nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
      exponent = torch.arange(0, cfg.key_size, 2) / cfg.key_size
      angle = torch.arange(length)[:, None] * cfg.rope_theta**-exponent
      self.register_buffer("cos", angle.cos())
      self.register_buffer("sin", angle.sin())

    def forward(self, tokens, targets):
      low = cfg.compute_dtype == "bfloat16"
      with torch.autocast("cpu", torch.bfloat16, enabled=low):
        x = self.embed(tokens)
        x = x.bfloat16() if low else x
        for layer in self.layers:
          x = layer(x, self.cos, self.sin)
        logits = self.head(self.final_norm(x))
      return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten()
      )

  return Model()


class Session:
  """A model and its AdamW, with the weights that ours begins from.

  Args:
    cfg: a `models.transformer.Config` with as many key as query heads and an
      untied head; parameters are float32, activations of `compute_dtype`.
    weights: leaf name, as `jaxlib_ext.paths.leaf_name` spells it → array.
    tokens: int `[B, T + 1]`, the batch of every step.
    adamw: learning_rate, weight_decay, b1, b2 and eps.
    compiled: whether `torch.compile` compiles the model.
  """

  def __init__(
    self,
    cfg: Any,
    weights: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    adamw: Mapping[str, float],
    compiled: bool,
  ):
    import torch

    self._torch = torch
    model = _model(torch, cfg, tokens.shape[1] - 1)
    self._load(model, weights)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    self._optimizer = torch.optim.AdamW(
      [
        {"params": matrices, "weight_decay": adamw["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
      ],
      lr=adamw["learning_rate"],
      betas=(adamw["b1"], adamw["b2"]),
      eps=adamw["eps"],
    )
    tokens = torch.from_numpy(tokens.astype(np.int64))
    self._batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    self._loss = torch.compile(model) if compiled else model

  def _load(self, model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Copies ours, whose matrices are (in, out) with layers stacked."""
    torch = self._torch
    for name, parameter in model.named_parameters():
      parts = name.removesuffix(".weight").split(".")
      if parts[0] == "layers":
        value = weights[f"layers/{parts[2]}"][int(parts[1])]
      else:
        value = weights[parts[0]]
      if value.ndim == 2 and parts[0] != "embed":
        value = value.T
      with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(value)))

  def step(self) -> float:
    """One optimizer step; its loss, before the update."""
    loss = self._loss(*self._batch)
    loss.backward()
    self._optimizer.step()
    self._optimizer.zero_grad()
    return float(loss.detach())

  def losses(self, steps: int) -> Sequence[float]:
    """The losses of the next `steps` steps."""
    return [self.step() for _ in range(steps)]

  def seconds(self, steps: int) -> float:
    """Seconds of `steps` steps, the losses read at the end only."""
    start = time.perf_counter()
    for _ in range(steps):
      loss = self._loss(*self._batch)
      loss.backward()
      self._optimizer.step()
      self._optimizer.zero_grad()
    float(loss.detach())
    return time.perf_counter() - start

  def describe(self) -> dict[str, Any]:
    """What the record says about this side."""
    torch = self._torch
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}
