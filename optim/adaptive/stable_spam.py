"""Stable-SPAM: Adam behind two adaptive clips, with momentum resets.

arXiv 2502.17055: AdaClip, AdaGN and MoRet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import trees
from optim import arguments, assembly, groups, matrices, numerics
from optim.adaptive import moments


class Weights(NamedTuple):
  """Sums of the weights in the moving averages so far, float32 scalars.

  Attributes:
    largest: in `StableSpamState.largest`.
    norm: in `norm`.
    norm_rms: in the squares under `norm_rms`.
    mu: in `mu`.
    nu: in `nu`.
  """

  largest: jax.Array
  norm: jax.Array
  norm_rms: jax.Array
  mu: jax.Array
  nu: jax.Array


class StableSpamState(NamedTuple):
  """State of `scale_by_stable_spam`.

  Attributes:
    count: int32, the steps so far.
    weights: for the bias corrections.
    largest: average of each tensor's largest absolute gradient; a pytree like
      the parameters with the tensors' axes of size 1, as the next two.
    norm: average of the norms after the first clip.
    norm_rms: the root of the average of their squares.
    mu: average of the gradients after both, a pytree like the parameters.
    nu: average of their squares.
  """

  count: jax.Array
  weights: Weights
  largest: optax.Updates
  norm: optax.Updates
  norm_rms: optax.Updates
  mu: optax.Updates
  nu: optax.Updates


@arguments.checked("Stable-SPAM")
def scale_by_stable_spam(
  *,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-8,
  clip_decay: optax.ScalarOrSchedule = 0.999,
  norm_b1: optax.ScalarOrSchedule = 0.7,
  norm_b2: optax.ScalarOrSchedule = 0.9,
  momentum_scale: optax.ScalarOrSchedule = 1.0,
  reset_every: int = 1000,
  matrix_axes: matrices.Spec = None,
  labels: labels_lib.Labels = None,
) -> optax.GradientTransformation:
  """Adam on gradients of bounded entries and normalised norm.

  Per tensor, all averages with bias correction and s = `momentum_scale`:
  1. AdaClip: h ← average of max |g|, by `clip_decay`; entries with |g| > h
     become g h / max |g|;
  2. AdaGN: a, r² ← averages of ‖g‖ by s `norm_b1` and of ‖g‖² by `norm_b2`;
     g ← (g / ‖g‖) (a / r);
  3. MoRet: m, v ← 0 before every `reset_every`-th step;
  4. Adam with the decays s `b1` and `b2`.
  After step 2 the scale of the gradient does not matter, whatever `eps`. Like
  Adam's, the update's root mean square is of the order of 0.2 to 1.

  A reset starts the bias corrections of m and v again and leaves those of
  steps 1 and 2 alone. The release counts all five with one counter, so that
  after a reset h is hundreds of times too large for a while, and applies the
  old moments once more; and its correction of a supposes a constant s. Its
  epsilon in a / r is not needed.

  A tensor is a matrix, embedding or head over its last two axes (or those of
  `matrix_axes`) or a vector over its last axis: the others (scan-stacked
  layers, experts) are a batch.

  Args:
    b1: decay of m, a value or a schedule of the steps so far.
    b2: decay of v, the same.
    eps: Adam's epsilon.
    clip_decay: decay of h, a value or a schedule of the steps so far.
    norm_b1: decay of a, γ₁, the same.
    norm_b2: decay of r², γ₂, the same.
    momentum_scale: s, a value or a schedule of the steps so far. The paper's
      falls from 1 to 0.5: `optax.cosine_decay_schedule(1.0, steps, 0.5)`.
    reset_every: steps from one reset to the next; 0 is never.
    matrix_axes: as for `scale_by_muon`, of the leaves not labelled "vector";
      blocks are not taken apart.
    labels: as for the factories.

  Returns:
    A transformation with the state `StableSpamState`; updates have the
    gradients' shapes and dtypes and keep their sign.

  Raises:
    ValueError: an argument out of range; on init or update, `matrix_axes` or
      labels that do not fit.
  """

  def init(params):
    wide = numerics.zeros_like(params)
    leaves, treedef = jax.tree.flatten(wide)
    axes = _tensor_axes(params, labels, matrix_axes, warn=True)
    # One array each: two that were one could not both be donated.
    per_tensor = lambda: treedef.unflatten(
      [
        jnp.sum(x, axis=over, keepdims=True)
        for x, over in zip(leaves, axes, strict=True)
      ]
    )
    return StableSpamState(
      count=jnp.zeros((), jnp.int32),
      weights=Weights(*(jnp.zeros((), jnp.float32) for _ in range(5))),
      largest=per_tensor(),
      norm=per_tensor(),
      norm_rms=per_tensor(),
      mu=wide,
      nu=jax.tree.map(jnp.zeros_like, wide),
    )

  def update(updates, state):
    since, _ = moments.since_reset(state.count, reset_every)
    keep = lambda x: jnp.where(since == 0, 0, x)
    scale, *decays = (
      arguments.value_at(x, state.count)
      for x in (momentum_scale, b1, b2, clip_decay, norm_b1, norm_b2)
    )
    first, second, of_largest, of_norm, of_square = decays
    old = state.weights
    weights = Weights(
      largest=numerics.average(of_largest, old.largest, 1),
      norm=numerics.average(of_norm * scale, old.norm, 1),
      norm_rms=numerics.average(of_square, old.norm_rms, 1),
      mu=numerics.average(first * scale, keep(old.mu), 1),
      nu=numerics.average(second, keep(old.nu), 1),
    )

    def one(g, over, largest, norm, norm_rms, m, v):
      g = g.astype(m.dtype)
      # 1.
      top = jnp.max(jnp.abs(g), axis=over, keepdims=True)
      largest = numerics.average(of_largest, largest, top)
      bound = largest / weights.largest
      g = jnp.where(jnp.abs(g) > bound, g * (bound / numerics.nonzero(top)), g)
      # 2. Relative to the largest entry, squares stay in range.
      top = jnp.minimum(top, bound)
      g = g / numerics.nonzero(top)
      length = jnp.sqrt(jnp.sum(g * g, axis=over, keepdims=True))
      norm = numerics.average(of_norm * scale, norm, length * top)
      norm_rms = _average_rms(of_square, norm_rms, length * top)
      ratio = (norm / weights.norm) / numerics.nonzero(
        norm_rms / jnp.sqrt(weights.norm_rms)
      )
      g = g / numerics.nonzero(length) * ratio
      # 3 and 4.
      m = numerics.average(first * scale, keep(m), g)
      v = numerics.average(second, keep(v), g * g)
      u = (m / weights.mu) / numerics.nonzero(jnp.sqrt(v / weights.nu) + eps)
      return u, largest, norm, norm_rms, m, v

    grads, treedef = jax.tree.flatten(updates)
    axes = _tensor_axes(updates, labels, matrix_axes)
    rest = [treedef.flatten_up_to(tree) for tree in state[2:]]
    found = [one(*args) for args in zip(grads, axes, *rest, strict=True)]
    out, *rest = (treedef.unflatten([f[i] for f in found]) for i in range(6))
    count = optax.safe_increment(state.count)
    new_state = StableSpamState(count, weights, *rest)
    return numerics.cast_like(out, updates), new_state

  return assembly.direction(init, update)


def _average_rms(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
  """sqrt(decay old² + (1 - decay) new²) without overflow or underflow."""
  size = numerics.nonzero(jnp.maximum(old, new))
  square = numerics.average(decay, (old / size) ** 2, (new / size) ** 2)
  return size * jnp.sqrt(square)


def _tensor_axes(
  tree: Any,
  labels: labels_lib.Labels,
  matrix_axes: matrices.Spec,
  *,
  warn: bool = False,
) -> list[tuple[int, ...]]:
  """For each leaf, the axes that one tensor of it goes over."""
  kinds = jax.tree.leaves(labels_lib.resolve(labels, tree))
  leaves, treedef = jax.tree.flatten(tree)
  spec = trees.given(matrix_axes, tree)
  of_matrices = treedef.unflatten(
    [
      optax.MaskedNode() if kind == "vector" or leaf.ndim < 2 else leaf
      for leaf, kind in zip(leaves, kinds, strict=True)
    ]
  )
  resolved = iter(matrices.resolve(spec, of_matrices, "Stable-SPAM", warn=warn))
  out = []
  for leaf, kind in zip(leaves, kinds, strict=True):
    if kind == "vector" or leaf.ndim < 2:
      out.append((-1,) if leaf.ndim else ())
    else:
      axes = next(resolved)
      out.append((*axes.inputs, *axes.outputs))
  return out


@arguments.checked()
def stable_spam(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-8,
  clip_decay: optax.ScalarOrSchedule = 0.999,
  norm_b1: optax.ScalarOrSchedule = 0.7,
  norm_b2: optax.ScalarOrSchedule = 0.9,
  momentum_scale: optax.ScalarOrSchedule = 1.0,
  reset_every: int = 1000,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
) -> optax.GradientTransformationExtraArgs:
  """Stable-SPAM for all: W ← W - lr (`scale_by_stable_spam` + weight_decay W).

  Args:
    learning_rate: a value or a schedule. The paper's is 4e-4 at 350M
      parameters.
    b1: as for `scale_by_stable_spam`.
    b2: as for `scale_by_stable_spam`.
    eps: as for `scale_by_stable_spam`.
    clip_decay: as for `scale_by_stable_spam`.
    norm_b1: as for `scale_by_stable_spam`.
    norm_b2: as for `scale_by_stable_spam`.
    momentum_scale: as for `scale_by_stable_spam`.
    reset_every: as for `scale_by_stable_spam`.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_stable_spam`.
    cautious: whether entries decay only where the update shrinks them already
      (`add_cautious_decay`).
    labels: a pytree of labels or a function of the parameters giving one;
      default `label_params`. `optax.inject_hyperparams` takes functions for
      schedules: give it `static_args=("labels",)`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_stable_spam` and `label_params`.
  """
  return groups.for_all(
    scale_by_stable_spam(
      b1=b1,
      b2=b2,
      eps=eps,
      clip_decay=clip_decay,
      norm_b1=norm_b1,
      norm_b2=norm_b2,
      momentum_scale=momentum_scale,
      reset_every=reset_every,
      matrix_axes=matrix_axes,
      labels=labels,
    ),
    learning_rate,
    method="Stable-SPAM",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
  )
