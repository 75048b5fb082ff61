"""The members of the linear attention family as a table, and their inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas import MomentumState

# Sums of at most a few hundred terms, each rounded to 2^-24 or 2^-53; the
# inverse of I + L and the growth of momentum cost a factor of ten or so.
F32 = dict(forward=1e-5, gradient=1e-4)
F64 = dict(forward=1e-12, gradient=1e-12)
# Of the RMS. o and the gradients of vectors are rounded once, to 2^-9.
BF16 = dict(forward=5e-3, gradient=1e-2, norm="rms")


@dataclasses.dataclass(frozen=True)
class Member:
  """One member.

  Attributes:
    op: the public function.
    step: its decode step.
    gates: the names of its gates, in the order of its arguments.
    channels: whether its decay is a vector.
    erase: whether it is given an erase key.
    constant: whether its decay is one constant per head.
  """

  op: Callable[..., Any]
  step: Callable[..., Any]
  gates: tuple[str, ...] = ()
  channels: bool = False
  erase: bool = False
  constant: bool = False

  @property
  def second_order(self) -> bool:
    return "log_momentum" in self.gates


_linear = functools.partial(
  Member, kernels_pallas.linear_attention, kernels_pallas.linear_attention_step
)
_delta = functools.partial(
  Member, kernels_pallas.gated_delta_rule, kernels_pallas.gated_delta_rule_step
)
_momentum = functools.partial(
  Member,
  kernels_pallas.momentum_delta_rule,
  kernels_pallas.momentum_delta_rule_step,
  ("log_decay", "log_momentum", "beta", "eta"),
)

MEMBERS = {
  "linear": _linear(),
  "retnet": _linear(("log_decay",), constant=True),
  "ssd": _linear(("log_decay",)),
  "gla": _linear(("log_decay",), channels=True),
  "deltanet": _delta(("beta",)),
  "gdn": _delta(("log_decay", "beta")),
  "comba": _delta(("log_decay", "beta"), erase=True),
  "kda": Member(
    kernels_pallas.kda,
    kernels_pallas.kda_step,
    ("log_decay", "beta"),
    channels=True,
  ),
  "mdn": _momentum(),
  "mdn_erase": _momentum(erase=True),
}


def call(op, arrays, **options):
  """Calls a public function or a step with a dict of its arrays."""
  arrays = dict(arrays)
  for name in ("log_decay", "beta"):
    arrays.setdefault(name, None)
  if op is kernels_pallas.linear_attention:
    del arrays["beta"]
  return op(**arrays, **options)


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes; the odd ones are on purpose."""

  b: int = 2
  t: int = 65
  g: int = 2
  h: int = 4
  k: int = 24
  v: int = 40


# A member and sizes for lengths around a chunk, with 1, 2 and 3 value heads on
# a key head.
LENGTHS = {
  1: ("mdn", dict(g=2, h=2, k=16, v=16)),
  15: ("kda", dict(g=1, h=3, k=7, v=33)),
  63: ("gdn", dict(g=1, h=2, k=20, v=8)),
  64: ("mdn_erase", dict(g=2, h=2, k=33, v=7)),
  65: ("gla", dict(g=1, h=1, k=1, v=1)),
}


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(
  member: Member, shape: Shape, *, seed: int = 0, keys: str = "random"
) -> dict[str, Any]:
  """Float64 numpy inputs of a member: the arguments of its function.

  Args:
    member: the member.
    shape: the sizes.
    seed: of the random numbers.
    keys: "random", "same" (all equal: the inverse at its worst) or "zero".

  Returns:
    Arrays by argument name, `initial_state` among them.
  """
  rng = np.random.default_rng(seed)
  b, t, g, h = shape.b, shape.t, shape.g, shape.h
  k = _unit(rng.standard_normal((b, t, g, shape.k)))
  if keys == "same":
    k = np.broadcast_to(k[:, :1], k.shape).copy()
  elif keys == "zero":
    k = np.zeros_like(k)
  arrays = dict(
    q=_unit(rng.standard_normal((b, t, g, shape.k))),
    k=k,
    v=rng.standard_normal((b, t, h, shape.v)),
  )
  width = (b, t, h)
  # As the layers make them: eta in (0, 2), beta in (0, 1), decays of a few
  # hundredths to a few units per token.
  gates = dict(
    log_decay=-np.exp(
      rng.uniform(-4, 1, (*width, shape.k) if member.channels else width)
    ),
    log_momentum=-np.exp(rng.uniform(-3, 1, width)),
    beta=rng.uniform(0, 1, width),
    eta=rng.uniform(0, 2, width),
  )
  if member.constant:
    per_head = np.log1p(-(2.0 ** -(5.0 + np.arange(h))))
    gates["log_decay"] = np.broadcast_to(per_head, width).copy()
  arrays.update({name: gates[name] for name in member.gates})
  if member.erase:
    arrays["erase_key"] = _unit(k + 0.3 * rng.standard_normal(k.shape))
  state = lambda: rng.standard_normal((b, h, shape.k, shape.v))
  arrays["initial_state"] = (
    MomentumState(state(), state()) if member.second_order else state()
  )
  return arrays


