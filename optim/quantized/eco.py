"""ECO: training quantized parameters without a float copy of them.

The rounding error of each step goes into the momentum, with the one factor
that keeps it out of the trajectory altogether (Nikdan et al., arXiv
2601.22101). The momentum is kept in units of the weights, so no step divides
by a learning rate. Per matrix, with ρ_t = 1 - η_t λ:

  u' = β_t u + (1 - β_t) η_t Δ       Δ: the inner transformation's direction
  θ~ = ρ_t θ - u'                    what the new weights should be
  θ  <- Q(θ~)
  u  <- u' - (θ~ - Q(θ~)) / c_{t+1}

where c_t, the horizon, is how far one unit of u_t will move the weights in
all steps to come: c_t = β_t (1 + c_{t+1}) / ρ_t, and c = β / (ρ - β) where
both are constant. Then z_t = θ_t - c_t u_t, where the weights would come to
rest were there no more gradients, obeys

  z_{t+1} = ρ_t z_t - (1 + c_{t+1}) (1 - β_t) η_t Δ_t

in which no rounding error appears: the recursion of unquantized training.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import paths, quantization, trees
from optim import apply, arguments, assembly, groups, matrices, numerics

_ROUNDINGS = ("stochastic", "nearest")
_MAX_LOOK_AHEAD = 4096


class EcoState(NamedTuple):
  """State of `eco`.

  Attributes:
    count: int32, steps taken.
    key: uint32 words of the PRNG key that every step's keys come from.
    horizon: float32, c_count; 0 if rounding to nearest, where z is not to be
      exported. With a `weight_decay_mask` a pytree of such like `u`.
    u: float32 momentum of each matrix, in units of the weights;
      `optax.MaskedNode` elsewhere.
    inner: state of the inner transformation, over the matrices.
    fallback: state of the fallback, over everything else.
  """

  count: jax.Array
  key: jax.Array
  horizon: Any
  u: Any
  inner: Any
  fallback: Any


def _concrete(x: Any) -> float | None:
  """The Python number, or None for a schedule or a traced value."""
  return None if callable(x) or _is_traced(x) else float(x)


def _is_traced(x: Any) -> bool:
  return isinstance(x, jax.core.Tracer)


def _is_abstract(x: Any) -> bool:
  return isinstance(x, jax.ShapeDtypeStruct)


def _check(learning_rate, momentum, weight_decay, rounding) -> None:
  if rounding not in _ROUNDINGS:
    raise ValueError(f"rounding: got {rounding!r}; allowed: {_ROUNDINGS}")
  beta = _concrete(momentum)
  if beta is None:
    return
  if not 0 < beta < 1:
    raise ValueError(
      f"momentum must be inside (0, 1), got {beta}: it carries the rounding "
      "errors from one step to the next"
    )
  if rounding == "nearest" and beta > 0.9:
    warnings.warn(
      f'rounding="nearest" with momentum={beta} > 0.9: a weight stays where it '
      f"is until it should have moved {0.5 / (1 - beta):.3g} grid steps; use "
      '"stochastic" or a momentum of at most 0.9',
      stacklevel=3,
    )
  rate, decay = _concrete(learning_rate), _concrete(weight_decay)
  if rate is not None and decay is not None and rate * decay >= 1 - beta:
    raise ValueError(
      "learning_rate * weight_decay must be less than 1 - momentum, got "
      f"{rate} * {decay} and momentum={beta}: the decay would outrun it"
    )


def _horizon(learning_rate, momentum, weight_decay, count) -> jax.Array:
  """c_count = sum over k >= 1 of the first k factors β / ρ from there on."""
  if _concrete(weight_decay) == 0:
    learning_rate = 0.0
  every = (momentum, learning_rate, weight_decay)
  known = _concrete(momentum)
  terms = 1
  if any(map(callable, every)):
    # Until β^k is lost in float32, or all is taken as constant.
    terms = _MAX_LOOK_AHEAD
    if known is not None:
      terms = min(terms, math.ceil(24 / -math.log2(known)))
  counts = count + jnp.arange(terms)
  beta, rate, decay = (
    jnp.asarray(
      jax.vmap(x)(counts) if callable(x) else jnp.full(terms, x), jnp.float32
    )
    for x in every
  )
  rho = 1 - rate * decay
  products = jnp.cumprod(beta / rho)
  rest = beta[-1] / (rho[-1] - beta[-1])
  if terms == 1:
    return rest
  return jnp.sum(products) + products[-1] * rest


def _roles(
  labels: labels_lib.Labels,
  matrix_axes: matrices.Spec,
  params: Any,
  strict: bool,
) -> Any:
  """Labels of the parameters, checked against which ones are quantized how.

  With `strict` False an unquantized matrix may be abstract: what
  `optax.MultiSteps` is initialised with.
  """
  roles = labels_lib.resolve(labels, params)

  def check(path, leaf, role):
    quantized = quantization.is_qtensor(leaf)
    known = strict or not (_is_abstract(leaf) or _is_traced(leaf))
    if role == "matrix" and not quantized and known:
      raise ValueError(
        f'params: {paths.leaf_name(path)!r} is labelled "matrix" but is not '
        "quantized; pass the parameters through quantization.quantize_tree, or "
        "give it another label"
      )
    if role != "matrix" and quantized:
      raise ValueError(
        f"params: {paths.leaf_name(path)!r} is a QTensor but is labelled "
        f'{role!r}; eco trains those labelled "matrix"'
      )

  jax.tree_util.tree_map_with_path(
    check, params, roles, is_leaf=quantization.is_qtensor
  )
  if matrix_axes is not None:
    _check_axes(trees.given(matrix_axes, params), _only(params, roles, True))
  return roles


def _check_axes(matrix_axes: Any, params: Any) -> None:
  """Refuses matrices that are quantized along other axes."""
  flat, _ = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=quantization.is_qtensor
  )
  wanted = matrices.resolve(matrix_axes, params, "ECO")
  for (path, leaf), axes in zip(flat, wanted, strict=True):
    want = matrices.from_last(axes, len(leaf.shape))
    if quantization.is_qtensor(leaf) and leaf.matrix_axes != want:
      has, want = (
        "the last two" if x is None else f"{x.inputs} and {x.outputs}"
        for x in (leaf.matrix_axes, want)
      )
      raise ValueError(
        f"matrix_axes of {paths.leaf_name(path)!r} must be those it is "
        f"quantized along, {has}, got {want}: give quantization.quantize_tree "
        "the same matrix_axes"
      )


def _only(tree: Any, roles: Any, wanted: bool) -> Any:
  """Keeps the leaves that are (are not) matrices; the rest are masked."""
  return jax.tree.map(
    lambda role, x: x if (role == "matrix") == wanted else optax.MaskedNode(),
    roles,
    tree,
  )


def _fallback(
  given: groups.Fallback,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: optax.ScalarOrSchedule,
  mask: Any,
  roles: Any,
) -> optax.GradientTransformationExtraArgs:
  rest = groups.others(given, learning_rate, weight_decay, mask)
  kinds = jax.tree.map(rest.group, _only(roles, roles, False))
  return optax.partition(rest.transforms, kinds)


def _step(
  params: Any,
  weights: Any,
  momenta: Any,
  directions: Any,
  *,
  momentum: jax.Array,
  rate: jax.Array,
  rho: Any,
  horizon: Any,
  key: jax.Array | None,
) -> tuple[Any, Any]:
  """The new quantized matrices and momenta, by the module's equations."""
  leaves, treedef = jax.tree.flatten(params, is_leaf=quantization.is_qtensor)
  rest = (weights, momenta, directions, rho, horizon)
  rest = map(treedef.flatten_up_to, rest)
  new, carried = [], []
  for place, leaf, theta, u, delta, r, c in zip(
    assembly.places(leaves), leaves, *rest, strict=True
  ):
    u = momentum * u + (1 - momentum) * rate * delta.astype(u.dtype)
    target = r * theta - u
    leaf_key = None if key is None else jax.random.fold_in(key, place)
    q = quantization.quantize(
      target, leaf.format, key=leaf_key, matrix_axes=leaf.matrix_axes
    )
    new.append(q)
    # Where the next momentum is 0, nothing carries the error.
    error = (target - q.dequantize()) / jnp.where(c > 0, c, jnp.inf)
    carried.append(u - error)
  return treedef.unflatten(new), treedef.unflatten(carried)


