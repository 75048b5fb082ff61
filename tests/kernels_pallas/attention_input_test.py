"""Integers of any width, labels, and what is said of wrong arguments."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp

V = jnp.arange(4.0).reshape(1, 4, 1, 1)
Q = jnp.zeros_like(V)
WIDE = 2**32


def _flat(x):
  return np.asarray(x).ravel()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
  "ids",
  [
    np.array([[0, 0, WIDE, WIDE]]),
    np.array([[-(2**40), -(2**40), 2**40, 2**40]]),
    np.array([[0, 0, 2**63, 2**63]], np.uint64),
    np.array([[1, 1, 2**31, 2**31]], np.uint32),
  ],
)
def test_segment_ids_of_any_width(ids, compiled):
  f = lambda q, v: kp.full_attention(q, q, v, causal=True, segment_ids=ids)
  f = jax.jit(f) if compiled else f
  np.testing.assert_allclose(_flat(f(Q, V)), [0, 0.5, 2, 2.5])
  near = lambda q, v: kp.windowed_attention(
    q, q, v, window=4, segment_ids=ids, block_q=2, block_kv=2
  )
  near = jax.jit(near) if compiled else near
  np.testing.assert_allclose(_flat(near(Q, V)), [0, 0.5, 2, 2.5])


def test_traced_segment_ids_of_64_bits():
  with jax.enable_x64(True):
    ids = jnp.array([[0, 0, WIDE, WIDE]])
    f = jax.jit(
      lambda ids: kp.full_attention(Q, Q, V, causal=True, segment_ids=ids)
    )
    np.testing.assert_allclose(_flat(f(ids)), [0, 0.5, 2, 2.5])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
  "window", [WIDE + 1, np.int64(WIDE + 1), 2**31, np.array([2**40]), 2**70]
)
def test_wide_windows_and_sinks_are_whole_rows(window, compiled):
  for options in (dict(window=window), dict(window=1, sink=window)):
    f = lambda q, v, options=options: kp.windowed_attention(q, q, v, **options)
    f = jax.jit(f) if compiled else f
    np.testing.assert_allclose(_flat(f(Q, V)), [0, 0.5, 1, 1.5])


def test_wide_lengths_are_refused():
  for lengths in (np.array([WIDE + 1]), np.array([2**63], np.uint64)):
    with pytest.raises(ValueError, match="lengths must be from 0 to S = 4"):
      kp.full_attention(Q, Q, V, lengths=lengths)


def _clustered(labels, **options):
  return kp.clustered_attention(
    Q,
    Q,
    V,
    q_clusters=jnp.zeros((1, 1, 4), jnp.int32),
    kv_clusters=labels,
    num_kv_clusters=2,
    density=1.0,
    block_size=2,
    **options,
  )


def test_keys_of_unknown_clusters():
  """Refused; under jit they belong to no cluster, and nobody sees them."""
  for bad in (2, -1, WIDE):
    labels = np.array([[[0, 1, 1, bad]]])
    with pytest.raises(ValueError, match="kv_clusters"):
      _clustered(labels)
  got = jax.jit(_clustered)(jnp.array([[[0, 1, 1, 2]]]))
  np.testing.assert_allclose(_flat(got), 1.0)
  nobody = jax.jit(_clustered)(jnp.full((1, 1, 4), 7))
  np.testing.assert_array_equal(_flat(nobody), 0.0)


X = jnp.ones((1, 16, 2, 4))
_select = functools.partial(kp.select_blocks, X, X, block_q=4, block_kv=4)
_window = functools.partial(kp.windowed_attention, X, X, X)
_piecewise = functools.partial(kp.piecewise_attention, X, X, X, block_size=4)
_prefix = functools.partial(kp.prefix_shared_attention)


@pytest.mark.parametrize(
  ("call", "name"),
  [
    (lambda: _select(density=float("nan")), "density"),
    (lambda: _select(density=1.5), "density"),
    (lambda: _select(density="half"), "density"),
    (lambda: _select(method="threshold", tau=float("nan")), "tau"),
    (lambda: _select(method="top_p", top_p=2.0), "top_p"),
    (lambda: _select(density=0.5, always=(9,)), "always"),
    (lambda: _select(density=0.5, always="0"), "always"),
    (lambda: _select(density=0.5, scale=float("inf")), "scale"),
    (lambda: _window(window=0), "window"),
    (lambda: _window(window=1.5), "window"),
    (lambda: _window(window=[1, 2, 3]), "window"),
    (lambda: _window(window=4, sink=-1), "sink"),
    (lambda: _window(window=4, scale=float("nan")), "scale"),
    (lambda: _piecewise(density=0.0), "density"),
    (lambda: _piecewise(density=0.5, scale=float("nan")), "scale"),
    (lambda: kp.full_attention(X, X, X, scale=float("nan")), "scale"),
    (lambda: kp.full_attention(X[0], X, X), "q"),
    (lambda: kp.full_attention(X, X, None), "v"),
    (lambda: _prefix((X, X), (X, X, X)), "prefix"),
    (lambda: _prefix(X, (X, X, X)), "prefix"),
  ],
)
def test_messages_name_the_argument(call, name):
  with pytest.raises((ValueError, TypeError)) as e:
    call()
  assert re.search(rf"\b{name}\b", str(e.value)), e.value
  assert "\n" not in str(e.value)


def test_numpys_numbers_are_pythons():
  half, four = np.float32(0.5), np.int64(4)
  for a, b in (
    (_select(density=half), _select(density=0.5)),
    (
      _select(method="threshold", tau=np.float64(1)),
      _select(method="threshold", tau=1.0),
    ),
    (_window(window=four, sink=np.int8(1)), _window(window=4, sink=1)),
    (_window(window=[2, 3]), _window(window=np.array([2, 3]))),
    (
      _piecewise(density=half, scale=np.float32(0.25)),
      _piecewise(density=0.5, scale=0.25),
    ),
  ):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_kernels_of_other_platforms(name):
  f = lambda x: kp.piecewise_attention(
    x, x, x, block_size=64, density=0.5, implementation=name
  )
  with pytest.raises(NotImplementedError, match="cpu"):
    jax.jit(f)(jnp.ones((1, 128, 2, 64)))
