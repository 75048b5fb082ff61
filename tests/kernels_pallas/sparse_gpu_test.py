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

from kernels_pallas.sparse import gpu, problem, reference
from tests.kernels_pallas import sparse_cases as cases
from tests.kernels_pallas import sparse_tpu_test

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


def widened(args):
  """The same numbers in float64."""
  names = [x for x in ("q", "k", "v", "sinks") if args[x] is not None]
  return args | {name: args[name].astype(np.float64) for name in names}


def in_float64(args, tail):
  with jax.enable_x64(True):
    return cases.run(widened(args), tail, "reference")


@pytest.mark.parametrize("name", CASES)
def test_float64(name):
  case, tail = CASES[name]
  with jax.enable_x64(True):
    args = cases.make(case)
    got = cases.run(args, tail, **OPTIONS)
    cases.check(got, cases.run(args, tail, "reference"), **cases.F64)


def test_bands_and_lengths():
  """Windows, sinks, blocks with fewer keys and rows that see nothing."""
  case = cases.Case(b=1, h=4, g=2)
  options = problem.Options(
    scale=0.3, block_q=case.block_q, block_kv=case.block_kv, interpret=True
  )

  def values_and_grads(run, inputs):
    def f(q, k, v):
      out, lse = run(inputs._replace(q=q, k=k, v=v), options)
      seen = jnp.where(lse > problem.MASKED / 2, lse, 0)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(seen)), (out, lse)

    f = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)
    f = jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
    (_, (out, lse)), (q, k, v) = f(*inputs[:3])
    return dict(out=out, lse=lse, q=q, k=k, v=v)

  with jax.enable_x64(True):
    inputs = sparse_tpu_test.banded(case, np.random.default_rng(1))
    wanted = values_and_grads(reference.run, inputs)
    unseen = np.asarray(wanted["lse"]) == problem.MASKED
    assert 0 < np.mean(unseen) < 0.5
    cases.check(values_and_grads(gpu.run, inputs), wanted, **cases.F64)


def test_float32():
  """Whose operands are three parts of bfloat16, none of which may be lost."""
  case = dataclasses.replace(CASES["cross"][0], b=1, k=80)
  args = cases.make(case, dtype=np.float32)
  got = cases.run(args, "mean_var", **OPTIONS)
  assert {x.dtype for x in got.values()} == {jnp.dtype("float32")}
  # Two parts, 16 bits, would miss it.
  cases.check(got, in_float64(args, "mean_var"), atol=2e-6, rtol=2e-6)
  # Scores of 1e5: only of their differences an exponential exists.
  args["q"] = args["q"] * 1e4
  got = cases.run(args, "mean_var", **OPTIONS)
  for name, x in got.items():
    assert np.all(np.isfinite(x)), name
  wanted = in_float64(args, "mean_var")
  # The spacing of float32 at 1e5, and so the error of an exponential.
  np.testing.assert_allclose(got["lse"], wanted["lse"], rtol=1e-6)
  np.testing.assert_allclose(got["out"], wanted["out"], atol=5e-2)


def check_bfloat16(got, wanted):
  """To 2^-9 of the RMS, to which probabilities, score gradients, pooled keys
  and results are rounded each."""
  assert got["out"].dtype == got["q"].dtype == jnp.bfloat16
  assert got["lse"].dtype == jnp.float32
  for name in ("out", "q", "k", "v"):
    error = np.asarray(got[name], np.float64) - np.asarray(wanted[name])
    size = np.sqrt(np.mean(np.square(wanted[name])))
    assert np.sqrt(np.mean(error**2)) < 4 * 2**-9 * size, name


def test_bfloat16():
  args = cases.make(CASES["cross"][0], dtype=jnp.bfloat16)
  args["sinks"] = args["sinks"].astype(jnp.float32)
  got = cases.run(args, "mean_global", **OPTIONS)
  check_bfloat16(got, in_float64(args, "mean_global"))


@pytest.mark.gpu
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
    wanted = in_float64(args, tail)
  if dtype == "bfloat16":
    check_bfloat16(got, wanted)
  else:
    cases.check(got, wanted, **cases.F32)
