"""MeZO: training with forward passes only (Malladi et al., arXiv 2305.17333).

Algorithm 1 of the paper draws z into the parameters in place, twice, and
takes it out again; here the moved parameters are a value of their own, so
that they are what they were after a step in bfloat16 too. Beside the forward
pass a step needs room for one moved copy and for the random bits, which XLA's
CPU backend draws for all leaves at once (2.5 copies of the parameters in all
under JAX 0.10, 5.3 under 0.12), however many directions there are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim import arguments, groups, numerics
from optim.zeroth_order import spsa


def _in_params_dtype(
  inner: optax.GradientTransformation, method: str
) -> optax.GradientTransformationExtraArgs:
  """`inner`, whose updates are cast to the parameters' dtypes."""
  inner = arguments.of_floats(inner, method)

  def update(updates, state, params=None, **extra_args):
    updates, state = inner.update(updates, state, params, **extra_args)
    return numerics.cast_like(updates, params), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


@arguments.checked()
def scale_by_mezo(
  *, epsilon: float = 1e-3, num_samples: int = 1, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  """Replaces any updates by an estimate of the gradient from losses.

  With z_i standard normal, d_i = (L(θ + ε z_i) - L(θ - ε z_i)) / 2 ε and the
  update is mean_i d_i z_i, whose mean is the gradient. Its root mean square
  is about |d|, the slope along one direction: with one direction the norm of
  the gradient, √n times the gradient's own root mean square for n
  parameters.

  `update(updates, state, params, value_fn=...)` takes the loss as a function
  of the parameters, as optax's line searches do, and ignores `updates`; give
  it the parameters again. The loss should be float32 and must be the same
  function in all calls (one batch, no dropout, or dropout of one key). Inside
  `optax.masked` and `optax.partition` `value_fn` gets the masked tree;
  `optax.MultiSteps` averages updates, which are ignored, and hands on its last
  `value_fn`, so put several batches into one loss instead.

  Args:
    epsilon: ε. The slope's rounding error is about 2^-24 |L| / ε.
    num_samples: directions per step, each of two evaluations. Under
      `optax.inject_hyperparams` give it `static_args=("num_samples",)`.
    seed: of the directions, which depend on it, the step, the position of the
      leaf and that of the element only.

  Returns:
    A transformation with the state `SpsaState`; updates have the parameters'
    dtypes and the gradient's sign.

  Raises:
    ValueError: an argument out of range; on init, parameters that are not
      floating; on update, no `value_fn`, or one that gives no scalar.
  """
  return _in_params_dtype(
    spsa.scale_by_slopes(
      epsilon=epsilon, num_samples=num_samples, clip=None, seed=seed
    ),
    "MeZO",
  )


@arguments.checked()
def mezo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  epsilon: float = 1e-3,
  num_samples: int = 1,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """MeZO: θ ← θ - lr (mean_i d_i z_i + weight_decay θ), without gradients.

  See `scale_by_mezo` for the estimate, for `value_fn` and for the arguments.
  The paper fine-tunes with learning rates of 1e-7 to 1e-5 and takes 10 to 100
  times the steps of backpropagation; on a quadratic of n parameters the
  largest stable rate is num_samples / (n + num_samples + 1) times gradient
  descent's.

  Args:
    learning_rate: a value or a schedule.
    epsilon: as for `scale_by_mezo`.
    num_samples: as for `scale_by_mezo`.
    weight_decay: decoupled decay of all parameters, a value or a schedule.
    weight_decay_mask: which of them decay, as for `muon`.
    seed: as for `scale_by_mezo`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: a negative rate or decay, and as `scale_by_mezo`.
  """
  slopes = spsa.scale_by_slopes(
    epsilon=epsilon, num_samples=num_samples, clip=None, seed=seed
  )
  tx = groups.descent(
    slopes, learning_rate, weight_decay, mask=weight_decay_mask
  )
  return _in_params_dtype(tx, "MeZO")


def mezo_replay(
  params: Any,
  seed: int,
  slopes: Any,
  learning_rates: Any,
  *,
  weight_decay: Any = 0.0,
  start: int = 0,
) -> Any:
  """Repeats a run of `mezo` from its slopes: no data, no forward pass.

  A run is its first parameters, its seed and `num_samples` + 1 numbers per
  step (section 2.1 of the paper). The result equals the run's to the rounding
  that two compilations of one step may differ by.

  Args:
    params: the parameters before the first step to repeat.
    seed: that of the run.
    slopes: [steps, num_samples], `SpsaState.slopes` after each step.
    learning_rates: that of each step, or one for all.
    weight_decay: that of each step, or one for all.
    start: how many steps the run had taken before.

  Returns:
    The parameters after the last step.

  Raises:
    ValueError: `slopes` is not a matrix.
  """
  slopes = jnp.asarray(slopes, jnp.float32)
  if slopes.ndim != 2:
    raise ValueError(
      f"slopes must be [steps, num_samples], got {list(slopes.shape)}"
    )
  steps = slopes.shape[0]
  per_step = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (steps,))
  words = jax.random.key_data(jax.random.key(seed))

  def step(params, args):
    count, d, rate, decay = args
    found = spsa.direction(params, spsa.step_key(words, count), d)
    updates = jax.tree.map(
      lambda u, p: (-rate * (u + decay * p)).astype(p.dtype), found, params
    )
    return optax.apply_updates(params, updates), None

  counts = start + jnp.arange(steps)
  each = (counts, slopes, per_step(learning_rates), per_step(weight_decay))
  return jax.lax.scan(step, params, each)[0]
