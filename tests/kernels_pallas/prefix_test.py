"""Shared prefixes against the repeated form in float64, and their work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sparse import dense, prefix
from tests.kernels_pallas import masked_attention as masked

# Sums of some tens of terms, rounded to 2^-53.
F64 = 1e-13
B, N, P, R, H, G, K, V = 2, 3, 11, 6, 4, 2, 5, 7


def make(p=P, r=R, n=N, b=B):
  """(prefix, suffixes) and a cotangent of each output, float64."""
  first, (g_first, _) = masked.make(b, p, p, H, G, K, V)
  rest, (g_rest, _) = masked.make(b * n, r, r, H, G, K, V, seed=1)
  each = lambda x: x.reshape(b, n, *x.shape[1:])
  return (first, tuple(each(x) for x in rest)), (g_first, each(g_rest))


def repeated(arrays, cotangents, lengths):
  """What `prefix_shared_attention` is, a whole sequence per response."""
  (first, rest), (g_first, g_rest) = arrays, cotangents
  b, n, r = rest[0].shape[:3]
  p = first[0].shape[1]
  join = lambda x, y: np.concatenate(
    [np.repeat(x[:, None], n, 1), y], axis=2
  ).reshape(b * n, p + r, *x.shape[2:])
  qkv = [join(x, y) for x, y in zip(first, rest, strict=True)]
  # The prefix's output is one, so its cotangent counts once.
  g = join(g_first / n, g_rest)
  mask = np.tri(p + r, dtype=bool)
  exists = np.arange(p + r) < np.repeat(lengths, n)[:, None]
  exists = exists | (np.arange(p + r) >= p)
  # A prefix's padding reads what it likes, as long as nothing reads it.
  padding = np.arange(p + r)[:, None] < p
  mask = mask & (exists[:, None] | padding)
  got = masked.reference(qkv, (g, np.zeros(g.shape[:3])), mask[:, None])
  apart = lambda x: np.split(x.reshape(b, n, *x.shape[1:]), [p], axis=2)
  out = apart(got.out)
  grads = [apart(x) for x in (got.dq, got.dk, got.dv)]
  return (
    (out[0][:, 0], out[1]),
    (tuple(x.sum(1) for x, _ in grads), tuple(x for _, x in grads)),
  )


@pytest.mark.parametrize("lengths", [None, (P, 4)])
def test_values_and_gradients_are_those_of_the_repeated_form(lengths):
  arrays, cotangents = make()
  want = repeated(arrays, cotangents, (P, P) if lengths is None else lengths)

  def run(arrays, cotangents):
    f = lambda arrays: prefix.prefix_shared_attention(
      *arrays, prefix_lengths=None if lengths is None else np.array(lengths)
    )
    out, pullback = jax.vjp(f, arrays)
    return out, pullback(cotangents)[0]

  with jax.enable_x64(True):
    got = jax.jit(run)(arrays, cotangents)
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=0, atol=F64 * np.abs(b).max())


def test_the_pairs_computed_are_those_promised(monkeypatch):
  p, r, n, chunk = 64, 32, 3, 16
  for name in ("_CHUNK_Q", "_CHUNK_KV"):
    monkeypatch.setattr(dense, name, chunk * (H // G if "Q" in name else 1))
  monkeypatch.setattr(dense, "_LEAST", chunk)
  computed = []
  scores = dense._scores

  def counted(i, j, q, own, keys, options):
    out = scores(i, j, q, own, keys, options)
    jax.debug.callback(lambda _: computed.append(out.size), i)
    return out

  monkeypatch.setattr(dense, "_scores", counted)
  (first, rest), _ = make(p, r, n, 1)
  cast = lambda arrays: [jnp.asarray(x, jnp.float32) for x in arrays]
  run = jax.jit(prefix.prefix_shared_attention)
  jax.block_until_ready(run(cast(first), cast(rest)))
  jax.effects_barrier()
  # Half of P^2 + N (2 P R + R^2), and the other half of the chunks that the
  # diagonal crosses.
  promised = (p * p + n * (2 * p * r + r * r)) // 2
  diagonal = (p + n * r) * chunk // 2
  assert sum(computed) == H * (promised + diagonal)
  assert promised < 0.71 * n * (p + r) ** 2 / 2


def test_bad_shapes():
  (first, rest), _ = make()
  first, rest = (jax.tree.map(jnp.asarray, x) for x in (first, rest))
  call = prefix.prefix_shared_attention
  with pytest.raises(ValueError, match="prefix must have as many queries"):
    call((first[0][:, 1:], *first[1:]), rest)
  with pytest.raises(ValueError, match=r"suffixes' k .*\[B, N, R, heads"):
    call(first, (rest[0], rest[1][:, :, 1:], rest[2]))
  with pytest.raises(ValueError, match="suffixes' q must have the shape"):
    call(first, (rest[0][..., 0], *rest[1:]))
  with pytest.raises(TypeError, match="suffixes' v must be floating"):
    call(first, (*rest[:2], rest[2].astype(int)))
