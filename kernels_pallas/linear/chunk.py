"""The chunk algebra that every member of the family and every platform share.

A chunk of C tokens of one head acts on the state X = (X_1 .. X_M), each
[K, V] (M is 2 with momentum, S and N, else 1), as

    R   = V - sum_m p_m o (P X_m)                what each token should add
    E   = (I + L)^-1 R                           and what it does add
    O   = sum_m q_m o (Q X_m) + At E
    X'_m = sum_n D_mn X_n + K^T (k_m o E)

where "o" scales rows. A member is a way to make the `System` (L, At, the row
scales, D) from its gates; the step, its transpose and the inverse are the
same for all. DERIVATION.md, beside this file, derives both.

Every function takes arrays with any leading axes, so that the XLA path runs
all chunks at once and a Pallas kernel one chunk of one head, from the same
lines. Row scales and gates are columns `[..., C, 1]`. Nothing here divides,
nothing subtracts one cumulative sum from another: an exponent is always the
sum of the log decays that lie between two tokens, so a strong decay in one
token costs no digit of a weak one in the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import products

Columns = tuple[jax.Array, ...]


class Gates(NamedTuple):
  """Per-token gates, each `[..., C, 1]` or None where a member has none.

  Attributes:
    log_decay: log of the state's decay; `[..., C, K]` for per-channel decay.
    log_momentum: log of the momentum's decay.
    beta: weight of the error (first order) or of the momentum.
    eta: weight of the error inside the momentum.
  """

  log_decay: jax.Array | None = None
  log_momentum: jax.Array | None = None
  beta: jax.Array | None = None
  eta: jax.Array | None = None


class Segments(NamedTuple):
  """Which tokens may see each other.

  Attributes:
    ids: int32 `[..., C, 1]`, non-decreasing.
    entering: int32 `[..., 1, 1]`, the segment of the state that enters.
  """

  ids: jax.Array
  entering: jax.Array


class System(NamedTuple):
  """What a chunk does to a state.

  Attributes:
    p: `[..., C, K]`, erase keys, or None where they are k.
    q: `[..., C, K]`.
    k: `[..., C, K]`.
    lower: `[..., C, C]`, L, strictly lower triangular, or None without the
      delta rule.
    at: `[..., C, C]`, lower triangular.
    p_scale: M columns `[..., C, 1]`.
    q_scale: likewise.
    k_scale: likewise.
    decay: `D[m][n]`, each `[..., 1, 1]` or `[..., K, 1]`; None is zero.
  """

  p: jax.Array | None
  q: jax.Array
  k: jax.Array
  lower: jax.Array | None
  at: jax.Array
  p_scale: Columns
  q_scale: Columns
  k_scale: Columns
  decay: tuple[tuple[jax.Array | None, ...], ...]


def iota(size: int, axis: int) -> jax.Array:
  """Row (axis 0) or column (axis 1) indices of a square matrix."""
  return jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)


def block(index: jax.Array, width: int) -> jax.Array:
  """Which block of `width` tokens each int32 index, 0 or more, lies in."""
  # Not `//`, whose floor asks a Mosaic compilation for the local chip.
  return jax.lax.div(index, np.int32(width))


def flip(x: jax.Array) -> jax.Array:
  """Swaps the last two axes: a column becomes a row and back."""
  return jnp.swapaxes(x, -1, -2)


class Masks:
  """Which tokens of a chunk see which.

  Args:
    size: C.
    segments: None is one segment.

  Attributes:
    token: int32 `[C, C]`, the row's index.
    source: the column's.
    inside: bool `[..., C, 1]`, the tokens of the entering state's segment,
      or None for all.
    leaving: likewise of the segment that goes on after the chunk.
  """

  def __init__(self, size: int, segments: Segments | None):
    self.token, self.source = iota(size, 0), iota(size, 1)
    self._same = self.inside = self.leaving = None
    if segments is not None:
      ids = segments.ids
      self._same = ids == flip(ids)
      self.inside = ids == segments.entering
      self.leaving = ids == jnp.max(ids, axis=-2, keepdims=True)

  def causal(self, strict: bool = False) -> jax.Array:
    """`[..., C, C]`, true where a token sees a source of its segment."""
    mask = self.token > self.source if strict else self.token >= self.source
    return mask if self._same is None else mask & self._same

  def entering(self, column: jax.Array) -> jax.Array:
    """Zero where the entering state belongs to an earlier segment."""
    if self.inside is None:
      return column
    return jnp.where(self.inside, column, 0.0)


def _decays(
  log_gate: jax.Array,
  masks: Masks,
  mask_dot: products.MaskDot,
  *,
  exclusive: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """How much is left, at token t, of what token j and the state brought.

  Args:
    log_gate: `[..., C, 1]`.
    masks: of the chunk.
    mask_dot: as for `scalar_system`.
    exclusive: whether t's own gate does not count (then only t > j counts).

  Returns:
    `[..., C, C]`, the exponential of the sum of the gates after j up to t,
    with a zero upper triangle, and `[..., C, 1]`, that of all gates up to t.
  """
  token, source = masks.token, masks.source
  counts = token > source if exclusive else token >= source
  upto = jnp.where(counts, flip(log_gate), 0.0)
  total = mask_dot(upto, token > source)
  since = jnp.exp(total[..., :1] + upto[..., :1])
  between = jnp.where(masks.causal(strict=exclusive), jnp.exp(total), 0.0)
  return between, masks.entering(since)


def scalar_system(
  q: jax.Array,
  k: jax.Array,
  p: jax.Array | None,
  gates: Gates,
  segments: Segments | None,
  *,
  scale: float,
  delta: bool,
  precision: jax.lax.PrecisionLike = "highest",
  mask_dot: products.MaskDot = products.mask_dot,
) -> System:
  """The system of a member whose decays are scalars per token and head.

  Args:
    q: `[..., C, K]`.
    k: `[..., C, K]`.
    p: `[..., C, K]`, the erase key; None is the decay times k.
    gates: columns `[..., C, 1]`; `log_momentum` makes it second order (MDN),
      without `delta` only `log_decay` is used.
    segments: None is one segment.
    scale: of q.
    delta: whether values are corrected by what the state predicts.
    precision: of the products of q, k and p.
    mask_dot: how sums under a mask are made, as `products.mask_dot` makes them.

  Returns:
    The `System`, without `lower` if not `delta`.
  """
  masks = Masks(q.shape[-2], segments)
  decay, a = _decays(gates.log_decay, masks, mask_dot)
  # What the erase key meets: the state before the token, decayed by the token
  # itself unless the erase key is free.
  before, a_before = None, a
  if delta and p is not None:
    before, a_before = _decays(gates.log_decay, masks, mask_dot, exclusive=True)
  elif delta:
    before = jnp.where(masks.token > masks.source, decay, 0.0)
  last = lambda x: x[..., -1:, :]
  if gates.log_momentum is not None:
    momentum, m = _decays(gates.log_momentum, masks, mask_dot)
    inner = gates.beta * momentum * flip(gates.eta)
    gamma_before = products.dot(before, inner)
    b_before = products.dot(before, gates.beta * m)
    if p is None:
      # `decay` is `before` with ones on the diagonal.
      gamma, b = gamma_before + inner, b_before + gates.beta * m
    else:
      gamma, b = products.dot(decay, inner), products.dot(decay, gates.beta * m)
    q_scale, p_scale = (a, b), (a_before, b_before)
    k_scale = (flip(last(gamma)), flip(last(momentum)) * gates.eta)
    state_decay = ((last(a), last(b)), (None, last(m)))
  else:
    beta = None if gates.beta is None else flip(gates.beta)
    weigh = lambda x: x if beta is None else x * beta
    gamma = weigh(decay)
    gamma_before = weigh(before) if delta else None
    q_scale, p_scale = (a,), (a_before,)
    k_scale, state_decay = (flip(last(gamma)),), ((last(a),),)
  at = products.dot(q, k, tb=True, precision=precision) * (gamma * scale)
  lower = None
  if delta:
    erase = k if p is None else p
    lower = products.dot(erase, k, tb=True, precision=precision) * gamma_before
  return System(
    p=p,
    q=q,
    k=k,
    lower=lower,
    at=at,
    p_scale=p_scale if delta else (),
    q_scale=tuple(x * scale for x in q_scale),
    k_scale=k_scale,
    decay=state_decay,
  )


def step(
  system: System,
  inverse: jax.Array | None,
  v: jax.Array,
  state: Columns,
  *,
  precision: jax.lax.PrecisionLike = "highest",
) -> tuple[jax.Array, jax.Array, Columns]:
  """Takes a state through a chunk.

  Args:
    system: the chunk.
    inverse: `[..., C, C]`, of I + L; None without the delta rule.
    v: `[..., C, V]`.
    state: M arrays `[..., K, V]`.
    precision: of the products.

  Returns:
    o and e, both `[..., C, V]`, and the state at the chunk's end.
  """
  e = v.astype(state[0].dtype)
  if inverse is not None:
    erase = system.k if system.p is None else system.p
    for scale, x in zip(system.p_scale, state, strict=True):
      e = e - scale * products.dot(erase, x, precision=precision)
    e = products.dot(inverse, e, precision=precision)
  o = read(system, e, state, precision=precision)
  return o, e, write(system, e, state, precision=precision)


def read(
  system: System,
  e: jax.Array,
  state: Columns,
  *,
  precision: jax.lax.PrecisionLike = "highest",
) -> jax.Array:
  """O of a chunk, `[..., C, V]`, from E and the states that enter it."""
  o = products.dot(system.at, e, precision=precision)
  for scale, x in zip(system.q_scale, state, strict=True):
    o = o + scale * products.dot(system.q, x, precision=precision)
  return o


def write(
  system: System,
  e: jax.Array,
  state: Columns | None,
  *,
  precision: jax.lax.PrecisionLike = "highest",
) -> Columns:
  """The states at a chunk's end; for None what it adds to them."""
  out = []
  for row, scale in zip(system.decay, system.k_scale, strict=True):
    new = products.dot(system.k, scale * e, ta=True, precision=precision)
    for d, x in zip(row, state or (), strict=state is not None):
      if d is not None:
        new = new + d * x
    out.append(new)
  return tuple(out)


