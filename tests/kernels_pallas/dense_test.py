"""Chunked dense attention against float64 numpy, and its memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sparse import dense
from tests.kernels_pallas import masked_attention as masked

# Sums of some tens of terms, rounded to 2^-53 or 2^-24.
BOUNDS = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 2.0**-6}
B, H, G, K, V = 2, 4, 2, 6, 5


@pytest.fixture
def small_chunks(monkeypatch):
  """Chunks of about 16 queries and 32 keys, so that short arrays have some."""
  monkeypatch.setattr(dense, "_CHUNK_Q", 32)
  monkeypatch.setattr(dense, "_CHUNK_KV", 32)
  monkeypatch.setattr(dense, "_LEAST", 16)


@pytest.mark.parametrize(
  ("t", "s", "causal", "segmented", "dtype"),
  [
    # One chunk; several, ragged; more keys than queries and fewer.
    (7, 5, False, False, "float64"),
    (70, 100, False, False, "float64"),
    (100, 40, False, False, "float64"),
    (64, 64, True, False, "float32"),
    (75, 75, True, True, "float64"),
    (40, 40, True, True, "bfloat16"),
  ],
)
def test_values_and_gradients(t, s, causal, segmented, dtype, small_chunks):
  qkv, cotangents = masked.make(B, t, s, H, G, K, V)
  qkv = [x.astype(jnp.dtype(dtype)).astype(np.float64) for x in qkv]
  mask = np.ones((B, 1, t, s), bool)
  if causal:
    mask &= np.arange(t)[:, None] >= np.arange(s)
  ids = None
  if segmented:
    ids = np.stack([np.arange(t) // 30, np.arange(t) % 3])
    mask &= (ids[:, :, None] == ids[:, None])[:, None]
  op = functools.partial(
    dense.full_attention,
    causal=causal,
    segment_ids=ids,
    scale=0.6,
    return_lse=True,
  )
  got = masked.run(op, qkv, cotangents, dtype=dtype)
  assert got.out.dtype == jnp.dtype(dtype)
  assert got.lse.dtype == jnp.promote_types(dtype, "float32")
  want = masked.reference(qkv, cotangents, mask, scale=0.6)
  masked.check(got, want, BOUNDS[dtype])


def test_lengths_hide_keys_and_may_be_zero(small_chunks):
  qkv, cotangents = masked.make(3, 20, 50, H, G, K, V)
  lengths = np.array([50, 17, 0])
  mask = (np.arange(50) < lengths[:, None])[:, None, None]
  op = functools.partial(dense.full_attention, lengths=lengths, return_lse=True)
  got = masked.run(op, qkv, cotangents)
  masked.check(got, masked.reference(qkv, cotangents, mask), BOUNDS["float64"])


def test_large_scores_stay_finite():
  qkv, _ = masked.make(1, 20, 20, 1, 1, 4, 4)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in qkv)
  out, lse = dense.full_attention(q * 1e3, k * 1e3, v, return_lse=True)
  # One key has all the weight.
  best = np.argmax(qkv[0][0, :, 0] @ qkv[1][0, :, 0].T, axis=1)
  np.testing.assert_allclose(out[0, :, 0], v[0, best, 0], rtol=1e-6)
  assert np.isfinite(lse).all()


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear(backward):
  def f(q, k, v):
    return jnp.sum(dense.full_attention(q, k, v, causal=True))

  def temporary(t):
    x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
    g = jax.grad(f, argnums=(0, 1, 2)) if backward else f
    compiled = jax.jit(g).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = temporary(4096), temporary(16384)
  assert large < 4.1 * small
  # Scores of two heads would be 2 GiB.
  assert large < 64 << 20


def test_chunks_are_even_and_shrink_with_the_number_of_heads():
  # 520 is two chunks of 272, not one of 512 and a short one.
  assert dense._chunks(2, 1, 520, 16384) == (272, 1024)
  assert dense._chunks(2, 4, 16384, 100) == (128, 100)
  for rows in (2, 64, 10**4):
    q, kv = dense._chunks(rows, 1, 16384, 16384)
    assert rows * q * kv <= 1 << 22 or (q, kv) == (128, 128)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(causal=True), "causal needs as many queries as keys, got T = 4"),
    (dict(segment_ids=np.zeros((1, 4), int)), "segment_ids needs as many"),
    (dict(lengths=np.array([6])), "lengths must be from 0 to S = 5, got 6"),
    (dict(lengths=np.array([-1])), "lengths must be from 0 to S = 5, got -1"),
    (dict(lengths=np.array([2, 2])), r"lengths must have the shape \[B\]"),
  ],
)
def test_bad_arguments(fields, message):
  q, k = jnp.ones((1, 4, 2, 4)), jnp.ones((1, 5, 2, 4))
  with pytest.raises(ValueError, match=message):
    dense.full_attention(q, k, k, **fields)
