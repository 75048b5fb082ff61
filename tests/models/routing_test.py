"""Routers of layers, and attention by route."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models import attention, block, routing

EPS = 2.0**-24
B, T, H, G, K, WINDOW, SINK = 3, 21, 4, 2, 4, 5, 2


def make():
  rng = np.random.default_rng(0)
  normal = lambda heads: jnp.asarray(
    rng.standard_normal((B, T, heads, K)), jnp.float32
  )
  return block.Heads(normal(H), normal(G), normal(G))


def by_definition(heads):
  """Streaming and dense attention by their masks."""
  row, column = np.indices((T, T))
  causal = column <= row
  near = causal & ((row - column < WINDOW) | (column < SINK))
  return [
    np.asarray(attention.attention(*heads, mask=jnp.asarray(mask[None])))
    for mask in (near, causal)
  ]


def test_every_example_takes_its_route():
  heads = make()
  streaming, full = by_definition(heads)
  run = jax.jit(
    functools.partial(routing.routed_attention, window=WINDOW, sink=SINK),
  )
  for route in ([0, 1, 0], [1, 1, 0]):
    got = run(heads, jnp.array(route))
    want = np.where(np.array(route)[:, None, None, None], streaming, full)
    # Softmax over at most T keys, in two orders.
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * EPS)


def test_training_mixes_hard_and_learns_soft():
  heads = make()
  streaming, full = by_definition(heads)
  g = np.random.default_rng(1).standard_normal(full.shape).astype(np.float32)
  logits = jnp.array([-0.3, 0.2, 1.5])

  def f(logits):
    share = routing.straight_through(logits)
    out = routing.mixed_attention(heads, share, window=WINDOW, sink=SINK)
    return jnp.sum(out * g), out

  run = jax.jit(jax.grad(f, has_aux=True))
  grad, out = run(logits)
  want = np.stack([full[0], streaming[1], streaming[2]])
  np.testing.assert_allclose(out, want, rtol=0, atol=64 * EPS)
  s = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  slope = np.sum((streaming - full) * g, axis=(1, 2, 3), dtype=np.float64)
  np.testing.assert_allclose(grad, slope * s * (1 - s), rtol=1e-4, atol=1e-5)


def test_pooling_and_logits():
  rng = np.random.default_rng(2)
  x = rng.standard_normal((2, 9, 3))
  got = routing.pool(
    jnp.asarray(x, jnp.float32), lengths=jnp.array([9, 3]), ends=4
  )
  want = np.stack(
    [
      np.concatenate([x[0, :4].mean(0), x[0, 5:].mean(0)]),
      # Both ends of three tokens are all of them; what pads is not read.
      np.concatenate([x[1, :3].mean(0)] * 2),
    ]
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  down, up = rng.standard_normal((6, 5)), rng.standard_normal(5)
  router = routing.Router(
    *(jnp.asarray(a, jnp.float32) for a in (down, up, -0.1))
  )
  hidden = want @ down
  logits = (hidden / (1 + np.exp(-hidden))) @ up - 0.1
  got = routing.logits(router, got)
  np.testing.assert_allclose(got, logits, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(routing.choose(got), logits > 0)
