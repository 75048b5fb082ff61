"""`flax.serialization` of quantized tensors, whichever is imported first."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from jaxlib_ext import quantization

FORMATS = ("int8", "int2", "int4:8", "float8_e4m3fn", "mxfp8", "mxfp4",
           "nvfp4", "e3m2:8")  # fmt: skip


def tensors():
  x = np.random.default_rng(0).standard_normal((16, 8))
  return {name: quantization.quantize(jnp.asarray(x), name) for name in FORMATS}


def test_round_trips_bit_for_bit():
  want = tensors()
  zeros = jax.tree.map(jnp.zeros_like, want)
  for got in (
    serialization.from_bytes(zeros, serialization.to_bytes(want)),
    serialization.from_state_dict(zeros, serialization.to_state_dict(want)),
  ):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      assert a.dtype == b.dtype
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for name in FORMATS:
      np.testing.assert_array_equal(
        got[name].dequantize(), want[name].dequantize()
      )


def test_another_format_is_refused():
  # Both are in the same arrays.
  states = serialization.to_state_dict(tensors())
  with pytest.raises(ValueError, match=r"'int8'.*got the formats \['int2'\]"):
    serialization.from_state_dict(tensors()["int8"], states["int2"])


def test_flax_imported_later():
  program = """
import sys
import jax.numpy as jnp
from jaxlib_ext import quantization
assert not any(name.startswith("flax") for name in sys.modules)
q = quantization.quantize(jnp.ones((4, 4)), "int8")
from flax import serialization
serialization.from_bytes(q, serialization.to_bytes(q)).dequantize()
"""
  subprocess.run([sys.executable, "-c", program], check=True)
