"""What every implementation of the family is given, and its validation.

Dimensions: B batch, T tokens, H value heads, G query/key heads (G divides H:
value head h reads query and key head `h // (H / G)`), K key size, V value
size, M the number of state matrices (2 with momentum, else 1).

The recurrences, per value head, in float32 (float64 for float64 inputs):

  not delta:     S = a S + k v^T
  delta, M = 1:  e = v - p^T S;  S = a S + beta k e^T
  delta, M = 2:  e = v - p^T S;  N = mu N + eta k e^T;  S = a S + beta N

with a = exp(log_decay) (a scalar, or a factor per row of S), mu =
exp(log_momentum), p = a k unless an erase key is given, and the output
o = S^T (scale q). A token whose segment is not the one before it meets a
zero state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import arguments, meshes

CHUNK_SIZES = (16, 32, 64, 128, 256)
# Sums of a chunk of such log gates are finite, and their exponentials 0.
_LEAST_LOG = -1e30


class Inputs(NamedTuple):
  """The arrays of one problem.

  q, k, p and v share one dtype; gates and states are float32, or float64
  where any input is.

  Attributes:
    q: `[B, T, G, K]`, not yet scaled.
    k: `[B, T, G, K]`.
    p: `[B, T, G, K]`, the erase key, or None for the decay times k.
    v: `[B, T, H, V]`.
    log_decay: `[B, T, H]` or, per channel, `[B, T, H, K]`.
    log_momentum: `[B, T, H]`, or None for a first-order member.
    beta: `[B, T, H]`, or None without the delta rule.
    eta: `[B, T, H]`, or None for a first-order member.
    state: M arrays `[B, H, K, V]`, (S,) or (S, N), of segment 0.
    segments: int32 `[B, T]`, ordinals that start at 0 and rise by at most 1,
      or None for one segment.
  """

  q: jax.Array
  k: jax.Array
  p: jax.Array | None
  v: jax.Array
  log_decay: jax.Array
  log_momentum: jax.Array | None
  beta: jax.Array | None
  eta: jax.Array | None
  state: tuple[jax.Array, ...]
  segments: jax.Array | None


def run_divided(
  f: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]],
  inputs: Inputs,
  lengths: jax.Array | None = None,
  *,
  state_name: str = "initial_state",
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """`f(inputs, lengths)`, by `meshes.run` on each device's part of the arrays.

  Args:
    f: of `inputs` and `lengths`, returns o and the final state.
    inputs: the arrays; those of one token lack T.
    lengths: int `[B]` or None.
    state_name: what the caller calls the state.

  Returns:
    What `f` does.
  """
  names = {"p": "erase_key", "state": state_name, "segments": "segment_ids"}
  names = [names.get(name, name) for name in Inputs._fields]
  keys, values, gates = "BTGK", "BTHV", "BTH"
  decay = gates + "K" * (inputs.log_decay.ndim == inputs.v.ndim)
  letters = [keys, keys, keys, values, decay, gates, gates, gates]
  if inputs.v.ndim == 3:
    letters = [x.replace("T", "") for x in letters]
  layout = meshes.Layout(
    arrays=dict(
      zip((*names, "lengths"), (*letters, "BHKV", "BT", "B"), strict=True)
    ),
    out=(letters[3], ("BHKV",) * len(inputs.state)),
    hints={"T": "jax.reshard it, or see context_axis"},
  )
  return meshes.run(
    lambda arrays: f(
      Inputs(*(arrays[name] for name in names)), arrays["lengths"]
    ),
    dict(zip(names, inputs, strict=True)) | {"lengths": lengths},
    layout,
  )


@dataclasses.dataclass(frozen=True)
class Options:
  """What is known when a problem is traced.

  Attributes:
    scale: multiplies q.
    delta: whether values are corrected by what the state predicts.
    chunk_size: tokens of a chunk, on accelerators.
    interpret: whether Pallas kernels are interpreted, or with which
      parameters (`pltpu.InterpretParams`).
    by_token: whether `xla` goes token by token on CPUs where nothing is
      differentiated.
    cpu_chunk_size: `xla`'s on CPUs, None for the same.
  """

  scale: float
  delta: bool
  chunk_size: int
  interpret: bool | Any
  by_token: bool = False
  cpu_chunk_size: int | None = None


def _gate(
  name: str, x: Any, required: bool, channels: str, dims: tuple[int, ...]
) -> jax.Array | None:
  """Checks one gate: `[B, T, H]`, or `[B, T, H, K]` where channels may be."""
  if x is None:
    if required:
      raise TypeError(f"{name} must be an array, got None")
    return None
  b, t, h, k = dims
  if channels == "always" or (channels == "allowed" and jnp.ndim(x) == 4):
    return arguments.shaped(name, x, (b, t, h, k), "B, T, H, K")
  return arguments.shaped(name, x, (b, t, h), "B, T, H")


def _states(
  name: str, state: Any, fields: tuple[str, ...], wanted: tuple[int, ...]
) -> tuple[jax.Array, ...] | None:
  """The state's arrays, checked; `fields` are those of a tuple, or none."""
  if state is None:
    return None
  if not fields:
    return (arguments.shaped(name, state, wanted, "B, H, K, V"),)
  if not isinstance(state, tuple) or len(state) != len(fields):
    raise TypeError(
      f"{name} must be a tuple ({', '.join(fields)}), got "
      f"{type(state).__name__}"
    )
  return tuple(
    arguments.shaped(f"{name}.{field}", x, wanted, "B, H, K, V")
    for field, x in zip(fields, state, strict=True)
  )