def _row_sum(x: jax.Array) -> jax.Array:
  return jnp.sum(x, axis=-1, keepdims=True)


def row_sum_by_product(x: jax.Array) -> jax.Array:
  """Row sums as a product with ones, several times a reduction on CPU.

  XLA makes it a reduction again on a TPU or GPU.
  """
  return products.dot(x, jnp.ones((x.shape[-1], 1), x.dtype))


def _like(x: jax.Array, target: jax.Array) -> jax.Array:
  """Sums the axes along which `target` was broadcast."""
  axes = tuple(
    i
    for i, (n, wanted) in enumerate(zip(x.shape, target.shape, strict=True))
    if n != wanted
  )
  return jnp.sum(x, axis=axes, keepdims=True) if axes else x


def step_vjp(
  system: System,
  inverse: jax.Array | None,
  e: jax.Array,
  state: Columns,
  do: jax.Array,
  dstate: Columns,
  *,
  precision: jax.lax.PrecisionLike = "highest",
  row_sum: Callable[[jax.Array], jax.Array] = _row_sum,
) -> tuple[System, jax.Array, Columns]:
  """The transpose of `step`.

  Args:
    system: the chunk.
    inverse: as for `step`.
    e: `[..., C, V]`, as `step` returned it.
    state: the state that entered the chunk.
    do: `[..., C, V]`, the cotangent of o.
    dstate: the cotangent of the state that left.
    precision: of the products.
    row_sum: sums rows, of `[..., C, K]` and `[..., K, V]`.

  Returns:
    The cotangents of the system (of L, not of its inverse), of v, and of the
    state that entered.
  """
  dots = lambda a, b, **how: products.dot(a, b, precision=precision, **how)
  erase = system.k if system.p is None else system.p
  delta = inverse is not None
  de = dots(system.at, do, ta=True)
  dk, dk_scale = 0.0, []
  for scale, dx in zip(system.k_scale, dstate, strict=True):
    de = de + scale * dots(system.k, dx)
    from_e = dots(e, dx, tb=True)
    dk = dk + scale * from_e
    dk_scale.append(row_sum(system.k * from_e))
  z = dots(inverse, de, ta=True) if delta else de
  # The cotangent of a row scale is a row sum of V products, do o (Q X); the
  # same number is one of K products, Q o (do X^T), which dq needs anyway.
  dq, dq_scale, dp, dp_scale, entering = 0.0, [], 0.0, [], []
  for i, x in enumerate(state):
    from_o = dots(do, x, tb=True)
    dq = dq + system.q_scale[i] * from_o
    dq_scale.append(row_sum(system.q * from_o))
    dx = dots(system.q, system.q_scale[i] * do, ta=True)
    if delta:
      from_z = dots(z, x, tb=True)
      dp = dp - system.p_scale[i] * from_z
      dp_scale.append(-row_sum(erase * from_z))
      dx = dx - dots(erase, system.p_scale[i] * z, ta=True)
    for row, dy in zip(system.decay, dstate, strict=True):
      if row[i] is not None:
        dx = dx + row[i] * dy
    entering.append(dx)
  decay = tuple(
    tuple(
      None if d is None else _like(row_sum(dy * x), d)
      for d, x in zip(row, state, strict=True)
    )
    for row, dy in zip(system.decay, dstate, strict=True)
  )
  if delta and system.p is None:
    dk, dp = dk + dp, None
  dsystem = System(
    p=_like(dp, system.p) if system.p is not None else None,
    q=_like(dq, system.q),
    k=_like(dk, system.k),
    lower=-dots(z, e, tb=True) if delta else None,
    at=dots(do, e, tb=True),
    p_scale=tuple(dp_scale),
    q_scale=tuple(dq_scale),
    k_scale=tuple(dk_scale),
    decay=decay,
  )
  return dsystem, z, tuple(entering)
