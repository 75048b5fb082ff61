"""Q-GaLore: GaLore with 8-bit weights and moments and a 4-bit projection.

Zhang et al., arXiv 2407.08296. The subspace of each matrix is recomputed less
and less often once it has stopped turning.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_ext import labels as labels_lib
from jaxlib_ext import quantization
from jaxlib_ext.quantization import rounding
from optim import apply, arguments, assembly, groups, matrices
from optim.low_rank import moments, projection

_QUEUE = 5
# Intervals stop doubling before they overflow.
_LONGEST = 2**30


class QuantizedArrays(NamedTuple):
  """The parts of `QTensor`s, each as a tree like the parameters.

  And not a tree of `QTensor`s: wrappers that keep a box for each parameter,
  as `flax.nnx.Optimizer` does, take one array in it.

  Attributes:
    codes: one array per leaf.
    scales: the same.
    matrix_scale: the same, or None where the format has none.
  """

  codes: Any
  scales: Any
  matrix_scale: Any

  @classmethod
  def of(
    cls, layout: projection.Layout, tensors: Sequence[quantization.QTensor]
  ) -> QuantizedArrays:
    """Packs one tensor per stack of the layout."""
    whole = [q.matrix_scale for q in tensors]
    return cls(
      layout.pack([q.codes for q in tensors]),
      layout.pack([q.scales for q in tensors]),
      None if any(x is None for x in whole) else layout.pack(whole),
    )

  def tensors(
    self, layout: projection.Layout, fmt: quantization.Format
  ) -> list[quantization.QTensor]:
    """Inverse of `of`."""
    codes, scales = layout.unpack(self.codes), layout.unpack(self.scales)
    whole = [None] * len(codes)
    if self.matrix_scale is not None:
      whole = layout.unpack(self.matrix_scale)
    return [
      quantization.QTensor(*parts, fmt)
      for parts in zip(codes, scales, whole, strict=True)
    ]


class QGaloreState(NamedTuple):
  """State of `scale_by_q_galore`, for matrices of sides S <= L and rank r.

  Attributes:
    count: int32, steps taken.
    key: uint32 words of the PRNG key for rounding at random.
    projector: bases, r S codes per matrix.
    mu: first moments, r L codes.
    root: the square roots of second moments, r L codes.
    wait: int32 [batch...], steps until each matrix's subspace is recomputed.
    interval: int32 [batch...], the waits that follow.
    agreement: float32 [batch..., 5, 1], |cosine| between successive leading
      singular vectors, latest last; -1 where there is none yet.
    weights: sums of the weights in the moments, for the bias corrections.
  """

  count: jax.Array
  key: jax.Array
  projector: QuantizedArrays
  mu: QuantizedArrays
  root: QuantizedArrays
  wait: Any
  interval: Any
  agreement: Any
  weights: moments.Weights


class QuantizedWeightsState(NamedTuple):
  """State of `q_galore`.

  Attributes:
    count: int32, steps taken.
    key: uint32 words of the PRNG key for rounding the weights.
    inner: state over the dequantized parameters.
  """

  count: jax.Array
  key: jax.Array
  inner: Any


def _quantize_root(
  root: jax.Array, fmt: quantization.Format, key: jax.Array
) -> quantization.QTensor:
  """Rounds at random, but no positive number to zero.

  Adam divides by these: a small one that became 0 would give a huge step.
  """
  q = quantization.quantize(root, fmt, key=key)
  values = rounding.decode(q.codes, fmt)
  least = 2.0**fmt.min_step_exponent
  values = jnp.where((values == 0) & (root > 0), least, values)
  return dataclasses.replace(q, codes=rounding.encode(values, fmt))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(
  shape: tuple[int, ...], fmt: quantization.Format
) -> quantization.QTensor:
  return quantization.quantize(jnp.zeros(shape), fmt)


def _recompute(g, old, wait, interval, agreement, *, basis, threshold):
  """New bases of the matrices [batch..., m, n] whose wait is over.

  Returns:
    Bases, waits, intervals and agreements like the old ones.
  """
  inputs = projection.on_inputs(g.shape)
  rank = projection.rank_in(old, g.shape)

  def renew(g, old, interval, agreement):
    new = projection.subspaces([g], [rank], basis)[0]
    first = (lambda p: p[:, 0]) if inputs else (lambda p: p[0])
    length = jnp.linalg.norm(first(old))
    cosine = jnp.abs(jnp.dot(first(new), first(old)))
    cosine = cosine / jnp.where(length > 0, length, 1)
    pushed = jnp.concatenate([agreement[1:], cosine[None, None]])
    agreement = jnp.where(length > 0, pushed, agreement)
    calm = jnp.all(agreement >= 0) & (jnp.mean(agreement) >= threshold)
    longer = jnp.where(calm & (interval < _LONGEST), 2 * interval, interval)
    return projection.align(new, old, inputs), longer, longer, agreement

  def one(args):
    g, old, wait, interval, agreement = args
    return jax.lax.cond(
      wait == 0,
      lambda: renew(g, old, interval, agreement),
      lambda: (old, wait, interval, agreement),
    )

  def loop():
    # A loop and not a vmapped condition, which would run both branches.
    flat = [
      x.reshape(-1, *x.shape[g.ndim - 2 :])
      for x in (g, old, wait, interval, agreement)
    ]
    out = jax.lax.map(one, tuple(flat))
    like = (old, wait, interval, agreement)
    return tuple(x.reshape(y.shape) for x, y in zip(out, like, strict=True))

  due = jnp.any(wait == 0)
  return jax.lax.cond(due, loop, lambda: (old, wait, interval, agreement))


def _adam(low, mu, root, key, *how, eps):
  """`moments.adam` of one stack, its moments quantized at random."""
  held = [mu.dequantize()], [jnp.square(root.dequantize())]
  (direction,), ((m,), (v,)) = moments.adam([low], held, *how, eps=eps)
  one, two = jax.random.split(key)
  mu = quantization.quantize(m, mu.format, key=one)
  return direction, mu, _quantize_root(jnp.sqrt(v), root.format, two)


@arguments.checked("Q-GaLore")
def scale_by_q_galore(
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 0.25,
  threshold: float = 0.4,
  projector_format: str = "int4:256",
  moment_format: str = "float8_e4m3fn:256",
  basis: str = "eigh",
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  seed: int = 0,
  matrix_axes: matrices.Spec = None,
) -> optax.GradientTransformation:
  """GaLore whose state is quantized and whose refreshes become rarer.

  As `scale_by_galore` with moments that are kept, and:
  - the basis is held in 4 bits, and used as it is held;
  - moments are held in 8 bits and rounded at random, as a second moment that
    changes by a thousandth of itself per step would stay where it is under
    rounding to nearest. What is held of the second moment is its root, in a
    floating format: its range is half the second moment's, and a quotient of
    two numbers with relative errors has one. Roots above 0 stay above 0,
    rounded up if need be: steps may be too small, never huge;
  - each matrix has its own interval between refreshes. It doubles at a
    refresh if the last five |cosines| between successive leading singular
    vectors have a mean of at least `threshold`. The release leaves the signs
    of singular vectors, which are arbitrary, in.

  State per matrix of sides S <= L: r S codes of 4 bits, 2 r L codes of 8
  bits, a float32 scale for each 256 codes along the fan-in's axis (or fewer
  that there are), and 7 numbers.

  Args:
    rank: as for `scale_by_galore`.
    update_interval: steps from one refresh to the next, to begin with.
    scale: α.
    threshold: mean |cosine| from which on the interval is doubled.
    projector_format: of the bases, as for `quantization.Format.parse`.
    moment_format: of the moments.
    basis: as for `scale_by_galore`.
    b1: Adam's first decay, a value or a schedule of the steps so far.
    b2: Adam's second decay, the same.
    eps: Adam's epsilon.
    seed: of the random rounding.
    matrix_axes: as for `scale_by_muon`.

  Returns:
    A transformation with a `QGaloreState`; updates are float, of the
    gradients' shapes and dtypes, and keep their sign.

  Raises:
    ValueError: as `scale_by_galore`, or an unknown format.
  """
  projection.check_choice("basis", basis, projection.BASES)
  fmt = quantization.Format.parse(projector_format)
  fmt8 = quantization.Format.parse(moment_format)

  def init(params):
    layout = projection.Layout.of(params, matrix_axes, "Q-GaLore", warn=True)
    bases, mu, root = [], [], []
    for name, x in layout.each():
      r = projection.rank_of(rank, name, x.shape)
      bases.append(_zeros(projection.basis_shape(x.shape, r), fmt))
      low = projection.low_shape(x.shape, r)
      # Buffers of their own: states are donated.
      mu.append(_zeros(low, fmt8))
      root.append(_zeros(low, fmt8))
    full = lambda value, dtype, *shape: layout.pack(
      [
        jnp.full((*x.shape[:-2], *shape), value, dtype)
        for _, x in layout.each()
      ]
    )
    return QGaloreState(
      count=jnp.zeros((), jnp.int32),
      key=jax.random.key_data(jax.random.key(seed)),
      projector=QuantizedArrays.of(layout, bases),
      mu=QuantizedArrays.of(layout, mu),
      root=QuantizedArrays.of(layout, root),
      wait=full(0, jnp.int32),
      interval=full(update_interval, jnp.int32),
      agreement=full(-1, jnp.float32, _QUEUE, 1),
      weights=moments.no_weights([x for _, x in layout.each()]),
    )

  def update(updates, state):
    layout = projection.Layout.of(updates, matrix_axes, "Q-GaLore")
    weights, decays = moments.weigh(state.weights, state.count, b1=b1, b2=b2)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
    held = (
      state.projector.tensors(layout, fmt),
      state.mu.tensors(layout, fmt8),
      state.root.tensors(layout, fmt8),
      *map(layout.unpack, (state.wait, state.interval, state.agreement)),
    )
    grads = moments.limited(layout.split(updates, held[1]))
    out, new = [], []
    for i, (g, q, mu, root, *schedule) in enumerate(
      zip(grads, *held, strict=True)
    ):
      p, wait, interval, agreement = _recompute(
        g, q.dequantize(), *schedule, basis=basis, threshold=threshold
      )
      # Quantizing again what was not recomputed changes nothing.
      q = quantization.quantize(p, q.format)
      p = q.dequantize()
      direction, mu, root = _adam(
        projection.down(p, g),
        mu,
        root,
        jax.random.fold_in(key, i),
        weights,
        decays,
        eps=eps,
      )
      out.append(scale * projection.up(p, direction, g.shape))
      new.append((q, mu, root, wait - 1, interval, agreement))
    q, mu, root, *schedule = zip(*new, strict=True) if new else held
    return layout.join(out), QGaloreState(
      optax.safe_increment(state.count),
      state.key,
      *(QuantizedArrays.of(layout, x) for x in (q, mu, root)),
      *map(layout.pack, schedule),
      weights,
    )

  return assembly.direction(init, update)


def _on_quantized(
  inner: optax.GradientTransformation, seed: int
) -> optax.GradientTransformationExtraArgs:
  """Lets `inner`, which gives updates to add, train `QTensor`s.

  The update of a quantized parameter is the sum, rounded at random.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return QuantizedWeightsState(
      count=jnp.zeros((), jnp.int32),
      key=jax.random.key_data(jax.random.key(seed)),
      inner=inner.init(quantization.dequantize_tree(params)),
    )

  def update(grads, state, params=None, **extra_args):
    if params is None:
      raise ValueError("params: q_galore.update needs the parameters, got None")
    view = quantization.dequantize_tree(params)
    updates, inner_state = inner.update(grads, state.inner, view, **extra_args)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
    leaves, treedef = jax.tree.flatten(params, is_leaf=quantization.is_qtensor)
    quantized = [x for x in leaves if quantization.is_qtensor(x)]
    places = iter(assembly.places(quantized))
    out = []
    for leaf, w, u in zip(
      leaves, *map(treedef.flatten_up_to, (view, updates)), strict=True
    ):
      if quantization.is_qtensor(leaf):
        leaf_key = jax.random.fold_in(key, next(places))
        u = quantization.quantize(
          w + u, leaf.format, key=leaf_key, matrix_axes=leaf.matrix_axes
        )
        u = apply.Replacement.of(u)
      out.append(u)
    return treedef.unflatten(out), QuantizedWeightsState(
      optax.safe_increment(state.count), state.key, inner_state
    )

  return optax.GradientTransformationExtraArgs(init, update)


