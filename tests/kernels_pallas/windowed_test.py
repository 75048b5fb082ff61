"""Windows, sinks and bands against a dense mask in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sparse import windowed
from tests.kernels_pallas import masked_attention as masked

# Sums of some tens of terms, rounded to 2^-53.
F64 = 1e-13
B, T, H, G, K, V = 2, 53, 4, 2, 6, 5
# Blocks that fit neither the length nor each other.
BLOCKS = dict(block_q=8, block_kv=12)


def visible(t, s, bands, sink, causal):
  """bool `[H, T, S]`, a key and a head at a time."""
  mask = np.zeros((len(bands), t, s), bool)
  for head, row, column in np.ndindex(mask.shape):
    far = row - column
    inside = any(low <= far <= high for low, high in bands[head])
    allowed = not causal or column <= row
    mask[head, row, column] = allowed and (inside or column < sink[head])
  return mask


def windows(window, causal):
  return [[(0 if causal else 1 - w, w - 1)] for w in window]


def compare(op, mask, *, s=T, segments=None, sinks=None, **options):
  qkv, cotangents = masked.make(B, T, s, H, G, K, V)
  mask = np.broadcast_to(mask, (B, H, T, s))
  if segments is not None:
    own = segments[:, :, None] == segments[:, None]
    mask = mask & own[:, None]

  def f(q, k, v, sinks=None):
    return op(
      q,
      k,
      v,
      segment_ids=segments,
      sinks=sinks,
      return_lse=True,
      **BLOCKS,
      **options,
    )

  got = masked.run(f, qkv, cotangents, sinks=sinks)
  want = masked.reference(qkv, cotangents, mask, sinks=sinks)
  masked.check(got, want, F64)


@pytest.mark.parametrize(
  ("window", "sink", "causal"),
  [
    ([1, 1, 1, 1], [0, 0, 0, 0], True),
    ([7, 12, 1, 60], [0, 5, 13, 2], True),
    ([3, 100, 9, 9], [1, 0, 30, 0], False),
  ],
)
def test_a_window_and_sinks_of_every_head(window, sink, causal):
  mask = visible(T, T, windows(window, causal), sink, causal)
  op = functools.partial(
    windowed.windowed_attention,
    window=np.array(window),
    sink=np.array(sink),
    causal=causal,
  )
  compare(op, mask)


def test_one_window_for_all_heads_segments_and_sink_logits():
  mask = visible(T, T, windows([9] * H, True), [3] * H, True)
  rows = np.arange(T)
  segments = np.stack([rows // 20, (rows >= 1) + 2 * (rows >= 31)])
  compare(
    functools.partial(windowed.windowed_attention, window=9, sink=3),
    mask,
    segments=segments,
    sinks=np.array([-1.0, 0.5, 2.0, 0.0]),
  )


@pytest.mark.parametrize("causal", [True, False])
def test_bands(causal):
  # Overlapping, repeated, out of reach, of one distance, of the future.
  bands = [
    [(0, 3), (2, 9)],
    [(17, 19), (17, 19)],
    [(0, 0), (500, 600)],
    [(-6, -2), (40, 45)],
  ]
  sink = [0, 0, 4, 1]
  op = functools.partial(
    windowed.banded_attention,
    bands=np.array(bands),
    sink=np.array(sink),
    causal=causal,
  )
  compare(op, visible(T, T, bands, sink, causal))


def test_fewer_keys_than_queries_leave_rows_that_see_nothing():
  mask = visible(T, 20, windows([4] * H, False), [0] * H, False)
  assert not mask[0, 30:].any()
  op = functools.partial(windowed.windowed_attention, window=4, causal=False)
  compare(op, mask, s=20)


def test_lists_name_the_blocks_in_reach_and_no_more():
  options = windowed.problem.Options(1.0, 16, 16, causal=True)
  window, sink = np.array([16, 17, 1, 2000]), np.array([0, 0, 33, 0])
  bands = np.stack([0 * window, window - 1], -1)[:, None]
  indices, counts = windowed._lists(bands, sink, 150, 150, options)
  assert indices.shape == (4, 10, 10)
  # 16 tokens reach from a block's first query 15 back: one block before.
  np.testing.assert_array_equal(counts[0], [1] + [2] * 9)
  np.testing.assert_array_equal(counts[1], [1, 2] + [2] * 8)
  np.testing.assert_array_equal(counts[2], [1, 2, 3] + [4] * 7)
  np.testing.assert_array_equal(counts[3], range(1, 11))
  np.testing.assert_array_equal(indices[2, 8, :4], [0, 1, 2, 8])
  few = windowed._lists(bands[:3], sink[:3], 150, 150, options)[0]
  assert few.shape == (3, 10, 4)


def test_traced_values_give_the_same_and_compile_once():
  traces = 0

  @jax.jit
  def f(q, k, v, window, sink):
    nonlocal traces
    traces += 1
    return windowed.windowed_attention(
      q, k, v, window=window, sink=sink, **BLOCKS
    )

  qkv, _ = masked.make(B, T, T, H, G, K, V)
  with jax.enable_x64(True):
    for window, sink in (([7, 12, 1, 60], [0, 5, 13, 2]), ([2] * H, [1] * H)):
      window, sink = np.array(window), np.array(sink)
      got = f(*qkv, jnp.asarray(window), jnp.asarray(sink))
      known = jax.jit(
        functools.partial(
          windowed.windowed_attention, window=window, sink=sink, **BLOCKS
        ),
      )
      np.testing.assert_allclose(got, known(*qkv), rtol=0, atol=F64)
  assert traces == 1


def test_bfloat16_is_rounded_once():
  qkv, cotangents = masked.make(B, T, T, H, G, K, V)
  qkv = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in qkv]
  op = lambda q, k, v: windowed.windowed_attention(
    q, k, v, window=9, sink=2, return_lse=True, **BLOCKS
  )
  got = masked.run(op, qkv, cotangents, dtype="bfloat16")
  assert (got.out.dtype, got.lse.dtype) == (jnp.bfloat16, np.float32)
  mask = visible(T, T, windows([9] * H, True), [2] * H, True)
  want = masked.reference(qkv, cotangents, mask)
  # Operands of every product have 2^-9; cotangents are rounded to it too.
  masked.check(got, want, 2.0**-6)


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    (dict(window=0), ValueError, "window must be at least 1, got 0"),
    (
      dict(window=np.array([3, -2])),
      ValueError,
      "window .* at least 1, got -2",
    ),
    (dict(window=2.5), TypeError, "window must be integers, got float"),
    (dict(window=True), TypeError, "window must be integers, got bool"),
    (dict(window=np.ones(3, int)), ValueError, r"window .*\[H\] = \[2\]"),
    (dict(window=4, sink=-1), ValueError, "sink must be at least 0, got -1"),
    (dict(window=4, block_q=0), ValueError, "block_q must be an int"),
  ],
)
def test_bad_windows(fields, error, message):
  q = jnp.ones((1, 4, 2, 4))
  with pytest.raises(error, match=message):
    windowed.windowed_attention(q, q, q, **fields)


@pytest.mark.parametrize(
  ("bands", "error", "message"),
  [
    (np.ones((2, 2), int), ValueError, r"bands .*\[H, N, 2\] with H = 2"),
    (np.ones((2, 0, 2), int), ValueError, "bands .* N at least 1"),
    (np.ones((2, 1, 2)), TypeError, "bands must be integers"),
    (np.array([[[5, 3]]] * 2), ValueError, r"no high below its low.*\[5, 3\]"),
  ],
)
def test_bad_bands(bands, error, message):
  q = jnp.ones((1, 4, 2, 4))
  with pytest.raises(error, match=message):
    windowed.banded_attention(q, q, q, bands=bands)


def test_causal_needs_equal_lengths():
  q, k = jnp.ones((1, 4, 2, 4)), jnp.ones((1, 5, 2, 4))
  with pytest.raises(ValueError, match="causal .* T = 4 and S = 5"):
    windowed.windowed_attention(q, k, k, window=2)
