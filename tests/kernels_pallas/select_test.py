"""Which blocks are chosen: by hand in NumPy, and what a list promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import select_blocks

B, T, H, G, K, SIZE = 2, 90, 4, 2, 8, 16
N = -(-T // SIZE)


def arrays(seed=0, t=T, dtype=np.float32):
  rng = np.random.default_rng(seed)
  normal = lambda heads: jnp.asarray(rng.normal(size=(B, t, heads, K)), dtype)
  return normal(H), normal(G), normal(G)


def means(x):
  """[B, N, heads, K], the last block over its true length."""
  x = np.asarray(x, np.float64)
  starts = range(0, x.shape[1], SIZE)
  return np.stack([x[:, i : i + SIZE].mean(1) for i in starts], axis=1)


def scores(q, k):
  q, k = means(q), np.repeat(means(k), H // G, axis=2)
  return np.einsum("bihk,bjhk->bhij", q, k) * K**-0.5


def lists(blocks):
  """The sets of blocks by (b, h, i), after checks of their form."""
  indices, counts = (np.asarray(x) for x in blocks[:2])
  assert indices.dtype == counts.dtype == np.int32
  assert counts.min() >= 1 and counts.max() <= indices.shape[-1]
  sets = {}
  for where in np.ndindex(counts.shape):
    row, n = indices[where], counts[where]
    assert np.all(np.diff(row[:n]) > 0)
    assert np.all(row[n:] == row[n - 1])
    sets[where] = set(row[:n].tolist())
  return sets


def choose(q, k, **options):
  return select_blocks(q, k, block_q=SIZE, block_kv=SIZE, **options)


@pytest.mark.parametrize("density", (0.05, 0.34, 1.0))
def test_topk(density):
  q, k, _ = arrays()
  blocks = choose(q, k, density=density)
  number = max(1, int(density * N))
  assert blocks.indices.shape == (B, H, N, number)
  expected = scores(q, k)
  for where, got in lists(blocks).items():
    best = np.argsort(-expected[where])[:number]
    assert got == set(best.tolist())
  np.testing.assert_allclose(blocks.density, number / N, rtol=1e-6)


def test_equal_scores_fill_the_list():
  """Repeated keys: the first of equal blocks, and never too many."""
  q, _, _ = arrays()
  blocks = choose(q, jnp.ones((B, T, G, K)), density=0.5)
  assert all(got == {0, 1, 2} for got in lists(blocks).values())


@pytest.mark.parametrize("causal", (False, True))
def test_threshold(causal):
  q, k, _ = arrays()
  blocks = choose(q, k, method="threshold", tau=0.5, causal=causal)
  expected, mean_q, mean_k = scores(q, k), means(q), means(k)
  got = lists(blocks)
  for b, h, i in np.ndindex(B, H, N):
    seen = i + 1 if causal else N
    keys = mean_k[b, :seen, h // (H // G)]
    query = mean_q[b, i, h] * K**-0.5
    bound = query @ keys.mean(0) + 0.5 * np.sqrt(query**2 @ keys.var(0))
    wanted = set(np.flatnonzero(expected[b, h, i, :seen] > bound).tolist())
    if causal:
      wanted.add(i)
    if not wanted:
      wanted = {int(np.argmax(expected[b, h, i, :seen]))}
    assert got[b, h, i] == wanted


def test_top_p():
  q, k, _ = arrays()
  got = lists(choose(3 * q, k, method="top_p", top_p=0.7))
  weights = np.exp(scores(3 * q, k))
  weights /= weights.sum(-1, keepdims=True)
  for where, blocks in got.items():
    order = np.argsort(-weights[where])
    number = int(np.searchsorted(np.cumsum(weights[where][order]), 0.7)) + 1
    assert blocks == set(order[:number].tolist())


def test_floor_and_cap():
  q, k, _ = arrays()
  few = choose(
    q, k, method="threshold", tau=9.0, min_density=0.4, max_density=0.5
  )
  many = choose(q, k, method="threshold", tau=-9.0, max_density=0.5)
  best = lists(choose(q, k, density=0.5))
  assert many.indices.shape[-1] == 3
  assert lists(many) == best
  assert set(np.unique(few.counts)) == {2}
  assert all(x < best[where] for where, x in lists(few).items())


def test_forced_blocks_and_causality():
  q, k, _ = arrays()
  blocks = choose(q, k, density=0.2, causal=True, always=(0,))
  visible = 0
  for (_, _, i), got in lists(blocks).items():
    assert {0, i} <= got and max(got) <= i
    assert len(got) == max(1, int(0.2 * (i + 1)), len({0, i}))
    visible += i + 1
  np.testing.assert_allclose(
    blocks.density, np.asarray(blocks.counts).sum() / visible, rtol=1e-6
  )
  last = lists(choose(q, k, density=0.1, always=(-1, "diagonal")))
  assert all(got == {i, N - 1} for (_, _, i), got in last.items())


@pytest.mark.parametrize("causal", (False, True))
def test_segments_force_what_cannot_be_pooled(causal):
  """A block of several ids is exact wherever a query sees part of it."""
  q, k, _ = arrays()
  rng = np.random.default_rng(1)
  ids = np.sort(rng.integers(0, 4, (B, T)), axis=1)
  blocks = choose(
    q, k, density=0.1, causal=causal, segment_ids=jnp.asarray(ids)
  )
  for (b, _, i), got in lists(blocks).items():
    rows = range(i * SIZE, min((i + 1) * SIZE, T))
    for j in range(N):
      keys = ids[b, j * SIZE : (j + 1) * SIZE]
      meets = set(ids[b, rows].tolist()) & set(keys.tolist())
      meets = meets and (not causal or j <= i)
      if meets and (len(set(keys.tolist())) > 1 or (causal and j == i)):
        assert j in got
      if not meets:
        assert j not in got


def test_covariance_aware_scores():
  q, k, v = arrays()
  got = lists(choose(q, k, density=0.34, covariance_aware=True, v=v))
  spread = np.zeros((B, G, N))
  for b, g, j in np.ndindex(spread.shape):
    keys, values = (
      np.asarray(x[b, j * SIZE : (j + 1) * SIZE, g], np.float64) for x in (k, v)
    )
    spread[b, g, j] = np.linalg.norm((keys - keys.mean(0)).T @ values)
  expected = (
    scores(q, k) + np.repeat(np.log(spread + 1e-5), H // G, 1)[:, :, None]
  )
  for where, blocks in got.items():
    assert blocks == set(np.argsort(-expected[where])[:2].tolist())


def test_selection_has_no_gradient():
  q, k, _ = arrays()
  density = lambda q: choose(q, k, method="threshold", tau=0.0).density
  assert not np.any(jax.grad(density)(q))


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(density=0.0), r"density must be a number in \(0, 1\], got 0.0"),
    (dict(density=1.5), "density"),
    (dict(density=float("nan")), "density"),
    (dict(), "needs density"),
    (dict(density=0.5, tau=1.0), "tau=1.0"),
    (dict(method="best", density=0.5), "topk.*'best'"),
    (dict(method="threshold", tau="x"), "tau must be a number"),
    (dict(method="top_p", top_p=2.0), "top_p"),
    (dict(density=0.5, max_density=0.5), "max_density"),
    (
      dict(method="top_p", top_p=0.5, min_density=0.6, max_density=0.5),
      "min_density must be at most",
    ),
    (dict(density=0.5, always=(6,)), "always.*-6 to 5"),
    (dict(density=0.5, always=("first",)), "always"),
    (dict(density=0.5, covariance_aware=True), "covariance_aware needs v"),
    (dict(density=0.5, block_q=0), "block_q"),
    (dict(density=0.5, block_kv=2.5), "block_kv"),
  ),
)
def test_bad_arguments(options, message):
  q, k, _ = arrays()
  options = dict(block_q=SIZE, block_kv=SIZE) | options
  with pytest.raises(ValueError, match=message):
    select_blocks(q, k, **options)


def test_causal_needs_equal_lengths():
  q, k, _ = arrays()
  with pytest.raises(ValueError, match="T = 90 and S = 80"):
    choose(q, k[:, :80], density=0.5, causal=True)
