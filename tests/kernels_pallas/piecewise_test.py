"""PISA and ISA against slow NumPy written from their descriptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from tests.common import jitted
from tests.kernels_pallas import sparse_cases as cases

B, H, K, SIZE = 2, 2, 8, 8


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def arrays(t, seed=0):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=(B, t, H, K))) for _ in range(3))


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("causal, block_q", ((False, None), (True, 16)))
def test_piecewise_is_selection_and_attention(causal, block_q):
  q, k, v = arrays(60)
  options = dict(density=0.3, causal=causal)
  got, lse = jitted(
    kernels_pallas.piecewise_attention,
    block_size=SIZE,
    block_q=block_q,
    return_lse=True,
    **options,
  )(q, k, v)
  sizes = dict(block_q=block_q or SIZE, block_kv=SIZE)
  blocks = jitted(kernels_pallas.select_blocks, **sizes, **options)(q, k)
  args = dict(
    q=q, k=k, v=v, blocks=blocks, causal=causal, segment_ids=None, sinks=None,
    **sizes,
  )  # fmt: skip
  wanted, wanted_lse = cases.by_hand(args, "mean_global")
  np.testing.assert_allclose(got, wanted, **cases.F64)
  np.testing.assert_allclose(lse, wanted_lse, **cases.F64)


def test_default_density_and_threshold():
  q, k, v = arrays(64)
  call = lambda **options: jitted(
    kernels_pallas.piecewise_attention,
    block_size=SIZE,
    tail="mean",
    **options,
  )(q, k, v)
  np.testing.assert_array_equal(call(), call(density=0.15))
  few = call(method="threshold", tau=0.5)
  every = call(method="threshold", tau=-99.0)
  dense = jax.nn.dot_product_attention(q, k, v)
  np.testing.assert_allclose(every, dense, rtol=1e-6, atol=1e-6)
  assert 1e-3 < np.abs(few - dense).max() < 2
  with pytest.raises(ValueError, match="needs tau"):
    call(method="threshold")


def isa_by_hand(q, k, v, target, keep, sharp, density, gate):
  """One head, block by block: q, k, v [T, K]."""
  t = len(q)
  parts = [range(0, target), range(target, t)]
  blocks = [
    list(part)[i : i + SIZE]
    for part in parts
    for i in range(0, len(part), SIZE)
  ]
  n_target = -(-target // SIZE)
  mean = lambda x: np.stack([x[rows].mean(0) for rows in blocks])
  mean_q, mean_k, mean_v = mean(q), mean(k), mean(v)
  coarse = softmax(mean_q @ mean_k.T * K**-0.5)
  n_context = len(blocks) - n_target
  importance = coarse[:n_target, n_target:].sum(0)
  best = np.argsort(-importance)[: max(1, int(keep * n_context))]
  stays = list(range(n_target)) + sorted(best + n_target)
  top = max(1, int(0.0625 * n_target))
  sharpness = np.sort(coarse[:, :n_target], axis=1)[:, -top:].sum(1)
  full = set(np.argsort(-sharpness)[: int(sharp * len(blocks) + 0.5)].tolist())
  out = np.zeros_like(v)
  number = max(1, int(density * len(stays)))
  for i, rows in enumerate(blocks):
    pooled = mean_q[i] @ mean_k[stays].T * K**-0.5
    exact = {stays[j] for j in np.argsort(-pooled)[:number]}
    for t in rows:
      scores, values = [], []
      for j in stays:
        if i in full or j in exact:
          scores += list(k[blocks[j]] @ q[t] * K**-0.5)
          values += list(v[blocks[j]])
        else:
          scores.append(mean_k[j] @ q[t] * K**-0.5 + np.log(len(blocks[j])))
          values.append(mean_v[j])
      out[t] = softmax(np.array(scores)) @ np.array(values)
      out[t] += gate[t] * coarse[i] @ mean_v
  return out


@pytest.mark.parametrize(
  "target, context, options",
  (
    (48, 40, dict(keep=0.4, sharp=0.5, density=0.25)),
    (45, 35, dict(keep=0.4, sharp=0.25, density=0.25)),
    (7, 3, dict(keep=1.0, sharp=0.0, density=0.5)),
  ),
)
def test_in_context_attention(target, context, options):
  q, k, v = arrays(target + context)
  gate = jnp.asarray(np.random.default_rng(1).normal(size=q.shape[:3]))
  call = jitted(
    kernels_pallas.in_context_attention,
    context_length=context,
    block_size=SIZE,
    **options,
  )
  got = call(q, k, v, residual=gate)
  for b, h in np.ndindex(B, H):
    one = (np.asarray(x)[b, :, h] for x in (q, k, v))
    wanted = isa_by_hand(*one, target, *options.values(), gate[b, :, h])
    np.testing.assert_allclose(got[b, :, h], wanted, **cases.F64)


def causal_isa_by_hand(q, k, v, context, keep, sharp, density):
  """One head, row by row, the context first: q, k, v [T, K]."""
  parts = [range(0, context), range(context, len(q))]
  blocks = [
    list(part)[i : i + SIZE]
    for part in parts
    for i in range(0, len(part), SIZE)
  ]
  n_context = -(-context // SIZE)
  mean_q, mean_k, mean_v = (
    np.stack([x[rows].mean(0) for rows in blocks]) for x in (q, k, v)
  )
  scores = mean_q @ mean_k.T * K**-0.5
  importance = sum(
    softmax(scores[i, : i + 1])[:n_context]
    for i in range(n_context, len(blocks))
  )
  best = np.argsort(-importance)[: max(1, int(keep * n_context))]
  out = np.zeros_like(v)
  for start, stop, before in (
    (0, n_context, []),
    (n_context, len(blocks), sorted(best.tolist())),
  ):
    sees = {i: before + list(range(start, i + 1)) for i in range(start, stop)}
    sharpness = {}
    for i, stays in sees.items():
      top = max(1, int(0.0625 * len(stays)))
      sharpness[i] = np.sort(softmax(scores[i, stays]))[-top:].sum()
    number = int(sharp * (stop - start) + 0.5)
    full = sorted(sees, key=lambda i: -sharpness[i])[:number]
    for i, stays in sees.items():
      number = max(1, int(density * len(stays) + 1e-9))
      others = sorted(stays[:-1], key=lambda j: -scores[i, j])
      exact = stays if i in full else [i, *others[: number - 1]]
      for t in blocks[i]:
        rows = [u for j in exact for u in blocks[j] if u <= t]
        pooled = [j for j in stays if j not in exact]
        lengths = np.array([len(blocks[j]) for j in pooled])
        logits = np.concatenate(
          [k[rows] @ q[t], mean_k[pooled] @ q[t] + K**0.5 * np.log(lengths)]
        )
        values = np.concatenate([v[rows], mean_v[pooled]])
        out[t] = softmax(K**-0.5 * logits) @ values
  return out


@pytest.mark.parametrize(
  "context, target, options",
  (
    (64, 80, dict(keep=0.4, sharp=0.5, density=0.25)),
    (45, 35, dict(keep=0.4, sharp=0.0, density=0.5)),
    (3, 7, dict(keep=1.0, sharp=1.0, density=0.5)),
  ),
)
def test_causal_in_context_attention(context, target, options):
  q, k, v = arrays(context + target)
  got = jitted(
    kernels_pallas.in_context_attention,
    context_length=context,
    block_size=SIZE,
    causal=True,
    **options,
  )(q, k[:, :, :1], v[:, :, :1])
  for b, h in np.ndindex(B, H):
    one = (np.asarray(x)[b, :, i] for x, i in ((q, h), (k, 0), (v, 0)))
    wanted = causal_isa_by_hand(*one, context, *options.values())
    np.testing.assert_allclose(got[b, :, h], wanted, **cases.F64)


def test_causal_with_all_blocks_is_dense():
  q, k, v = arrays(61)
  got = kernels_pallas.in_context_attention(
    q, k, v, context_length=30, block_size=SIZE, causal=True, keep=1.0,
    sharp=1.0,
  )  # fmt: skip
  wanted = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", (False, True))
def test_in_context_gradients(causal):
  """By differences along one direction: the decisions do not move there."""
  q, k, v = arrays(40)
  gate = None if causal else jnp.full((B, 40, 1), 0.3)
  rng = np.random.default_rng(2)
  weights = jnp.asarray(rng.normal(size=v.shape))

  @jax.jit
  def value_and_grad(x):
    def loss(x):
      out = kernels_pallas.in_context_attention(
        *x[:3], context_length=16, block_size=SIZE, density=0.3,
        residual=x[3], causal=causal,
      )  # fmt: skip
      return jnp.sum(out * weights)

    return jax.value_and_grad(loss)(x)

  x = (q, k, v, gate)
  step = jax.tree.map(lambda y: jnp.asarray(rng.normal(size=y.shape)), x)
  move = lambda size: jax.tree.map(lambda a, b: a + size * b, x, step)
  _, grads = value_and_grad(x)
  slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, step)))
  # The error of a central difference is the square of its step.
  ends = [value_and_grad(move(s))[0] for s in (1e-5, -1e-5)]
  np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6)
  for g in jax.tree.leaves(grads):
    assert np.abs(g).max() > 0


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(context_length=0), "context_length must be an int from 1 to T - 1"),
    (dict(context_length=40), "context_length"),
    (dict(keep=0.0), "keep"),
    (dict(sharp=1.5), "sharp"),
    (dict(density=2), "density"),
    (dict(block_size=-1), "block_size"),
    (dict(residual=np.ones((3,))), "residual must be broadcastable"),
    (dict(residual=np.ones(()), causal=True), "residual must be None where"),
  ),
)
def test_bad_arguments(options, message):
  q, k, v = arrays(40)
  with pytest.raises(ValueError, match=message):
    kernels_pallas.in_context_attention(
      q, k, v, **(dict(context_length=10) | options)
    )