def make_inputs(
  q: Any,
  k: Any,
  p: Any,
  v: Any,
  gates: dict[str, Any],
  *,
  state: Any,
  segment_ids: Any,
  required: tuple[str, ...] = (),
  channels: str = "never",
  fields: tuple[str, ...] = (),
  state_name: str = "initial_state",
) -> Inputs:
  """Checks and completes the public functions' arguments.

  Args:
    q: as the public functions take it, and so the arrays that follow.
    k: keys.
    p: erase keys or None.
    v: values.
    gates: the member's gates by name; those it lacks are absent.
    state: the initial state: an array, a tuple where `fields` are given, or
      None.
    segment_ids: int `[B, T]` or None.
    required: the gates that may not be None.
    channels: whether `log_decay` is `[B, T, H, K]`: "never", "allowed" or
      "always".
    fields: the names of a second-order member's states.
    state_name: what the caller calls the state.

  Returns:
    The `Inputs`.

  Raises:
    TypeError: naming the argument, for dtypes that are not allowed.
    ValueError: naming the argument, for shapes that do not fit.
  """
  q, v = arguments.floating("q", q), arguments.floating("v", v)
  b, t, g, h, size, value_size = sizes(q, v)
  k = arguments.shaped("k", k, q.shape, "B, T, G, K")
  p = (
    None
    if p is None
    else arguments.shaped("erase_key", p, q.shape, "B, T, G, K")
  )
  gates = {
    name: _gate(
      name,
      x,
      name in required,
      channels if name == "log_decay" else "never",
      (b, t, h, size),
    )
    for name, x in gates.items()
  }
  wanted = (b, h, size, value_size)
  states = _states(state_name, state, fields, wanted)
  segment_ids = check_segments(segment_ids, b, t)

  narrow = jnp.result_type(*(x for x in (q, k, p, v) if x is not None))
  wide = [x for x in (*gates.values(), *(states or ())) if x is not None]
  dtype = jnp.result_type(jnp.float32, narrow, *wide)
  if dtype == jnp.float64:
    narrow = dtype
  q, k, p, v = (None if x is None else x.astype(narrow) for x in (q, k, p, v))
  if states is None:
    states = (jnp.zeros(wanted, dtype),) * max(1, len(fields))
  if gates["log_decay"] is None:
    gates["log_decay"] = jnp.zeros((b, t, h), dtype)
  gate = lambda name: (
    None if gates.get(name) is None else gates[name].astype(dtype)
  )
  # A gate of exactly 0 has the log -inf, of which a masked sum would be NaN.
  log_gate = lambda name: (
    None if gates.get(name) is None else jnp.maximum(gate(name), _LEAST_LOG)
  )
  return Inputs(
    q=q,
    k=k,
    p=p,
    v=v,
    log_decay=log_gate("log_decay"),
    log_momentum=log_gate("log_momentum"),
    beta=gate("beta"),
    eta=gate("eta"),
    state=tuple(x.astype(dtype) for x in states),
    segments=None if segment_ids is None else ordinals(segment_ids),
  )


def sizes(q: jax.Array, v: jax.Array) -> tuple[int, int, int, int, int, int]:
  """(B, T, G, H, K, V) of `q` [B, T, G, K] and `v` [B, T, H, V].

  Raises:
    ValueError: for shapes that do not fit.
  """
  for name, x, letters in (("q", q, "B, T, G, K"), ("v", v, "B, T, H, V")):
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(
        f"{name} must have the shape [{letters}] with every size at least 1, "
        f"got {list(x.shape)}"
      )
  b, t, g, k = q.shape
  h, size = v.shape[2:]
  if v.shape[:2] != (b, t):
    raise ValueError(
      f"v must have the shape [B, T, H, V] with [B, T] = {[b, t]} as q has, "
      f"got {list(v.shape)}"
    )
  if h % g:
    raise ValueError(
      f"v must have a multiple of q's and k's {g} heads, got {h} heads"
    )
  return b, t, g, h, k, size


