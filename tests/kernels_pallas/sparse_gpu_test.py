"""The values of the GPU kernels of block-sparse attention.

Interpreted, values and gradients are held to the reference in float64, in
float64 where a mistake cannot hide in rounding, and in float32 and bfloat16 in
the very arithmetic of the kernels: all of their products are of bfloat16,
which the interpreter rounds to as a GPU does.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sparse import gpu
from tests import quick
from tests.kernels_pallas import sparse_cases as cases

OPTIONS = dict(implementation="pallas_gpu", interpret=True)
# Blocks of two sizes, of one tile and of two; pooled keys in one step and in
# several; query heads that share a key head; heads that are padded.
CASES = {
  "cross": (
    cases.Case(t=65, s=200, k=40, v=24, block_q=32, longest=3, sinks=True),
    "mean",
  ),
  "several tiles": (
    cases.Case(b=1, t=63, s=200, h=2, g=1, v=130, block_q=64, block_kv=128),
    "drop",
  ),
  "several pooled": (
    cases.Case(b=1, t=20, s=280, h=2, g=1, k=9, v=130, longest=4),
    "mean_var",
  ),
  "causal": (
    cases.Case(b=1, t=200, s=200, h=2, g=1, k=80, block_q=64, causal=True),
    "mean_global",
  ),
  "causal segments": (
    cases.Case(t=65, s=65, g=4, block_kv=32, causal=True, segments=3),
    "mean",
  ),
  "one query": (
    cases.Case(b=1, t=1, s=50, h=1, g=1, block_q=64, block_kv=32),
    "drop",
  ),
  "merged": (cases.Case(b=1, h=1, g=1), "mean_local"),
}


@pytest.mark.parametrize("case, tail", quick.cases(CASES, {"causal", "cross"}))
def test_float64(case, tail):
  cases.check_float64(case, tail, **OPTIONS)


def test_bands_and_lengths():
  cases.check_bands(gpu.run)


def test_float32():
  """Whose operands are three parts of bfloat16, none of which may be lost."""
  case = dataclasses.replace(CASES["cross"][0], b=1, k=80)
  args = cases.make(case, dtype=np.float32)
  got = cases.run(args, "mean_var", **OPTIONS)
  assert {x.dtype for x in got.values()} == {jnp.dtype("float32")}
  # Two parts, 16 bits, would miss it.
  cases.check(got, cases.in_float64(args, "mean_var"), atol=2e-6, rtol=2e-6)
  # Scores of 1e5: only of their differences an exponential exists.
  args["q"] = args["q"] * 1e4
  got = cases.run(args, "mean_var", **OPTIONS)
  for name, x in got.items():
    assert np.all(np.isfinite(x)), name
  wanted = cases.in_float64(args, "mean_var")
  # The spacing of float32 at 1e5, and so the error of an exponential.
  np.testing.assert_allclose(got["lse"], wanted["lse"], rtol=1e-6)
  np.testing.assert_allclose(got["out"], wanted["out"], atol=5e-2)


def test_bfloat16():
  cases.bfloat16("cross", "mean_global", **OPTIONS)


@pytest.mark.gpu
@pytest.mark.usefixtures("full_optimization")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tail", cases.TAILS)
def test_on_a_device(tail, dtype):
  if jax.default_backend() != "gpu":
    pytest.skip("needs a GPU, JAX sees none")
  case = cases.Case(
    t=500, s=500, k=128, v=80, block_q=128, block_kv=64, causal=True
  )
  args = cases.make(case, dtype=jnp.dtype(dtype))
  with jax.default_matmul_precision("highest"):
    got = cases.run(args, tail, "pallas_gpu")
    wanted = cases.in_float64(args, tail)
  if dtype == "bfloat16":
    cases.check_bfloat16(got, wanted)
  else:
    cases.check(got, wanted, **cases.F32)