def narrow(arrays, dtype):
  """Casts: vectors to `dtype`, gates and states at least to float32."""
  wide = jnp.promote_types(dtype, jnp.float32)
  vectors = ("q", "k", "v", "erase_key")
  return {
    name: _cast(x, dtype if name in vectors else wide)
    for name, x in arrays.items()
  }


def _cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def narrow_cotangents(cotangents, dtype):
  """As `narrow`, for cotangents of o and of the state."""
  o, state = cotangents
  return _cast(o, dtype), _cast(state, jnp.promote_types(dtype, jnp.float32))


def widen(arrays):
  """The same values in float64."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)


def cotangents(member: Member, shape: Shape) -> tuple[Any, Any]:
  """Random float64 cotangents of o and of the final state."""
  rng = np.random.default_rng(99)
  size = (shape.b, shape.h, shape.k, shape.v)
  state = lambda: rng.standard_normal(size)
  return (
    rng.standard_normal((shape.b, shape.t, shape.h, shape.v)),
    MomentumState(state(), state()) if member.second_order else state(),
  )


def jitted(op, options):
  """Outputs and gradients of one call, options as pairs."""

  def run(arrays, segment_ids, cotangents):
    f = lambda arrays: call(
      op, arrays, segment_ids=segment_ids, **dict(options)
    )
    outputs, pullback = jax.vjp(f, arrays)
    return outputs, pullback(cotangents)[0]

  return jax.jit(run)


_jitted = functools.cache(jitted)


def values_and_grads(op, arrays, segment_ids, cotangents, **options):
  """`(outputs, gradients)` of one call, jitted; a jit is made once.

  Args:
    op: a public function.
    arrays: its arrays; they are differentiated.
    segment_ids: int `[B, T]` or None.
    cotangents: of o and of the final state.
    **options: of the public function.
  """
  f = _jitted(op, tuple(sorted(options.items())))
  return f(arrays, segment_ids, cotangents)


def truth(op, arrays, segment_ids, cotangents):
  """Outputs and gradients of the token recurrence in float64."""
  with jax.enable_x64(True):
    out = values_and_grads(
      op,
      widen(arrays),
      segment_ids,
      widen(cotangents),
      implementation="reference",
    )
    return jax.tree.map(np.asarray, out)


def errors(got, want, norm="max"):
  """The relative error of every leaf, by its path, the worst first.

  Args:
    got: a pytree.
    want: a float64 pytree.
    norm: "max", of the largest entries, or "rms".
  """
  size = {
    "max": lambda x: np.abs(x).max(),
    "rms": lambda x: np.sqrt(np.mean(x**2)),
  }[norm]
  out = {}
  flat = jax.tree_util.tree_leaves_with_path(want)
  for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (path, a.shape, b.shape)
    error = size(a - b) / max(size(b), np.finfo(np.float32).tiny)
    out[jax.tree_util.keystr(path)] = float(error)
  return dict(sorted(out.items(), key=lambda item: -item[1]))


def check(got, want, forward, gradient, norm="max"):
  """Asserts the errors of `(outputs, gradients)`; NaN fails."""
  for part, bound in zip((0, 1), (forward, gradient), strict=True):
    table = errors(got[part], want[part], norm)
    wrong = {path: x for path, x in table.items() if not x <= bound}
    assert not wrong, f"errors above {bound}: {wrong}"


def compare(name, arrays, ids, dtype, bounds, shape, **options):
  """Checks one call at `arrays`, rounded to `dtype`, against the truth.

  Args:
    name: of a member.
    arrays: its float64 arrays, of `shape`.
    ids: int `[B, T]` or None.
    dtype: a name.
    bounds: of `check`.
    shape: the sizes.
    **options: of the public function.

  Returns:
    The outputs and the gradients.
  """
  member = MEMBERS[name]
  with jax.enable_x64(dtype == "float64"):
    arrays = narrow(arrays, dtype)
    given = narrow_cotangents(cotangents(member, shape), dtype)
    got = values_and_grads(member.op, arrays, ids, given, **options)
  want = truth(member.op, arrays, ids, given)
  check(got, want, **bounds)
  return got
