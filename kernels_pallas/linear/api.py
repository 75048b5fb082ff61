"""The public functions of the linear attention family.

All take q and k as they are: normalisation, short convolutions and the maps
that make gates belong to the layer. Shapes are in `problem`'s letters. Common
arguments, returns and errors:

  scale: multiplies q; None is K**-0.5.
  initial_state: what the first segment starts from; None is zero.
  segment_ids: int `[B, T]`. The state restarts from zero wherever the id
    changes, up or down, so that packed sequences do not see each other, and
    the final state is that of the last segment. An id for padding at the end
    is a segment too, whose state is the final one: give `lengths` then.
  lengths: int `[B]`, how many of each row's tokens are real, from 0 to T; the
    rest is padding. Padding is not read, its o is 0, and the final state is
    that after the last real token (the initial one for length 0). Lengths
    outside of 0 .. T are refused where their values are known, and brought
    into it when traced.
  chunk_size: tokens of a chunk: 16, 32, 64, 128 or 256; None chooses for T
    and the platform that the function is lowered for, on a CPU also to go
    token by token where that is faster and nothing is differentiated. It
    changes rounding and speed, not meaning.
  num_splits: into how many pieces each sequence is cut; they run side by side
    and are then composed. It pays where there are fewer sequences and heads
    than the device runs at once, and costs a walk of V + K value channels
    (V + 2 K with momentum) instead of V.
  context_axis: inside `jax.shard_map`, the mesh axis that divides T, in
    order: context parallelism. Arrays are the device's part; lengths are
    those of whole sequences and initial_state is the state before the first
    device's tokens, equal on all; the final state is that after the last
    device's, on all.
  implementation: "reference" (token by token), "xla" (chunks, any platform),
    "pallas_tpu", "pallas_gpu"; a sequence of names is a preference order, of
    which each platform that the function is lowered for takes the first that
    it can; None is "xla".
  interpret: runs a Pallas implementation in Pallas's interpreter; parameters
    of its (`pltpu.InterpretParams`) choose which.

Batch and heads may be divided over a mesh, of Auto axes, inside a
`jax.shard_map`, or of Explicit axes (what `jax.make_mesh` makes). On Explicit
axes what one array leaves whole and another divides is divided in both; where
G has fewer heads than there are parts of H, it divides their number. T, K and V
are not divided so: T is by `context_axis`.

Each returns o, `[B, T, H, V]` in v's dtype, and the final state in float32
(float64 where any input is float64, and then everything is computed in it).
Every floating input can be differentiated, the initial state included, and
so can both outputs: in both modes and to any order with "xla" and
"reference", once in reverse mode (`jax.grad`) with Pallas.

Log gates above 0 mean growth: they are allowed and not checked. Those below
about -100 underflow to a gate of exactly 0, which is harmless, and -inf is 0.

Raises ValueError for shapes that do not fit, empty arrays, chunk sizes, names
and segment ids that are not allowed, TypeError for arrays that are not
floating (or segment ids that are not integers), each naming the argument, and
NotImplementedError with the reason where a named implementation cannot run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import arguments, dispatch
from kernels_pallas.linear import problem, recurrent, split

Implementation = dispatch.Implementation


class MomentumState(NamedTuple):
  """State of Momentum DeltaNet.

  Attributes:
    s: `[B, H, K, V]`, what queries read.
    n: `[B, H, K, V]`, the momentum; minus the M of the released PyTorch code.
  """

  s: jax.Array
  n: jax.Array


def _run(
  inputs: problem.Inputs,
  v: Any,
  *,
  delta: bool,
  scale: Any,
  segment_ids: Any,
  lengths: Any,
  chunk_size: Any,
  num_splits: Any,
  context_axis: Any,
  implementation: Implementation,
  interpret: bool | Any,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Checks the options, runs, and gives o the dtype of `v` as it was given."""
  (b, length), decay = inputs.q.shape[:2], inputs.log_decay
  size, cpu_size = problem.check_chunk_size(
    chunk_size,
    length,
    delta=delta,
    channels=decay.shape[-1] if decay.ndim == 4 else 0,
  )
  options = problem.Options(
    scale=arguments.check_scale(scale, inputs.q.shape[-1]),
    delta=delta,
    chunk_size=size,
    cpu_chunk_size=cpu_size,
    interpret=interpret,
    by_token=chunk_size is None and recurrent.faster(inputs, delta=delta),
  )
  pieces = problem.check_num_splits(num_splits, length)
  run = functools.partial(dispatch.run, "linear", implementation=implementation)
  if pieces > 1:
    run = functools.partial(split.run_split, run, pieces=pieces)
  if context_axis is None:
    total, offset = length, 0
    run_all = lambda inputs, real: run(inputs, options)
  else:
    problem.check_axis(context_axis)
    total = length * jax.lax.axis_size(context_axis)
    offset = length * jax.lax.axis_index(context_axis)
    ids = problem.check_segments(segment_ids, b, length)
    run_all = lambda inputs, real: split.run_context(
      run, inputs, options, context_axis, ids, real
    )

  def run_real(inputs, lengths):
    if lengths is None:
      return run_all(inputs, None)
    real = offset + jnp.arange(length) < lengths[:, None]
    o, state = run_all(problem.cut(inputs, real), real)
    return jnp.where(real[:, :, None, None], o, 0), state

  lengths = problem.check_lengths(lengths, b, total)
  o, state = problem.run_divided(run_real, inputs, lengths)
  return o.astype(jnp.result_type(v)), state


