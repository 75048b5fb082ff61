"""SCALE: normalised gradients, momentum on the head only; and its ablations.

arXiv 2506.16659. For kernels (in, out) and embeddings (vocabulary, features)
the paper's two cases are one: divide by the root mean square over the first
of the two axes.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from optim import arguments, groups, matrices, numerics
from optim.low_rank import moments
from optim.normalized import norms

_NORMALIZATIONS = {
  "columns": norms.scale_by_column_norm,
  "rows": functools.partial(norms.scale_by_column_norm, axis=1),
  "sign": lambda: optax.stateless_with_tree_map(lambda g, p: numerics.sign(g)),
  "spectral": norms.scale_by_spectral_norm,
}

# What may have momentum; vectors have Adam's.
_MOMENTUM = ("matrix", "embedding", "head")


class MomentumState(NamedTuple):
  """State of what has momentum: the gradients' moving average.

  Attributes:
    momentum: a pytree like the parameters.
    count: int32, the updates so far.
  """

  momentum: optax.Updates
  count: jax.Array


class VectorState(NamedTuple):
  """State of the vectors: Adam's.

  Attributes:
    count: int32, the updates so far.
    mu: first moments, a pytree like the parameters.
    nu: second moments, the same.
    weights: sums of the weights in `mu` and `nu`, for the bias corrections.
  """

  count: jax.Array
  mu: optax.Updates
  nu: optax.Updates
  weights: moments.Weights


def _scale_by_adam(
  b1: optax.ScalarOrSchedule, b2: optax.ScalarOrSchedule, eps: Any
) -> optax.GradientTransformation:
  """Adam in float32; 0 where no gradient was yet, whatever `eps`."""

  def init(params):
    zeros = numerics.zeros_like(params)
    return VectorState(
      jnp.zeros((), jnp.int32),
      zeros,
      jax.tree.map(jnp.zeros_like, zeros),
      moments.no_weights(jax.tree.leaves(zeros)),
    )

  def update(updates, state, params=None):
    del params
    weights, decays = moments.weigh(state.weights, state.count, b1=b1, b2=b2)
    grads, treedef = jax.tree.flatten(updates)
    held = tuple(map(treedef.flatten_up_to, (state.mu, state.nu)))
    out, held = moments.adam(grads, held, weights, decays, eps=eps)
    return treedef.unflatten(out), VectorState(
      optax.safe_increment(state.count), *map(treedef.unflatten, held), weights
    )

  return optax.GradientTransformation(init, update)


def _scale_by_average(
  momentum: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
  """M ← momentum M + (1 - momentum) G in float32, without bias correction."""

  def init(params):
    return MomentumState(numerics.zeros_like(params), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    del params
    rate = arguments.value_at(momentum, state.count)
    average = jax.tree.map(
      lambda g, m: numerics.average(rate, m, g.astype(m.dtype)),
      updates,
      state.momentum,
    )
    return numerics.cast_like(average, updates), MomentumState(
      average, optax.safe_increment(state.count)
    )

  return optax.GradientTransformation(init, update)


@arguments.checked("column_normalized_sgd")
def column_normalized_sgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: optax.ScalarOrSchedule = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  vector_learning_rate: optax.ScalarOrSchedule | None = None,
  vector_b1: optax.ScalarOrSchedule = 0.9,
  vector_b2: optax.ScalarOrSchedule = 0.999,
  vector_eps: float = 1e-8,
  normalization: str = "columns",
  momentum_on: Sequence[str] = ("head",),
  matrix_axes: matrices.Spec = None,
  labels: labels_lib.Labels = None,
) -> optax.GradientTransformationExtraArgs:
  """SCALE (arXiv 2506.16659): SGD with normalised columns.

  With C dividing each column by its root mean square and lr, λ the learning
  rate and decay:
    "matrix", "embedding": W ← (1 - lr λ) W - lr C(G), no state;
    "head": M ← momentum M + (1 - momentum) G, W ← (1 - lr λ) W - lr C(M);
    "vector": Adam at `vector_learning_rate`, no decay.
  The published learning rates (1e-3 up to 350M parameters) are for this root
  mean square, not for the Euclidean norm.

  The paper's ablations are other C, with the same root mean square of 1 for
  the update, and momentum on other labels.

  Args:
    learning_rate: a value or a schedule.
    momentum: decay of the moving average, a value or a schedule.
    weight_decay: decoupled decay λ, a value or a schedule.
    weight_decay_mask: as for `muon`; vectors that it names decay too.
    vector_learning_rate: Adam's, a value or a schedule; default
      `learning_rate`. The paper's models take about 20 times that.
    vector_b1: Adam's first decay, a value or a schedule of the steps so far.
    vector_b2: Adam's second decay, the same.
    vector_eps: Adam's epsilon.
    normalization: C, with updates of the root mean square 1: "columns" and
      "rows" divide by the root mean square over the fan-in and the fan-out
      (`scale_by_column_norm`), "sign" keeps the sign of each entry,
      "spectral" is `scale_by_spectral_norm`, for embeddings and heads too.
    momentum_on: which of "matrix", "embedding" and "head" have momentum, and
      so a state as large as themselves: `()`, `("head",)`,
      `("embedding", "head")` and all three are the paper's.
    matrix_axes: as for `scale_by_column_norm`; "sign" has no use for it.
    labels: a pytree of labels or a function of the parameters giving one;
      default `label_params`. `optax.inject_hyperparams` takes functions for
      schedules: give it `static_args=("labels",)`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: an unknown `normalization` or label in `momentum_on`;
      `matrix_axes` with "sign"; as `label_params`.

  Warns:
    UserWarning: on init, where nothing has momentum though there is an
      embedding; without one, `logging` says so.
  """
  if normalization not in _NORMALIZATIONS:
    raise ValueError(
      f"normalization must be one of {tuple(_NORMALIZATIONS)}, got "
      f"{normalization!r}"
    )
  if isinstance(momentum_on, str) or not set(momentum_on) <= set(_MOMENTUM):
    raise ValueError(
      f"momentum_on must be a tuple of labels among {_MOMENTUM}, got "
      f"{momentum_on!r}"
    )

  normalize = _NORMALIZATIONS[normalization]
  if normalization != "sign":
    normalize = functools.partial(normalize, matrix_axes=matrix_axes)
  elif matrix_axes is not None:
    raise ValueError('matrix_axes has no effect with normalization="sign"')

  def group(params):
    kinds = {label: "plain" for label in _MOMENTUM}
    kinds |= dict.fromkeys(momentum_on, "averaged") | {"vector": "vector"}
    return jax.tree.map(kinds.get, labels_lib.resolve(labels, params))

  if vector_learning_rate is None:
    vector_learning_rate = learning_rate

  def build(mask):
    def step(*first):
      direction = optax.chain(*first, normalize())
      return groups.descent(direction, learning_rate, weight_decay, mask=mask)

    vector = groups.descent(
      _scale_by_adam(vector_b1, vector_b2, vector_eps),
      vector_learning_rate,
      0.0 if mask is None else weight_decay,
      mask=mask,
    )
    transforms = {
      "plain": step(),
      "averaged": step(_scale_by_average(momentum)),
      "vector": vector,
    }
    return optax.partition(
      {k: numerics.in_float32(tx) for k, tx in transforms.items()}, group
    )

  tx = groups.of_masks(build, weight_decay_mask)

  def init(params):
    if labels is None:
      _check_momentum(params, momentum_on)
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init, tx.update)


def _check_momentum(params: Any, momentum_on: Sequence[str]) -> None:
  """Says so where nothing has the momentum that is asked for."""
  kinds = set(jax.tree.leaves(labels_lib.resolve(None, params))) - {"vector"}
  if not kinds or not momentum_on or not kinds.isdisjoint(momentum_on):
    return
  message = (
    "column_normalized_sgd: no parameter is labelled "
    f"{' or '.join(map(repr, momentum_on))}, so nothing has momentum. Give "
    "labels=, or momentum_on=('embedding',) where the embedding is also the "
    "head, or momentum_on=() for none; optim.describe_labels prints all labels."
  )
  if "embedding" in kinds:
    warnings.warn(message, stacklevel=4)
  else:  # Part of a model, or one that may well have no head.
    logging.getLogger(__name__).warning(message)
