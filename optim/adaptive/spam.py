"""SPAM: Adam that clips spikes and forgets its moments now and then.

arXiv 2501.06842, Algorithm 1.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import paths
from optim import arguments, assembly, groups, numerics
from optim.adaptive import moments

# The warm-up after a reset begins at 1 minus this share of the update.
_DAMPED = 0.99


class SpamState(NamedTuple):
  """State of `scale_by_spam`.

  Attributes:
    count: int32, the steps so far.
    mu_weight: float32, the sum of the weights of the gradients in `mu`.
    nu_weight: the same for `nu`.
    key: uint32 words of the PRNG key that sparse moments are placed by.
    mu: the gradients' moving average, a pytree like the parameters; of a leaf
      with sparse moments an array of one dimension, the moments of its
      entries of this interval.
    nu: the same for their squares.
  """

  count: jax.Array
  mu_weight: jax.Array
  nu_weight: jax.Array
  key: jax.Array
  mu: optax.Updates
  nu: optax.Updates


@arguments.checked("SPAM")
def scale_by_spam(
  *,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  threshold: float = 5000.0,
  reset_every: int = 500,
  warmup: int = 150,
  grace: int = 20,
  restart_bias_correction: bool = True,
  density: float | None = None,
  seed: int = 0,
  labels: labels_lib.Labels = None,
) -> optax.GradientTransformation:
  """Adam with spike clipping, momentum resets and, if wanted, sparse moments.

  With n steps since the last reset (or the start) and v as it was before the
  step and without bias correction, entry by entry:
  1. n = 0: m ← 0, v ← 0;
  2. n >= grace and g² > threshold v > 0: g ← sign(g) sqrt(threshold v), also
     of an infinite g;
  3. m, v ← the moving averages of g and g²;
  4. update = (1 - c) m̂ / (sqrt(v̂) + eps), with c falling from 0.99 to 0 as a
     half cosine over the `warmup` steps after a reset, and 0 before the first.
  Like Adam's, the update's root mean square is of the order of 0.2 to 1.

  A gradient beyond 2^48 = 2.8e14 counts as that, so that v is finite; as with
  Adam, the steps of such an entry are small until v has decayed, or up to the
  next reset.

  The bias correction starts again at a reset. In the release it does not, so
  that right after one the update is about 3.2 sign(g) (sqrt(0.1² / 0.001))
  before step 4 damps it: `restart_bias_correction=False`, which the paper's
  figures are for. The release counts steps from 1, so that its first interval
  (and grace) is one step shorter; it adds `eps` before the bias correction,
  and its warm-up, which starts with the reset as here, is one step of warmup
  + 1 ahead of c. The release also takes away, by step 2, the gradients of
  entries that have had none since the reset, such as the embeddings of rare
  tokens; here an estimate of 0 is none.

  Sparse moments: of a leaf labelled "matrix" with N entries only ⌊density N⌋
  are updated and have moments until the next reset, when others are chosen.
  The leaf is divided, from a random place on, into as many stretches of equal
  length, and a random entry of each is chosen, every entry with the same
  probability; the choice is computed anew each step from the key, so the
  moments are all that is stored; `sharding.state_shardings` does not divide
  them, for they have one dimension.

  Args:
    b1: decay of m, a value or a schedule of the steps so far.
    b2: decay of v, the same.
    eps: Adam's epsilon.
    threshold: θ, how many times v a squared gradient may be; 0 does not clip.
    reset_every: ΔT, steps from one reset to the next; 0 is never.
    warmup: steps of damping after each reset; 0 is none.
    grace: steps after each reset and at the start in which nothing is clipped.
    restart_bias_correction: whether a reset starts the bias correction again.
    density: None for all entries, or in (0, 1]. `optax.inject_hyperparams`
      needs it among its `static_args`.
    seed: of the choice of entries.
    labels: as for the factories, which leaves are sparse by `density`.

  Returns:
    A transformation with the state `SpamState`; updates have the gradients'
    shapes and dtypes and keep their sign.

  Raises:
    ValueError: an argument out of range; on init, with a `density`, a matrix
      of 2³¹ or more entries.
  """

  def zeros(path, p, label):
    dtype = numerics.at_least_float32(p.dtype)
    if label != "matrix":
      return jnp.zeros_like(p, dtype=dtype)
    if p.size > jnp.iinfo(jnp.int32).max:
      raise ValueError(
        f"density: the leaf {paths.leaf_name(path)!r} has {p.size} entries; "
        "sparse moments are for fewer than 2**31"
      )
    return jnp.zeros(max(1, math.floor(density * p.size)), dtype)

  def init(params):
    if density is None:
      tree = numerics.zeros_like(params)
    else:
      kinds = labels_lib.resolve(labels, params)
      tree = jax.tree_util.tree_map_with_path(zeros, params, kinds)
    return SpamState(
      count=jnp.zeros((), jnp.int32),
      mu_weight=jnp.zeros((), jnp.float32),
      nu_weight=jnp.zeros((), jnp.float32),
      key=jax.random.key_data(jax.random.key(seed)),
      mu=tree,
      nu=jax.tree.map(jnp.zeros_like, tree),
    )

  def update(updates, state):
    since, resets = moments.since_reset(state.count, reset_every)
    fresh = since == 0
    keep = lambda x: jnp.where(fresh, 0, x)
    mu_weight, nu_weight = state.mu_weight, state.nu_weight
    if restart_bias_correction:
      mu_weight, nu_weight = keep(mu_weight), keep(nu_weight)
    first, second = (arguments.value_at(b, state.count) for b in (b1, b2))
    mu_weight = numerics.average(first, mu_weight, 1)
    nu_weight = numerics.average(second, nu_weight, 1)
    clips = (since >= grace) & (jnp.asarray(threshold) > 0)
    damping = _damping(since, resets, warmup)

    def dense(g, m, v):
      m, v = keep(m), keep(v)
      limit = jnp.sqrt(threshold * v)
      spike = clips & (v > 0) & (jnp.abs(g) > limit)
      g = jnp.where(spike, jnp.sign(g) * limit, g)
      m, v = numerics.average(first, m, g), numerics.average(second, v, g * g)
      u = (m / mu_weight) / numerics.nonzero(jnp.sqrt(v / nu_weight) + eps)
      return damping * u, m, v

    flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), resets)
    out, mu, nu = [], [], []
    for (path, g), m, v in zip(
      flat,
      treedef.flatten_up_to(state.mu),
      treedef.flatten_up_to(state.nu),
      strict=True,
    ):
      wide = numerics.limited(g.astype(m.dtype), ())
      if m.shape == g.shape:
        u, m, v = dense(wide, m, v)
      else:
        # By the name: a leaf's choice does not depend on what is masked.
        name = zlib.crc32(paths.leaf_name(path).encode())
        chosen = _entries(jax.random.fold_in(key, name), g.size, m.size)
        u, m, v = dense(wide.reshape(-1)[chosen], m, v)
        u = jnp.zeros(g.size, m.dtype).at[chosen].set(u, unique_indices=True)
      out.append(u.reshape(g.shape).astype(g.dtype))
      mu.append(m)
      nu.append(v)
    return treedef.unflatten(out), SpamState(
      count=optax.safe_increment(state.count),
      mu_weight=mu_weight,
      nu_weight=nu_weight,
      key=state.key,
      mu=treedef.unflatten(mu),
      nu=treedef.unflatten(nu),
    )

  return assembly.direction(init, update)


def _damping(since: jax.Array, resets: jax.Array, warmup: Any) -> jax.Array:
  """The share of the update that the warm-up after a reset lets through."""
  done = since / jnp.maximum(warmup, 1)
  left = _DAMPED * 0.5 * (1 + jnp.cos(jnp.pi * done))
  return jnp.where((resets > 0) & (since < warmup), 1 - left, 1.0)


def _entries(key: jax.Array, size: int, count: int) -> jax.Array:
  """`count` distinct random indices below `size`, int32, each as likely."""
  length, longer = divmod(size, count)
  place_key, shift_key = jax.random.split(key)
  stretch = jnp.arange(count, dtype=jnp.int32)
  lengths = jnp.where(stretch < longer, length + 1, length)
  starts = stretch * length + jnp.minimum(stretch, longer)
  index = starts + jax.random.randint(place_key, (count,), 0, lengths)
  shift = jax.random.randint(shift_key, (), 0, size)
  # Modulo the size, without the sum that may pass 2³¹.
  return jnp.where(
    index < size - shift, index + shift, index - (size - shift)
  ).astype(jnp.int32)


@arguments.checked()
def spam(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  threshold: float = 5000.0,
  reset_every: int = 500,
  warmup: int = 150,
  grace: int = 20,
  restart_bias_correction: bool = True,
  density: float | None = None,
  seed: int = 0,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
) -> optax.GradientTransformationExtraArgs:
  """SPAM for all parameters: W ← W - lr (`scale_by_spam` + weight_decay W).

  Args:
    learning_rate: a value or a schedule. The paper's are 8e-4 at 130M
      parameters and 4e-4 at 350M.
    b1: as for `scale_by_spam`.
    b2: as for `scale_by_spam`.
    eps: as for `scale_by_spam`.
    threshold: as for `scale_by_spam`.
    reset_every: as for `scale_by_spam`.
    warmup: as for `scale_by_spam`.
    grace: as for `scale_by_spam`.
    restart_bias_correction: as for `scale_by_spam`.
    density: as for `scale_by_spam`.
    seed: as for `scale_by_spam`.
    weight_decay: decoupled decay of everything not labelled "vector", of
      entries without moments too, a value or a schedule.
    weight_decay_mask: as for `muon`.
    cautious: whether entries decay only where the update shrinks them already
      (`add_cautious_decay`).
    labels: a pytree of labels or a function of the parameters giving one;
      default `label_params`. `optax.inject_hyperparams` takes functions for
      schedules: give it `static_args=("labels",)`.

  Returns:
    The transformation; updates are to be added to the parameters.

  Raises:
    ValueError: as `scale_by_spam` and `label_params`.
  """
  return groups.for_all(
    scale_by_spam(
      b1=b1,
      b2=b2,
      eps=eps,
      threshold=threshold,
      reset_every=reset_every,
      warmup=warmup,
      grace=grace,
      restart_bias_correction=restart_bias_correction,
      density=density,
      seed=seed,
      labels=labels,
    ),
    learning_rate,
    method="SPAM",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
  )
