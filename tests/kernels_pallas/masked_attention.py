"""Attention under a mask and its gradients, in float64 numpy by the formulas.

Shares no code with the library; tests judge the library by it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Result(NamedTuple):
  """Attention and its gradients; letters as in `kernels_pallas.sparse.problem`.

  Attributes:
    out: `[B, T, H, V]`.
    lse: `[B, T, H]`, -1e30 in rows that see nothing.
    dq: `[B, T, H, K]`.
    dk: `[B, S, G, K]`.
    dv: `[B, S, G, V]`.
    dsinks: `[H]`, None without sinks.
  """

  out: np.ndarray
  lse: np.ndarray
  dq: np.ndarray
  dk: np.ndarray
  dv: np.ndarray
  dsinks: np.ndarray | None = None


def make(b, t, s, h, g, k, v, *, seed=0):
  """Random float64 (q, k, v) and cotangents (of out, of lse)."""
  rng = np.random.default_rng(seed)
  shapes = (b, t, h, k), (b, s, g, k), (b, s, g, v), (b, t, h, v), (b, t, h)
  arrays = [rng.standard_normal(shape) for shape in shapes]
  return tuple(arrays[:3]), tuple(arrays[3:])


def reference(qkv, cotangents, mask, *, scale=None, sinks=None) -> Result:
  """Values and gradients.

  Args:
    qkv: q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`.
    cotangents: of out and of lse.
    mask: bool, broadcastable to `[B, H, T, S]`, what each query sees.
    scale: of the scores, None is K**-0.5.
    sinks: `[H]` or None.

  Returns:
    All of it in float64.
  """
  q, k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in qkv)
  g, dlse = (np.asarray(x, np.float64) for x in cotangents)
  g, dlse = g.transpose(0, 2, 1, 3), dlse.transpose(0, 2, 1)
  groups, repeat = k.shape[1], q.shape[1] // k.shape[1]
  k, v = (np.repeat(x, repeat, axis=1) for x in (k, v))
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  scores = scale * q @ k.swapaxes(2, 3)
  mask = np.broadcast_to(mask, scores.shape)
  weights = np.where(mask, np.exp(scores), 0.0)
  total = weights.sum(-1)
  seen = total > 0
  if sinks is not None:
    sinks = np.exp(np.asarray(sinks, np.float64))[:, None]
    total = total + sinks
    seen = np.ones_like(seen)
  safe = np.where(total > 0, total, 1.0)
  probs = weights / safe[..., None]
  out = probs @ v
  dlse = np.where(seen, dlse, 0.0)
  inner = (g * out).sum(-1) - dlse
  ds = probs * (g @ v.swapaxes(2, 3) - inner[..., None])
  dsinks = None
  if sinks is not None:
    dsinks = -(sinks / safe * inner).sum((0, 2))
  join = lambda x: x.reshape(x.shape[0], groups, repeat, *x.shape[2:]).sum(2)
  first = lambda x: x.swapaxes(1, 2)
  return Result(
    out=first(out),
    lse=first(np.where(seen, np.log(safe), -1e30)),
    dq=first(scale * ds @ k),
    dk=first(join(scale * ds.swapaxes(2, 3) @ q)),
    dv=first(join(probs.swapaxes(2, 3) @ g)),
    dsinks=dsinks,
  )


def run(f, qkv, cotangents, *, dtype="float64", sinks=None) -> Result:
  """Values and gradients of `f(q, k, v[, sinks]) -> (out, lse)`, jitted.

  Args:
    f: the function.
    qkv: float64 arrays, which are rounded to `dtype`.
    cotangents: of out and of lse.
    dtype: a name.
    sinks: `[H]` or None.

  Returns:
    A `Result` of numpy arrays.
  """
  with jax.enable_x64(dtype == "float64"):
    cast = lambda x: jnp.asarray(x, dtype)
    args = [cast(x) for x in qkv]
    if sinks is not None:
      args.append(cast(sinks))

    def values_and_grads(args, g, dlse):
      (out, lse), pullback = jax.vjp(f, *args)
      return out, lse, *pullback((g.astype(out.dtype), dlse.astype(lse.dtype)))

    # It is about values, and compiles in half the time.
    g, dlse = (cast(x) for x in cotangents)
    got = jax.jit(values_and_grads)(args, g, dlse)
    return Result(*(np.asarray(x) for x in got))


def check(got: Result, want: Result, bound: float) -> None:
  """Asserts every error, relative to the largest entry; NaN fails."""
  for name, a, b in zip(Result._fields, got, want, strict=True):
    if b is None:
      assert a is None, name
      continue
    assert a.shape == b.shape, (name, a.shape, b.shape)
    hidden = np.abs(b) > 1e29
    np.testing.assert_array_equal(np.abs(a) > 1e29, hidden, name)
    a, b = np.where(hidden, 0, a.astype(np.float64)), np.where(hidden, 0, b)
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
    assert error <= bound, f"{name}: {error} above {bound}"
