"""QZO: fine-tuning of quantized models without gradients (arXiv 2505.13430).

The codes stay as they are and their scales Δ are trained. With z normal,
  d = (L((Δ + ε z) ⊙ codes) - L((Δ - ε z) ⊙ codes)) / 2 ε,
  Δ ← max(Δ - lr clip(d, -C, C) z, 0),
so that nothing but the codes, the scales and a few scalars is held. A release
draws z into the scales in place; here the moved scales are a value of their
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels, paths, quantization
from optim import apply, arguments, assembly, groups
from optim.zeroth_order import spsa


def _check(params: Any, train_unquantized: bool) -> None:
  arguments.check_arrays(params, "QZO")
  flat, _ = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=labels.is_param
  )
  quantized = [(p, x) for p, x in flat if quantization.is_qtensor(x)]
  if not quantized and not train_unquantized:
    raise ValueError(
      "params: QZO trains the scales of quantized tensors and there are none; "
      "pass the parameters through quantization.quantize_tree, or set "
      "train_unquantized=True"
    )
  for path, leaf in quantized:
    if leaf.scales.dtype != jnp.float32:
      raise ValueError(
        f"params: the leaf {paths.leaf_name(path)!r} has scales of "
        f"{leaf.scales.dtype} ({leaf.format}), too coarse for the steps of "
        "QZO; use a format with float32 scales, such as int4:32"
      )
  if train_unquantized:
    arguments.check_floating(_map(_unquantized, params), "QZO")


def _unquantized(param: Any) -> Any:
  return optax.MaskedNode() if quantization.is_qtensor(param) else param


def _map(f: Callable[..., Any], params: Any, *rest: Any) -> Any:
  return jax.tree.map(f, params, *rest, is_leaf=quantization.is_qtensor)


def _on_scales(
  build: Callable[[Any], optax.GradientTransformation],
  *,
  mask: groups.Mask = None,
  relative: bool,
  train_unquantized: bool,
  finish: Callable[[Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
  """Runs a transformation on what QZO trains, as a tree of float arrays.

  `build` gives it, for the mask of these parameters. With `relative`, the
  coordinates of a scale are its multiples.
  """

  def inner(params):
    found = groups.resolve_quantized_mask(mask, params)
    return optax.with_extra_args_support(build(found))

  def trained(param):
    # The scales of no entries would move the draws of the others.
    quantized = quantization.is_qtensor(param)
    return not assembly.is_empty(param) if quantized else train_unquantized

  def coordinates(param):
    if not trained(param):
      return optax.MaskedNode()
    if quantization.is_qtensor(param):
      return jnp.ones_like(param.scales) if relative else param.scales
    return param

  def scales(param, x):
    return param.scales * x if relative else x

  def insert(param, x):
    if not trained(param):
      return param
    if quantization.is_qtensor(param):
      return _with_scales(param, scales(param, x))
    return x

  def init(params):
    _check(params, train_unquantized)
    return inner(params).init(_map(coordinates, params))

  def update(updates, state, params=None, *, value_fn=None, **extra_args):
    if params is None:
      raise ValueError("params: the update needs the parameters, got None")
    at = None
    if value_fn is not None:
      at = lambda tree: value_fn(_map(insert, params, tree))
    tree = _map(coordinates, params)
    steps, state = inner(params).update(
      tree, state, tree, value_fn=at, **extra_args
    )
    del updates

    def leaf(param, step):
      if quantization.is_qtensor(param):
        if trained(param):
          return finish(param, scales(param, step))
        return finish(param, jnp.zeros_like(param.scales))
      return (
        step.astype(param.dtype) if trained(param) else jnp.zeros_like(param)
      )

    return _map(leaf, params, steps), state

  return optax.GradientTransformationExtraArgs(init, update)


def _with_scales(
  param: quantization.QTensor, scales: jax.Array
) -> quantization.QTensor:
  return dataclasses.replace(param, scales=scales)


@arguments.checked()
def scale_by_qzo(
  *,
  epsilon: float = 1e-3,
  clip: float | None = 100.0,
  relative: bool = False,
  num_samples: int = 1,
  train_unquantized: bool = False,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Replaces any updates by an estimate of the gradient of the scales.

  `update(updates, state, params, value_fn=...)`, where `value_fn` takes
  parameters with `QTensor`s in them, ignores `updates`. For the rest see
  `scale_by_mezo`.

  Args:
    epsilon: ε. Scales of int4 weights are of the size 1e-2, so that the
      paper's 1e-3 moves them by a tenth, each group by its own: `relative`,
      or less, for models that this harms.
    clip: C, the bound on each slope (the paper's 100), or None. Without it
      one bad batch may end a run.
    relative: whether a scale is moved by ε z times itself. The step is then
      that of gradient descent on the scale's logarithm, to first order:
      Δ ← Δ max(1 - lr d z, 0), and learning rates are relative as well. The
      published method is not.
    num_samples: as for `scale_by_mezo`.
    train_unquantized: whether the arrays beside the `QTensor`s (norms,
      embeddings) are trained too, by MeZO with the same slope.
    seed: as for `scale_by_mezo`.

  Returns:
    A transformation with the state `SpsaState`. The update of a `QTensor` is
    a float32 array like its scales, that of an array is like it, zero unless
    it is trained; all keep the gradient's sign.

  Raises:
    ValueError: an argument out of range; on init, scales of a narrower format
      than float32, nothing to train, or unquantized parameters to be trained
      that are not floating; on update, no `value_fn`.
  """
  slopes = spsa.scale_by_slopes(
    epsilon=epsilon, num_samples=num_samples, clip=clip, seed=seed
  )
  return _on_scales(
    lambda mask: slopes,
    relative=relative,
    train_unquantized=train_unquantized,
    finish=lambda param, step: step,
  )


@arguments.checked()
def qzo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  epsilon: float = 1e-3,
  clip: float | None = 100.0,
  relative: bool = False,
  num_samples: int = 1,
  train_unquantized: bool = False,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """QZO: Δ ← max(Δ - lr (d z + weight_decay Δ), 0), the codes fixed.

  The update of a `QTensor` is the new `QTensor`, to be applied by
  `optim.apply_updates`, that of an array is to be added. See `scale_by_qzo`.
  The paper fine-tunes models of 4 bits with a learning rate of 1e-5.

  Args:
    learning_rate: a value or a schedule.
    epsilon: as for `scale_by_qzo`.
    clip: as for `scale_by_qzo`.
    relative: as for `scale_by_qzo`.
    num_samples: as for `scale_by_qzo`.
    train_unquantized: as for `scale_by_qzo`.
    weight_decay: decoupled decay of all that is trained, a value or a
      schedule; that of a scale decays its weights.
    weight_decay_mask: which of them decay, as for `eco`.
    seed: as for `scale_by_mezo`.

  Returns:
    The transformation.

  Raises:
    ValueError: a negative rate or decay, and as `scale_by_qzo`.
  """
  slopes = spsa.scale_by_slopes(
    epsilon=epsilon, num_samples=num_samples, clip=clip, seed=seed
  )
  return _on_scales(
    lambda mask: groups.descent(slopes, learning_rate, weight_decay, mask=mask),
    mask=weight_decay_mask,
    relative=relative,
    train_unquantized=train_unquantized,
    finish=lambda param, step: apply.Replacement.of(
      _with_scales(param, jnp.maximum(param.scales + step, 0))
    ),
  )