def check_chunk_size(
  chunk_size: Any, length: int, *, delta: bool = True, channels: int = 0
) -> tuple[int, int]:
  """`chunk_size`, or the best for T = `length`: on accelerators and on CPUs.

  The work inside a chunk grows with C where that between chunks shrinks with
  it. CPU cores do no product of 64 rows faster than one of 32, so they want
  larger chunks only where those are light, without an inverse and with scalar
  decays, and smaller ones where decays per channel outweigh a small state that
  has to be walked with; the sides of an accelerator's matrix units, and a
  serial walk over chunks, want more.

  Args:
    chunk_size: as the public functions take it.
    length: T.
    delta: whether there is an inverse.
    channels: K where each channel has a decay of its own, else 0.

  Raises:
    ValueError: unless it is None or one of `CHUNK_SIZES`.
  """
  if chunk_size is None:
    best = cpu_best = 64
    if delta or channels:
      cpu_best = 16 if delta and 0 < channels <= 64 else 32
    fit = lambda most: next(x for x in CHUNK_SIZES if x >= min(most, length))
    return fit(best), fit(cpu_best)
  try:
    size = arguments.integer("chunk_size", chunk_size, 1)
  except ValueError:
    size = None
  if size not in CHUNK_SIZES:
    raise ValueError(
      f"chunk_size must be None or one of {list(CHUNK_SIZES)}, got "
      f"{chunk_size!r}"
    )
  return size, size


def check_num_splits(num_splits: Any, length: int) -> int:
  """`num_splits`, ValueError unless it is an int from 1 to T = `length`."""
  try:
    return arguments.integer("num_splits", num_splits, 1, length)
  except ValueError as e:
    raise ValueError(
      f"num_splits must be an int from 1 to T = {length}, got {num_splits!r}"
    ) from e


def check_lengths(lengths: Any, b: int, t: int) -> jax.Array | None:
  """`lengths` as int32 `[B]`, those that are traced brought to 0 .. T.

  Raises:
    TypeError: unless they are integers.
    ValueError: for another shape, and for known ones outside of 0 .. T.
  """
  if lengths is None:
    return None
  lengths = arguments.integers("lengths", lengths)
  arguments.check_shape("lengths", lengths, (b,), "B")
  if arguments.known(lengths):
    values = np.asarray(lengths)
    if values.size and not (0 <= values.min() and values.max() <= t):
      raise ValueError(
        f"lengths must be from 0 to T = {t}, got {values.tolist()}"
      )
  if isinstance(lengths, np.ndarray):
    return jnp.asarray(lengths.astype(np.int32))
  least = 0 if jnp.issubdtype(lengths.dtype, jnp.signedinteger) else None
  return jnp.clip(lengths, least, min(t, jnp.iinfo(lengths.dtype).max)).astype(
    jnp.int32
  )


def cut(inputs: Inputs, real: jax.Array) -> Inputs:
  """Tokens that are not real become such as change nothing.

  They write, erase and decay nothing, and belong to the last real token's
  segment. NaN in them goes nowhere, and their gradients are 0.

  Args:
    inputs: the arrays.
    real: bool `[B, T]`, true up to each row's length.
  """
  mask = lambda x: jnp.where(
    real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0
  )
  tokens = jax.tree.map(mask, inputs._replace(state=None, segments=None))
  segments = inputs.segments
  if segments is not None:
    last = jnp.max(jnp.where(real, segments, 0), axis=1, keepdims=True)
    segments = jnp.where(real, segments, last)
  return tokens._replace(state=inputs.state, segments=segments)


def check_axis(context_axis: Any) -> None:
  """ValueError unless it names a mesh axis of the enclosing `shard_map`."""
  try:
    jax.lax.axis_size(context_axis)
  except (NameError, TypeError, ValueError) as e:
    raise ValueError(
      "context_axis must name a mesh axis of an enclosing jax.shard_map, got "
      f"{context_axis!r}"
    ) from e


def ordinals(segment_ids: jax.Array) -> jax.Array:
  """Numbers the runs of equal ids of each row 0, 1, ...: int32 `[B, T]`."""
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  change = jnp.cumsum(change.astype(jnp.int32), axis=1)
  return jnp.pad(change, ((0, 0), (1, 0)))


def check_segments(segment_ids: Any, b: int, t: int) -> jax.Array | None:
  """`segment_ids` `[B, T]`, equal where they were.

  A `jax.Array` stays as it is, since devices may compare theirs.

  Raises:
    TypeError: unless they are integers.
    ValueError: for another shape.
  """
  if segment_ids is None:
    return None
  segment_ids = arguments.integers("segment_ids", segment_ids)
  arguments.check_shape("segment_ids", segment_ids, (b, t), "B, T")
  if isinstance(segment_ids, jax.Array):
    return segment_ids
  return arguments.renumbered(segment_ids)
