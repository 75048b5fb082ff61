"""Slopes of a loss along random directions, and the gradient they estimate.

Simultaneous perturbation (Spall, 1992), with normal directions:
  d_i = (L(θ + ε z_i) - L(θ - ε z_i)) / 2 ε,   g = mean_i d_i z_i,
whose mean over z ~ N(0, I) is the gradient, to second order in ε. Directions
are drawn again from a key wherever they are needed and never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import meshes
from optim import assembly, numerics


class SpsaState(NamedTuple):
  """State of the methods without gradients: some scalars.

  Attributes:
    count: int32, steps taken.
    key: uint32 words of the PRNG key that every step's directions come from.
    slopes: float32 [num_samples], d_i of the last step. They, the seed and
      the learning rates are all that is needed to repeat a run.
  """

  count: jax.Array
  key: jax.Array
  slopes: jax.Array


def step_key(key: jax.Array, count: jax.Array) -> jax.Array:
  """The key of a step's directions, from a state's `key` and `count`."""
  return jax.random.fold_in(jax.random.wrap_key_data(key), count)


def _map_normals(f: Callable[..., jax.Array], key: jax.Array, tree: Any) -> Any:
  """f(leaf, z) of each leaf, z standard normal in at least float32.

  One leaf after another, lest all directions are drawn before the first is
  used. Leaves without entries do not count.
  """
  leaves, treedef = jax.tree.flatten(tree)
  places = assembly.places(leaves)
  keys = jax.random.split(key, max([1 + place for place in places], default=1))
  out = []
  for place, x in zip(places, leaves, strict=True):
    dtype = numerics.at_least_float32(x.dtype)
    if assembly.is_empty(x):
      out.append(f(x, x.astype(dtype)))
    else:
      where = jax.typeof(x).sharding if meshes.explicit_mesh(x) else None
      z = jax.random.normal(keys[place], x.shape, dtype, out_sharding=where)
      out.append(f(x, z))
  return treedef.unflatten(out)


def measure_slopes(
  value_fn: Callable[[Any], jax.Array],
  params: Any,
  key: jax.Array,
  epsilon: jax.Array | float,
  num_samples: int,
) -> jax.Array:
  """d_i along `num_samples` directions, in 2 `num_samples` evaluations.

  Args:
    value_fn: the loss at a pytree like `params`, a real scalar.
    params: pytree of floating arrays. They are moved in at least float32 and
      then have their own dtype again.
    key: of the step.
    epsilon: how far to go to either side.
    num_samples: how many directions.

  Returns:
    float32 (or wider, as the loss is) [num_samples].

  Raises:
    ValueError: `value_fn` gives something else.
  """

  def value(args):
    sample, sign = args
    loss = value_fn(
      _map_normals(
        lambda p, z: (p + sign * epsilon * z).astype(p.dtype),
        jax.random.fold_in(key, sample),
        params,
      )
    )
    if jnp.shape(loss) or not jnp.issubdtype(loss.dtype, jnp.floating):
      raise ValueError(
        "value_fn must give a real scalar, the loss, got "
        f"{jax.tree.map(jax.typeof, loss)}"
      )
    return loss.astype(numerics.at_least_float32(loss.dtype))

  # A loop: both sides at once would be two copies of the parameters. The
  # direction is drawn from what the loop counts, so that no compiler keeps it
  # from one side to the other.
  samples = jnp.repeat(jnp.arange(num_samples), 2)
  signs = jnp.tile(jnp.array([1.0, -1.0], jnp.float32), num_samples)
  values = jax.lax.map(value, (samples, signs))
  return (values[0::2] - values[1::2]) / (2 * epsilon)


def direction(params: Any, key: jax.Array, slopes: jax.Array) -> Any:
  """mean_i slopes[i] z_i, in at least float32.

  Args:
    params: what `measure_slopes` was given, or anything of such leaves.
    key: what it was given.
    slopes: [num_samples].
  """

  n = slopes.size
  if n == 1:
    return _map_normals(
      lambda _, z: slopes[0].astype(z.dtype) * z,
      jax.random.fold_in(key, 0),
      params,
    )

  def add(total, args):
    sample, slope = args
    add_one = lambda t, z: t + slope.astype(z.dtype) * z
    return _map_normals(add_one, jax.random.fold_in(key, sample), total), None

  zeros = numerics.zeros_like(params)
  total, _ = jax.lax.scan(add, zeros, (jnp.arange(n), slopes))
  return jax.tree.map(lambda x: x / n, total)


def scale_by_slopes(
  *, epsilon: float, num_samples: int, clip: float | None, seed: int
) -> optax.GradientTransformationExtraArgs:
  """Replaces any updates by the estimate of the gradient, in float32.

  Args:
    epsilon: ε.
    num_samples: directions per step.
    clip: bound on the size of each d_i, or None.
    seed: of the directions.

  Returns:
    A transformation with the state `SpsaState` whose `update` needs
    `value_fn` and the parameters; its updates are in at least float32.

  Raises:
    ValueError: on update, no `value_fn`.
  """

  def init(params):
    del params
    return SpsaState(
      count=jnp.zeros((), jnp.int32),
      key=jax.random.key_data(jax.random.key(seed)),
      slopes=jnp.zeros((num_samples,), jnp.float32),
    )

  def update(updates, state, params=None, *, value_fn=None, **extra_args):
    del updates, extra_args
    if params is None:
      raise ValueError("params: the update needs the parameters, got None")
    if value_fn is None:
      raise ValueError(
        "value_fn: the update needs the loss as a function of the parameters, "
        "tx.update(updates, state, params, value_fn=...)"
      )
    key = step_key(state.key, state.count)
    slopes = measure_slopes(value_fn, params, key, epsilon, num_samples)
    slopes = slopes.astype(jnp.float32)
    if clip is not None:
      slopes = jnp.clip(slopes, -clip, clip)
    count = optax.safe_increment(state.count)
    new_state = SpsaState(count, state.key, slopes)
    return direction(params, key, slopes), new_state

  return optax.GradientTransformationExtraArgs(init, update)