def _initial(
  params: Any,
  roles: Any,
  inner: optax.GradientTransformation,
  other: optax.GradientTransformation,
  seed: int,
  masked: bool,
) -> EcoState:
  # Zeros like the codes are divided among devices as they are.
  u = jax.tree.map(
    lambda x: jnp.zeros_like(getattr(x, "codes", x), dtype=jnp.float32),
    _only(params, roles, True),
    is_leaf=quantization.is_qtensor,
  )
  others = jax.tree.map(
    lambda x: jnp.zeros_like(x) if _is_abstract(x) else x,
    _only(params, roles, False),
  )
  return EcoState(
    count=jnp.zeros((), jnp.int32),
    key=jax.random.key_data(jax.random.key(seed)),
    horizon=(
      jax.tree.map(lambda _: jnp.zeros((), jnp.float32), u)
      if masked
      else jnp.zeros((), jnp.float32)
    ),
    u=u,
    inner=inner.init(u),
    fallback=other.init(others),
  )


@arguments.checked()
def eco(
  learning_rate: optax.ScalarOrSchedule,
  *,
  inner: optax.GradientTransformation | None = None,
  momentum: optax.ScalarOrSchedule = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  rounding: str = "stochastic",
  seed: int = 0,
  matrix_axes: matrices.Spec = None,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum SGD, or momentum over `inner`, on quantized matrices.

  `update(grads, state, params)` takes float gradients of the dequantized
  parameters. The update of a quantized matrix is its new `QTensor`, to be
  applied by `optim.apply_updates`; that of any other leaf is to be added.
  The gradients can be clipped before in an `optax.chain`; nothing but a
  wrapper that selects or zeroes updates may come after. Under
  `optax.inject_hyperparams` pass `hyperparam_dtype=jnp.float32`, and
  functions other than schedules, such as `labels`, in `static_args`.
  `optax.MultiSteps` accumulates float gradients, so initialise it with
  `jax.eval_shape(quantization.dequantize_tree, params)`; to skip steps with
  bad gradients use its `should_skip_update_fn`, as `optax.apply_if_finite`
  requires updates to be like gradients.

  Exact for any schedules of the rate, the momentum and the weight decay: c_t
  looks ahead along them. A traced value is taken to stay.

  Args:
    learning_rate: a value or a schedule.
    inner: a momentum-free transformation that gives the direction from the
      gradients, such as `optax.scale_by_rms()`; None for the gradients
      themselves.
    momentum: β, inside (0, 1), a value or a schedule. Where a schedule gives
      0, the errors of the step before are lost.
    weight_decay: λ, decoupled, a value or a schedule; the fallback's too,
      "vector" leaves excepted.
    weight_decay_mask: as for `muon`; a function gets the parameters as if
      they were not quantized, without values.
    rounding: "stochastic", or "nearest", which does not move a weight before
      it should have moved by half a grid step / (1 - β).
    seed: of the random bits of stochastic rounding, which depend on it, the
      step, the position of the leaf and that of the element only.
    matrix_axes: what `quantization.quantize_tree` was given, to be compared
      with the axes along which each matrix is quantized; None takes those. An
      `inner` with matrices of its own needs the argument as well.
    labels: as for `jaxlib_ext.labels.resolve`.
    fallback: as for `muon`.

  Returns:
    The transformation, with an `EcoState`.

  Raises:
    ValueError: an argument out of range; at init and update, a matrix that is
      not quantized or is quantized along other axes, or a quantized leaf that
      is not labelled "matrix".
  """
  _check(learning_rate, momentum, weight_decay, rounding)
  inner = optax.with_extra_args_support(inner or optax.identity())
  stochastic = rounding == "stochastic"

  def init(params):
    arguments.check_arrays(params, "ECO")
    roles = _roles(labels, matrix_axes, params, strict=False)
    mask = groups.resolve_quantized_mask(weight_decay_mask, params)
    other = _fallback(fallback, learning_rate, weight_decay, mask, roles)
    return _initial(params, roles, inner, other, seed, mask is not None)

  def update(grads, state, params=None, **extra_args):
    if params is None:
      raise ValueError("params: eco.update needs the parameters, got None")
    roles = _roles(labels, matrix_axes, params, strict=True)
    mask = groups.resolve_quantized_mask(weight_decay_mask, params)
    other = _fallback(fallback, learning_rate, weight_decay, mask, roles)
    updates, fallback_state = other.update(
      _only(grads, roles, False),
      state.fallback,
      _only(params, roles, False),
      **extra_args,
    )
    old = _only(params, roles, True)
    weights = quantization.dequantize_tree(old)
    direction, inner_state = inner.update(
      numerics.cast_like(_only(grads, roles, True), state.u),
      state.inner,
      weights,
      **extra_args,
    )

    count = optax.safe_increment(state.count)
    beta, rate, decay = (
      jnp.asarray(arguments.value_at(x, state.count), jnp.float32)
      for x in (momentum, learning_rate, weight_decay)
    )
    horizon = _horizon(learning_rate, momentum, weight_decay, count)
    decaying = (1 - rate * decay, horizon)
    still = (jnp.ones_like(rate), _horizon(0.0, momentum, 0.0, count))
    which = jax.tree.map(lambda _: True, roles) if mask is None else mask
    rho, horizons = (
      jax.tree.map(
        lambda d, i=i: (decaying if d else still)[i], _only(which, roles, True)
      )
      for i in range(2)
    )
    if mask is not None:
      horizon = horizons
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)

    quantized, u = _step(
      old,
      weights,
      state.u,
      direction,
      momentum=beta,
      rate=rate,
      rho=rho,
      horizon=horizons,
      key=key if stochastic else None,
    )
    updates = jax.tree.map(
      lambda role, new, update: (
        apply.Replacement.of(new) if role == "matrix" else update
      ),
      roles,
      quantized,
      updates,
    )
    return updates, EcoState(
      count=count,
      key=state.key,
      horizon=horizon if stochastic else state.horizon,
      u=u,
      inner=inner_state,
      fallback=fallback_state,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def eco_flush(params: Any, state: Any) -> Any:
  """The parameters to export: the nearest rounding of z = θ - c u.

  Stochastic rounding leaves each weight some grid steps' noise around z, and
  the momentum remembers how much. The result is for use, not for training on
  with `state`. A run that rounds to nearest lags behind z by a multiple of
  the grid step, and is returned as it is.

  Args:
    params: parameters that `eco` trains.
    state: its state, or one that has it inside.

  Returns:
    A pytree like `params`.

  Raises:
    ValueError: there is no `EcoState` in `state`, or more than one.
  """
  is_state = lambda x: isinstance(x, EcoState)
  found = [s for s in jax.tree.leaves(state, is_leaf=is_state) if is_state(s)]
  if len(found) != 1:
    raise ValueError(f"state must hold one EcoState, got {len(found)}")
  (state,) = found

  def flush(param, u, horizon):
    if not quantization.is_qtensor(param):
      return param
    z = param.dequantize() - horizon * u
    return quantization.quantize(z, param.format, matrix_axes=param.matrix_axes)

  horizons = state.horizon
  if jax.tree_util.all_leaves([horizons]):
    horizons = jax.tree.map(lambda _: state.horizon, state.u)
  return jax.tree.map(
    flush, params, state.u, horizons, is_leaf=quantization.is_qtensor
  )