def momentum_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None,
  log_momentum: jax.Array,
  beta: jax.Array,
  eta: jax.Array,
  *,
  erase_key: jax.Array | None = None,
  scale: float | None = None,
  initial_state: MomentumState | None = None,
  segment_ids: jax.Array | None = None,
  lengths: jax.Array | None = None,
  chunk_size: int | None = None,
  num_splits: int = 1,
  context_axis: str | None = None,
  implementation: Implementation = None,
  interpret: bool | Any = False,
) -> tuple[jax.Array, MomentumState]:
  """Momentum DeltaNet (arXiv:2605.05838), the delta rule of second order.

  Per token, with p the erase key, alpha = exp(log_decay) and mu =
  exp(log_momentum):

    e = v - p^T S;  N = mu N + eta k e^T;  S = alpha S + beta N;
    o = S^T (scale q)

  Args:
    q: `[B, T, G, K]`.
    k: `[B, T, G, K]`.
    v: `[B, T, H, V]`.
    log_decay: `[B, T, H]`, or None for no decay.
    log_momentum: `[B, T, H]`.
    beta: `[B, T, H]`.
    eta: `[B, T, H]`.
    erase_key: `[B, T, G, K]`, p; None is alpha k.
    scale: see the module, as for all that follow.
    initial_state: a pair `(s, n)`, each `[B, H, K, V]`.
    segment_ids: `[B, T]`.
    lengths: `[B]`, the tokens that are real.
    chunk_size: tokens of a chunk, or None.
    num_splits: pieces of each sequence.
    context_axis: a mesh axis that divides T, or None.
    implementation: a name, names or None.
    interpret: for Pallas implementations.

  Returns:
    o, `[B, T, H, V]`, and the final `MomentumState`.
  """
  inputs = problem.make_inputs(
    q,
    k,
    erase_key,
    v,
    dict(log_decay=log_decay, log_momentum=log_momentum, beta=beta, eta=eta),
    state=initial_state,
    segment_ids=segment_ids,
    required=("log_momentum", "beta", "eta"),
    fields=MomentumState._fields,
  )
  o, state = _run(
    inputs,
    v,
    delta=True,
    scale=scale,
    segment_ids=segment_ids,
    lengths=lengths,
    chunk_size=chunk_size,
    num_splits=num_splits,
    context_axis=context_axis,
    implementation=implementation,
    interpret=interpret,
  )
  return o, MomentumState(*state)


