"""Routing layers to dense or streaming attention (Flux, arXiv:2604.07394).

A router of each layer looks at the prompt once, pooled, and says for every
example whether the layer may attend to a window and the first tokens only. The
model stays frozen; routers are trained on both outputs, mixed.

Dimensions: B batch, T length, D width, R the router's hidden width, H query
heads, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

import kernels_pallas as ops
from models import block, layers


class Router(NamedTuple):
  """The parameters of one layer's router.

  Attributes:
    down: `[2 * D, R]`.
    up: `[R]`.
    bias: scalar; large and negative is dense for every prompt.
  """

  down: jax.Array
  up: jax.Array
  bias: jax.Array


def pool(
  states: jax.Array, *, lengths: jax.Array | None = None, ends: int = 64
) -> jax.Array:
  """A prompt's features: the means of its first and its last tokens.

  What is asked for stands at the ends, however long what lies between.

  Args:
    states: `[B, T, D]`.
    lengths: int `[B]`, tokens of each prompt, at least 1; None is T.
    ends: tokens of each end; of a shorter prompt, all.

  Returns:
    float32 `[B, 2 * D]`.
  """
  batch, length, _ = states.shape
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  token, stop = jnp.arange(length), lengths[:, None]
  first = token < jnp.minimum(ends, stop)
  last = (token >= stop - ends) & (token < stop)
  means = [
    jnp.einsum("bt,btd->bd", mask.astype(jnp.float32), states)
    / jnp.sum(mask, axis=1, keepdims=True)
    for mask in (first, last)
  ]
  return jnp.concatenate(means, axis=1)


def logits(router: Router, features: jax.Array) -> jax.Array:
  """float32 `[B]`; above 0 is streaming. `features` are of `pool`."""
  hidden = layers.dot(features, router.down.astype(jnp.float32), 1, 0)
  hidden = jax.nn.silu(hidden)
  return layers.dot(hidden, router.up.astype(jnp.float32), 1, 0) + router.bias


def choose(logits: jax.Array) -> jax.Array:
  """The route of every example: int32 `[B]`, 0 dense, 1 streaming."""
  return (logits > 0).astype(jnp.int32)


def straight_through(logits: jax.Array) -> jax.Array:
  """The route as a float `[B]`, whose gradient is the sigmoid's."""
  soft = jax.nn.sigmoid(logits)
  return soft + jax.lax.stop_gradient(choose(logits).astype(soft.dtype) - soft)


def routed_attention(
  heads: block.Heads, route: jax.Array, *, window: int, sink: int
) -> jax.Array:
  """Causal attention of every example by its route; only that is computed.

  Args:
    heads: rotated, `[B, T, ., K]`.
    route: int32 `[B]`, of `choose`.
    window: tokens, itself included, that a query of a streaming example sees.
    sink: first tokens that it sees besides.

  Returns:
    `[B, T, H, K]`.
  """

  def one(xs):
    route, *example = xs
    example = [x[None] for x in example]
    streaming, full = _both(example, window, sink)
    return jax.lax.cond(route == 1, streaming, full)[0]

  return jax.lax.map(one, (route, *heads))


def mixed_attention(
  heads: block.Heads, share: jax.Array, *, window: int, sink: int
) -> jax.Array:
  """Both outputs of every example, mixed: what routers are trained on.

  Args:
    heads: as for `routed_attention`.
    share: float `[B]`, of streaming: `straight_through` or a sigmoid.
    window: as for `routed_attention`.
    sink: as for `routed_attention`.

  Returns:
    `[B, T, H, K]`.
  """
  streaming, full = (f() for f in _both(heads, window, sink))
  share = share.astype(full.dtype)[:, None, None, None]
  return full + share * (streaming - full)


def _both(heads, window, sink):
  """Functions of nothing: streaming and dense attention."""
  return (
    lambda: ops.windowed_attention(*heads, window=window, sink=sink),
    lambda: ops.full_attention(*heads, causal=True),
  )
