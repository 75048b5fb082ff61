"""Random bits as numbers: quantizing twice is quantizing once."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxlib_ext import quantization
from tests.fuzz import budget

_FORMATS = [
  "int2:4", "int4", "int8:8", "e1m2:8", "e2m1:4", "e3m2:8", "e5m2",
  "float8_e4m3fn", "mxfp8", "mxfp4", "nvfp4",
]  # fmt: skip


@budget.examples(
  12,
  1000,
  fmt=st.sampled_from(_FORMATS),
  bits=st.lists(
    st.integers(0, 2**32 - 1), min_size=64, max_size=64, unique=True
  ),
  exponent=st.one_of(st.none(), st.integers(-148, 128)),
  stochastic=st.booleans(),
)
def test_any_finite_numbers(fmt, bits, exponent, stochastic):
  """Finite numbers stay finite, the largest within a step, and q(q) is q."""
  x = np.array(bits, np.uint32).view(np.float32).reshape(32, 2)
  x = np.where(np.isfinite(x), x, 1.0).astype(np.float32)
  if exponent is not None:
    # One binade, so that no number is small beside its neighbours.
    x = np.ldexp(np.frexp(x)[0], exponent).astype(np.float32)
  key = jax.random.key(0) if stochastic else None
  once = quantization.quantize(jnp.asarray(x), fmt, key=key)
  value = np.asarray(once.dequantize(jnp.float32), np.float64)
  assert np.all(np.isfinite(value))
  largest = np.abs(x.astype(np.float64)).max()
  if largest >= np.finfo(np.float32).tiny:
    # The coarsest scales are powers of two.
    assert 0.5 * largest <= np.abs(value).max() <= 2 * largest
  again = quantization.quantize(jnp.asarray(value, jnp.float32), fmt, key=key)
  np.testing.assert_array_equal(
    np.asarray(again.dequantize(jnp.float32)), np.asarray(value, np.float32)
  )