def gated_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None,
  beta: jax.Array,
  *,
  erase_key: jax.Array | None = None,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  lengths: jax.Array | None = None,
  chunk_size: int | None = None,
  num_splits: int = 1,
  context_axis: str | None = None,
  implementation: Implementation = None,
  interpret: bool | Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Gated DeltaNet (arXiv:2412.06464), and DeltaNet without decay.

  Per token, with p the erase key and alpha = exp(log_decay):

    e = v - p^T S;  S = alpha S + beta k e^T;  o = S^T (scale q)

  Args:
    q: `[B, T, G, K]`.
    k: `[B, T, G, K]`.
    v: `[B, T, H, V]`.
    log_decay: `[B, T, H]`, or None for no decay (DeltaNet).
    beta: `[B, T, H]`; up to 2 is stable for keys of norm 1.
    erase_key: `[B, T, G, K]`, p; None is alpha k. Comba (arXiv:2506.02475)
      gives its own.
    scale: see the module, as for all that follow.
    initial_state: `[B, H, K, V]`.
    segment_ids: `[B, T]`.
    lengths: `[B]`, the tokens that are real.
    chunk_size: tokens of a chunk, or None.
    num_splits: pieces of each sequence.
    context_axis: a mesh axis that divides T, or None.
    implementation: a name, names or None.
    interpret: for Pallas implementations.

  Returns:
    o, `[B, T, H, V]`, and the final state `[B, H, K, V]`.
  """
  inputs = problem.make_inputs(
    q,
    k,
    erase_key,
    v,
    dict(log_decay=log_decay, beta=beta),
    state=initial_state,
    segment_ids=segment_ids,
    required=("beta",),
  )
  o, (state,) = _run(
    inputs,
    v,
    delta=True,
    scale=scale,
    segment_ids=segment_ids,
    lengths=lengths,
    chunk_size=chunk_size,
    num_splits=num_splits,
    context_axis=context_axis,
    implementation=implementation,
    interpret=interpret,
  )
  return o, state


def kda(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  beta: jax.Array,
  *,
  erase_key: jax.Array | None = None,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  lengths: jax.Array | None = None,
  chunk_size: int | None = None,
  num_splits: int = 1,
  context_axis: str | None = None,
  implementation: Implementation = None,
  interpret: bool | Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Kimi Delta Attention (arXiv:2510.26692): a decay for every key channel.

  Per token, with p the erase key and alpha = exp(log_decay) a vector over K:

    e = v - p^T S;  S = diag(alpha) S + beta k e^T;  o = S^T (scale q)

  Args:
    q: `[B, T, G, K]`.
    k: `[B, T, G, K]`.
    v: `[B, T, H, V]`.
    log_decay: `[B, T, H, K]`.
    beta: `[B, T, H]`.
    erase_key: `[B, T, G, K]`, p; None is alpha k, elementwise.
    scale: see the module, as for all that follow.
    initial_state: `[B, H, K, V]`.
    segment_ids: `[B, T]`.
    lengths: `[B]`, the tokens that are real.
    chunk_size: tokens of a chunk, or None.
    num_splits: pieces of each sequence.
    context_axis: a mesh axis that divides T, or None.
    implementation: a name, names or None.
    interpret: for Pallas implementations.

  Returns:
    o, `[B, T, H, V]`, and the final state `[B, H, K, V]`.
  """
  inputs = problem.make_inputs(
    q,
    k,
    erase_key,
    v,
    dict(log_decay=log_decay, beta=beta),
    state=initial_state,
    segment_ids=segment_ids,
    required=("log_decay", "beta"),
    channels="always",
  )
  o, (state,) = _run(
    inputs,
    v,
    delta=True,
    scale=scale,
    segment_ids=segment_ids,
    lengths=lengths,
    chunk_size=chunk_size,
    num_splits=num_splits,
    context_axis=context_axis,
    implementation=implementation,
    interpret=interpret,
  )
  return o, state


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  lengths: jax.Array | None = None,
  chunk_size: int | None = None,
  num_splits: int = 1,
  context_axis: str | None = None,
  implementation: Implementation = None,
  interpret: bool | Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Linear attention with any decay and no correction of the values.

  Per token S = exp(log_decay) S + k v^T and o = S^T (scale q). By its decay:
  linear attention (None), RetNet and Lightning (a constant per head), Mamba-2
  (a scalar per token and head), GLA (a vector over K).

  Args:
    q: `[B, T, G, K]`.
    k: `[B, T, G, K]`.
    v: `[B, T, H, V]`.
    log_decay: `[B, T, H]`, `[B, T, H, K]`, or None for no decay.
    scale: see the module, as for all that follow.
    initial_state: `[B, H, K, V]`.
    segment_ids: `[B, T]`.
    lengths: `[B]`, the tokens that are real.
    chunk_size: tokens of a chunk, or None.
    num_splits: pieces of each sequence.
    context_axis: a mesh axis that divides T, or None.
    implementation: a name, names or None.
    interpret: for Pallas implementations.

  Returns:
    o, `[B, T, H, V]`, and the final state `[B, H, K, V]`.
  """
  inputs = problem.make_inputs(
    q,
    k,
    None,
    v,
    dict(log_decay=log_decay),
    state=initial_state,
    segment_ids=segment_ids,
    channels="allowed",
  )
  o, (state,) = _run(
    inputs,
    v,
    delta=False,
    scale=scale,
    segment_ids=segment_ids,
    lengths=lengths,
    chunk_size=chunk_size,
    num_splits=num_splits,
    context_axis=context_axis,
    implementation=implementation,
    interpret=interpret,
  )
  return o, state
