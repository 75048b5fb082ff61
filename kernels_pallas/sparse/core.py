"""What the implementations share: layout, pooled tail, differentiation.

An implementation is a pair of functions of one `problem.Exact`:

  forward(exact, tail, options) -> out, lse
    out `[B, H, NQ * block_q, V]` and lse `[B, H, NQ * block_q]`, of one
    softmax over the listed keys and, if a tail is given, the pooled ones;
    at most about `MASKED` is the lse of a row that sees nothing, whose
    output does not matter. In float32, or float64 where q is.
  backward(exact, options, lse, g, delta) -> dq, dk, dv
    the listed keys' part of the gradients, in the same dtype, where
    p = exp(s q k^T - lse), dv = p^T g, ds = p (g v^T - delta).

The statistics of blocks are differentiated by JAX, outside of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import derivatives, meshes, padding
from kernels_pallas.sparse import pooled, problem, statistics

_REMEDY = "use implementation='reference'"

Forward = Callable[..., tuple[jax.Array, jax.Array]]
Backward = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def run(
  forward: Forward,
  backward: Backward,
  inputs: problem.Inputs,
  options: problem.Options,
  kernels: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention by an implementation's two functions.

  Args:
    forward: as the module says.
    backward: as the module says.
    inputs: the problem.
    options: the static choices.
    kernels: the implementation's name, where its functions have no
      derivatives themselves.

  Returns:
    The output `[B, T, H, V]` in v's dtype, 0 in rows that see nothing, and
    the log-partition `[B, T, H]`, `MASKED` there, float32 (float64 where q
    is). Both can be differentiated.
  """
  if kernels is not None:
    forward, backward = _once(forward, backward, kernels)
  exact = pad(inputs, options)
  tail = statistics.tail(exact, options)
  length = inputs.q.shape[1]
  exact, tail = derivatives.reverse_only(
    meshes.vary_alike((exact, tail)), _REMEDY
  )
  out, lse = _attend(forward, backward, options, exact, tail)
  cut = lambda x: jnp.swapaxes(x, 1, 2)[:, :length]
  return cut(out).astype(inputs.v.dtype), cut(lse)


def _once(forward: Forward, backward: Backward, name: str):
  """The two functions, which say that they have no derivatives."""

  def f(exact, tail, options):
    run = lambda *x: forward(*x, options)
    return derivatives.once(run, name)(exact, tail)

  def b(exact, options, *rows):
    run = lambda exact, *rows: backward(exact, options, *rows)
    return derivatives.once(run, name)(exact, *rows)

  return f, b


def contained(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values such that what is not finite stays with who sees it.

  A weight of 0 times NaN is NaN, for which one value would reach queries that
  do not see it. Values become 0 instead, and their keys NaN: masked scores
  are replaced, not multiplied.

  Args:
    k: `[.., K]`.
    v: `[.., V]`.
  """
  finite = lambda x: jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
  both = finite(k) & finite(v)
  return jnp.where(both, k, jnp.nan), jnp.where(both, v, 0)


def pad(inputs: problem.Inputs, options: problem.Options) -> problem.Exact:
  """The problem with heads first, in whole blocks, 0 where no key exists."""
  size = options.block_kv
  num_kv = problem.num_blocks(inputs.k.shape[1], size)
  b, _, g, _ = inputs.k.shape
  spare = num_kv * size - inputs.k.shape[1]
  lengths = inputs.lengths
  if lengths is None:
    lengths = jnp.full((num_kv,), size, jnp.int32).at[-1].add(-spare)
    lengths = jnp.broadcast_to(lengths, (b, g, num_kv))
  exists = None
  if inputs.lengths is not None:
    exists = jnp.arange(size) < lengths[..., None]
    exists = exists.reshape(b, g, num_kv * size, 1)

  def heads_first(x, block, *, keys=False):
    x = padding.to_multiple(jnp.swapaxes(x, 1, 2), 2, block)
    return jnp.where(exists, x, 0) if keys and exists is not None else x

  q_segments = kv_segments = None
  if inputs.segments is not None:
    go_on = functools.partial(padding.to_multiple, mode="edge")
    q_segments = go_on(inputs.segments, 1, options.block_q)
    kv_segments = go_on(inputs.segments, 1, size)
  return problem.Exact(
    q=heads_first(inputs.q, options.block_q),
    k=heads_first(inputs.k, size, keys=True),
    v=heads_first(inputs.v, size, keys=True),
    indices=inputs.indices,
    counts=inputs.counts,
    lengths=lengths.astype(jnp.int32),
    q_segments=q_segments,
    kv_segments=kv_segments,
    bands=inputs.bands,
    sink_tokens=inputs.sink_tokens,
  )


def merge(
  parts: list[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
  """One softmax of several: outputs `[.., V]` by log-partitions `[..]`.

  Rows that see nothing in any part become 0, with `MASKED`.
  """
  top = functools.reduce(jnp.maximum, (lse for _, lse in parts))
  top = jax.lax.stop_gradient(top)
  weights = [jnp.exp(lse - top) for _, lse in parts]
  total = sum(weights)
  out = sum(
    out * (weight / total)[..., None]
    for (out, _), weight in zip(parts, weights, strict=True)
  )
  lse = top + jnp.log(total)
  # NaN is seen.
  seen = ~(lse <= problem.MASKED / 2)
  out = jnp.where(seen[..., None], out, 0)
  return out, jnp.where(seen, lse, problem.MASKED)


def row_statistics(
  out: jax.Array, lse: jax.Array, g: jax.Array, dlse: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What a backward pass needs of each row: p = exp(s - lse), delta.

  Args:
    out: `[.., V]`, the output.
    lse: `[..]`, of all its scores s, `MASKED` where there are none.
    g: `[.., V]`, the cotangent of out.
    dlse: `[..]`, that of lse.

  Returns:
    lse, such that the probabilities of rows that see nothing are 0, and
    delta, of ds = p (dp - delta).
  """
  lse = jnp.where(lse <= problem.MASKED / 2, -problem.MASKED, lse)
  return lse, jnp.sum(g * out.astype(g.dtype), axis=-1) - dlse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(forward, backward, options, exact, tail):
  del backward
  return merge([forward(exact, tail, options)])


def _attend_fwd(forward, backward, options, exact, tail):
  del backward
  out, lse = merge([forward(exact, tail, options)])
  return (out, lse), (exact, tail, out.astype(exact.v.dtype), lse)


def _attend_bwd(forward, backward, options, residuals, cotangents):
  del forward
  exact, tail, out, lse = residuals
  g, dlse = cotangents
  lse, delta = row_statistics(out, lse, g, dlse)
  dq, dk, dv = backward(exact, options, lse, g, delta)
  dtail = None
  if tail is not None:
    more, dtail = pooled.backward(exact, tail, options, lse, g, delta)
    dq = dq + more
    dtail = _grads(tail, dtail)
  dexact = _grads(exact, exact._replace(q=dq, k=dk, v=dv))
  return dexact, dtail


def _grads(like: Any, values: Any) -> Any:
  """`values` in the dtypes of `like`, None for what has no gradient."""
  return type(like)(
    *(
      value.astype(x.dtype)
      if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
      else None
      for x, value in zip(like, values, strict=True)
    )
  )


_attend.defvjp(_attend_fwd, _attend_bwd)