@arguments.checked()
def q_galore(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 0.25,
  update_interval: int = 200,
  scale: float = 0.25,
  threshold: float = 0.4,
  projector_format: str = "int4:256",
  moment_format: str = "float8_e4m3fn:256",
  basis: str = "eigh",
  b1: optax.ScalarOrSchedule = 0.9,
  b2: optax.ScalarOrSchedule = 0.999,
  eps: float = 1e-6,
  seed: int = 0,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: groups.Mask = None,
  matrix_axes: matrices.Spec = None,
  cautious: bool = False,
  labels: labels_lib.Labels = None,
  fallback: groups.Fallback = None,
) -> optax.GradientTransformationExtraArgs:
  """Q-GaLore for the hidden matrices, another optimizer for everything else.

  Matrices: W ← Q(W - lr (`scale_by_q_galore` + weight_decay W)). Parameters
  may be `QTensor`s, as `quantization.quantize_tree(params, "int8:256")` makes
  them: Q then rounds to their format, at random, and no float copy is kept
  between steps. It is the identity for float parameters.

  `update(grads, state, params)` takes float gradients of the dequantized
  parameters. The update of a `QTensor` is the new `QTensor`, to be applied by
  `optim.apply_updates`; that of any other leaf is to be added. Only a wrapper
  that selects or zeroes updates may come after; see `eco` for
  `optax.MultiSteps` and `optax.inject_hyperparams`. The paper trains 130M
  parameters at learning_rate=0.015 and 7B at 0.004.

  Args:
    learning_rate: a value or a schedule.
    rank: as for `scale_by_galore`.
    update_interval: as for `scale_by_q_galore`.
    scale: as for `scale_by_q_galore`.
    threshold: as for `scale_by_q_galore`.
    projector_format: as for `scale_by_q_galore`.
    moment_format: as for `scale_by_q_galore`.
    basis: as for `scale_by_galore`.
    b1: as for `scale_by_q_galore`.
    b2: as for `scale_by_q_galore`.
    eps: as for `scale_by_q_galore`.
    seed: of all random rounding, which depends on it, the step and the
      position of the matrix only.
    weight_decay: decoupled decay of everything not labelled "vector", a value
      or a schedule.
    weight_decay_mask: as for `muon`.
    matrix_axes: as for `scale_by_muon`.
    cautious: as for `muon`.
    labels: as for `muon`; Q-GaLore takes the leaves labelled "matrix".
    fallback: as for `muon`.

  Returns:
    The transformation, with a `QuantizedWeightsState`.

  Raises:
    ValueError: as `scale_by_q_galore` and `label_params`; on update, no
      parameters.
  """
  inner = groups.for_matrices(
    scale_by_q_galore(
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      threshold=threshold,
      projector_format=projector_format,
      moment_format=moment_format,
      basis=basis,
      b1=b1,
      b2=b2,
      eps=eps,
      seed=seed,
      matrix_axes=matrix_axes,
    ),
    learning_rate,
    method="Q-GaLore",
    weight_decay=weight_decay,
    weight_decay_mask=weight_decay_mask,
    cautious=cautious,
    labels=labels,
    fallback=fallback,
  )
  return _on_quantized(inner, seed)
