"""Sequences cut into pieces that run side by side.

A piece of a sequence is an affine map of the state that enters it, X' = Phi X
+ Psi, and its outputs are o = o_0 + Omega X. Both maps come from the member's
own walk: K more value channels per state matrix, whose values are zero and
whose initial state is the identity, carry Phi and Omega beside Psi and o_0.
The pieces' maps are then composed, in order, to the state that enters each.

On one device the pieces join the batch (long sequences with few heads leave
an accelerator idle otherwise); over a mesh axis they are context parallelism.
The price is the walk of V + M K value channels instead of V.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kernels_pallas import meshes
from kernels_pallas.linear import layout, problem

States = tuple[jax.Array, ...]
Run = Callable[[problem.Inputs, problem.Options], tuple[jax.Array, States]]


def run_split(
  run: Run, inputs: problem.Inputs, options: problem.Options, pieces: int
) -> tuple[jax.Array, States]:
  """Runs pieces of each sequence as rows of the batch.

  Args:
    run: an implementation.
    inputs: the arrays.
    options: the static part.
    pieces: into how many; T is padded to a multiple of it and of the chunk.

  Returns:
    As `run` does, with o in the states' dtype.
  """
  b, length = inputs.q.shape[:2]
  size = min(options.chunk_size, options.cpu_chunk_size or options.chunk_size)
  inputs = layout.pad(inputs, pieces * size)
  part = inputs.q.shape[1] // pieces
  fold = lambda x: x.reshape(b * pieces, part, *x.shape[2:])
  unfold = lambda x: x.reshape(b, pieces, *x.shape[1:])
  keep = jnp.ones((b, pieces), bool)
  segments = inputs.segments
  if segments is not None:
    segments = segments.reshape(b, pieces, part)
    keep = keep.at[:, 1:].set(segments[:, 1:, 0] == segments[:, :-1, -1])
    segments = (segments - segments[:, :, :1]).reshape(b, -1)
  body = inputs._replace(state=None, segments=segments)
  state = inputs.state
  repeated = tuple(jnp.repeat(x, pieces, axis=0) for x in state)
  o, omega, psi, phi = _maps(
    run, jax.tree.map(fold, body)._replace(state=repeated), options
  )
  first = lambda tree: jax.tree.map(
    lambda x: jnp.moveaxis(unfold(x), 1, 0), tree
  )
  entering, final = _compose(first(psi), first(phi), keep.T, state)
  o = unfold(o) + _outputs(
    unfold(omega), [jnp.moveaxis(x, 0, 1) for x in entering]
  )
  return o.reshape(b, pieces * part, *o.shape[3:])[:, :length], final


def run_context(
  run: Run,
  inputs: problem.Inputs,
  options: problem.Options,
  axis: str,
  segment_ids: jax.Array | None,
  real: jax.Array | None,
) -> tuple[jax.Array, States]:
  """Runs the piece that this device of a `shard_map` axis holds.

  Args:
    run: an implementation.
    inputs: this device's tokens; `state`, equal on all devices, is the state
      before the first device's.
    options: the static part.
    axis: the mesh axis that divides T, in order.
    segment_ids: this device's `[B, T]`, to compare across the border.
    real: bool `[B, T]`, which tokens are not padding, or None for all.

  Returns:
    o of this device's tokens, in the states' dtype, and the state after the
    last device's, on all devices.
  """
  state = inputs.state
  inputs, segment_ids, real = meshes.vary_alike(
    (inputs._replace(state=None), segment_ids, real)
  )
  inputs = inputs._replace(state=state)
  o, omega, psi, phi = _maps(run, inputs, options)
  index = jax.lax.axis_index(axis)
  # Under `check_vma` what is equal on all devices is typed so.
  typed = axis in jax.typeof(index).manual_axis_type.varying
  gather = functools.partial(
    jax.lax.all_gather, axis_name=axis, to="invarying" if typed else "varying"
  )
  psi, phi = jax.tree.map(gather, (psi, phi))
  keep = jnp.ones((psi[0].shape[0], o.shape[0]), bool)
  if segment_ids is not None:
    start, end = gather(segment_ids[:, 0]), gather(segment_ids[:, -1])
    same = start[1:] == end[:-1]
    if real is not None:  # Padding goes on with what is before it.
      same |= ~gather(real[:, 0])[1:]
    keep = keep.at[1:].set(same)
  pieces = meshes.vary_alike((psi, phi, keep, state))
  entering, final = _compose(*pieces)
  mine = [jax.lax.dynamic_index_in_dim(x, index, 0, False) for x in entering]
  return o + _outputs(omega, mine), final


def _maps(run, inputs, options):
  """The affine maps of `inputs`' tokens, whatever `inputs.state` is.

  Returns:
    o_0 `[B, T, H, V]`, Omega `[B, T, H, M, K]`, Psi (M arrays
    `[B, H, K, V]`) and Phi (M by M arrays `[B, H, K, K]`).
  """
  dtype = inputs.state[0].dtype
  b, t, h, width = inputs.v.shape
  size, count = inputs.q.shape[-1], len(inputs.state)
  zeros = jnp.zeros((b, t, h, count * size), dtype)
  # The maps are composed before anything is rounded to v's dtype.
  vectors = {
    name: None if x is None else x.astype(dtype)
    for name, x in zip("qkpv", inputs, strict=False)
  }
  v = jnp.concatenate([vectors.pop("v"), zeros], axis=-1)
  # Row m of blocks: zeros for Psi, then the identity in column m.
  basis = jnp.pad(
    jnp.eye(count * size, dtype=dtype).reshape(count, size, count * size),
    ((0, 0), (0, 0), (width, 0)),
  )
  state = tuple(jnp.broadcast_to(x, (b, h, *x.shape)) for x in basis)
  o, final = run(inputs._replace(v=v, state=state, **vectors), options)
  omega = o[..., width:].reshape(b, t, h, count, size)
  psi = tuple(x[..., :width] for x in final)
  phi = tuple(tuple(jnp.split(x[..., width:], count, axis=-1)) for x in final)
  return o[..., :width], omega, psi, phi


def _dot(a, b):
  return jnp.matmul(a, b, precision="highest")


def _compose(
  psi: States,
  phi: Sequence[States],
  keep: jax.Array,
  state: States,
) -> tuple[States, States]:
  """The states that enter the pieces, `[pieces, B, H, K, V]`, and the last."""

  def advance(state, piece):
    psi, phi, keep = piece
    keep = keep[:, None, None, None]
    state = tuple(jnp.where(keep, x, 0.0) for x in state)
    new = tuple(
      y + sum(_dot(p, x) for p, x in zip(row, state, strict=True))
      for y, row in zip(psi, phi, strict=True)
    )
    return new, state

  final, entering = jax.lax.scan(advance, state, (psi, phi, keep))
  return entering, final


def _outputs(omega, state):
  """Omega X: `[.., T, H, M, K]` and M arrays `[.., H, K, V]`."""
  return sum(
    jnp.einsum(
      "...thk,...hkv->...thv", omega[..., m, :], x, precision="highest"
    )
    for m, x in enumerate(state)
  )
