"""Clusters: k-means, and attention among sorted blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas.sparse import clusters

B, T, H, K, SIZE, C = 2, 70, 2, 6, 8, 4
HALF = np.ones((B, T, 1, K))


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def grouped(seed=0, spread=0.1, t=T):
  """Tokens around C centres, in any order, and which centre each has."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, C, (B, t, H))
  labels[:, :C] = np.arange(C)[:, None]
  centres = 3 * rng.normal(size=(C, K))
  x = centres[labels] + spread * rng.normal(size=(B, t, H, K))
  return jnp.asarray(x), np.moveaxis(labels, 1, 2)


def test_kmeans_finds_separated_clusters():
  x, labels = grouped()
  # The first tokens are of different clusters: a start without bad luck.
  start = jnp.swapaxes(x[:, :C], 1, 2)
  found, centroids = clusters.kmeans(x, C, centroids=start)
  for b, h in np.ndindex(B, H):
    pairs = set(zip(np.asarray(found)[b, h], labels[b, h], strict=True))
    assert len(pairs) == C
    for c in range(C):
      own = np.asarray(x)[b, :, h][np.asarray(found)[b, h] == c]
      np.testing.assert_allclose(centroids[b, h, c], own.mean(0), rtol=1e-12)
  again, _ = clusters.kmeans(x, C, iterations=1, centroids=centroids)
  np.testing.assert_array_equal(found, again)


def test_empty_clusters_keep_their_place():
  x = jnp.ones((1, 5, 1, K))
  labels, centroids = clusters.kmeans(x, 3, iterations=3)
  assert np.all(np.asarray(labels) == 0)
  assert np.all(np.asarray(centroids) == 1)


def by_hand(q, k, v, q_labels, kv_labels, number):
  """One head: blocks of sorted tokens, the worst means exact; in NumPy."""
  order = np.argsort(q_labels, kind="stable")
  rows = [order[i : i + SIZE] for i in range(0, len(q), SIZE)]
  blocks = []
  for c in range(C):
    own = np.flatnonzero(kv_labels == c)
    blocks += [own[i : i + SIZE] for i in range(0, len(own), SIZE)]
  out = np.zeros((len(q), v.shape[1]))
  scale = K**-0.5
  for queries in rows:
    middle = q[queries].mean(0) * scale
    errors = [
      np.abs(np.exp(k[j] @ middle) - np.exp(k[j].mean(0) @ middle)).sum()
      for j in blocks
    ]
    listed = set(np.argsort(errors)[::-1][:number].tolist())
    for t in queries:
      weights, values = [], []
      for j, own in enumerate(blocks):
        if j in listed:
          weights += list(np.exp(k[own] @ q[t] * scale))
          values += list(v[own])
        else:
          mean = k[own].mean(0)
          weights.append(len(own) * np.exp(mean @ q[t] * scale))
          values.append(v[own].mean(0))
      weights = np.array(weights)
      out[t] = weights @ np.array(values) / weights.sum()
  return out


@pytest.mark.parametrize("density", (0.3, 1.0))
def test_attention_is_the_definition(density):
  (q, q_labels), (k, kv_labels) = grouped(0, 1.0), grouped(1, 1.0)
  v = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, H, 5)))
  got = jax.jit(
    functools.partial(
      clusters.clustered_attention,
      num_kv_clusters=C,
      density=density,
      block_size=SIZE,
    )
  )(q, k, v, q_clusters=q_labels, kv_clusters=kv_labels)
  for b, h in np.ndindex(B, H):
    count = np.bincount(kv_labels[b, h], minlength=C)
    number = max(1, int(density * (-(-count // SIZE)).sum() + 1e-9))
    wanted = by_hand(
      *(np.asarray(x)[b, :, h] for x in (q, k, v)),
      q_labels[b, h],
      kv_labels[b, h],
      number,
    )
    np.testing.assert_allclose(got[b, :, h], wanted, rtol=1e-10, atol=1e-12)
  if density == 1.0:
    dense = kernels_pallas.full_attention(q, k, v)
    np.testing.assert_allclose(got, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_alike_keys_leave_a_smaller_tail_error():
  (q, q_labels), (k, kv_labels) = grouped(0, 0.3, 128), grouped(1, 0.3, 128)
  v = jnp.asarray(np.random.default_rng(2).normal(size=(B, 128, H, 5)))

  @jax.jit
  def errors(q, k, v):
    dense = kernels_pallas.full_attention(q, k, v)
    in_order = clusters.clustered_attention(
      q, k, v, q_clusters=q_labels, kv_clusters=kv_labels, num_kv_clusters=C,
      density=0.2, block_size=16,
    )  # fmt: skip
    in_place = kernels_pallas.piecewise_attention(
      q, k, v, density=0.2, block_size=16, tail="mean"
    )
    return [jnp.linalg.norm(x - dense) for x in (in_order, in_place)]

  in_order, in_place = errors(q, k, v)
  assert in_order < 0.5 * in_place


@pytest.mark.parametrize(
  "options, error, message",
  (
    (dict(q_clusters=jnp.zeros((B, H, 3), int)), ValueError, "q_clusters must"),
    (dict(kv_clusters=jnp.zeros((B, H, T))), TypeError, "kv_clusters must be"),
    (dict(density=0.0), ValueError, "density"),
    (dict(k=HALF, v=HALF), ValueError, "k must have as many heads"),
    (dict(tail="none"), ValueError, "tail must be one of"),
  ),
)  # fmt: skip
def test_bad_arguments(options, error, message):
  x, labels = grouped()
  args = dict(
    q=x, k=x, v=x, q_clusters=labels, kv_clusters=labels, num_kv_clusters=C
  )
  with pytest.raises(error, match=message):
    clusters.clustered_attention(**(args | options))
  with pytest.raises(ValueError, match="num_clusters must be an int from 1"):
    clusters.kmeans(x, T + 1)
