"""The TPU kernels of block-sparse attention, interpreted.

Values and gradients are held to the reference in float64, where a mistake
cannot hide in rounding. Interpretation clamps what is out of bounds, so the
kernels also run in the interpreter that models memory, which starts from NaN,
refuses what is out of bounds and looks for races.
"""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas
from kernels_pallas.sparse import problem, tpu, tpu_plan
from tests import quick
from tests.kernels_pallas import sparse_cases as cases
from tests.kernels_pallas import tpu_test

OPTIONS = dict(implementation="pallas_tpu", interpret=True)
# Lists of several steps, the last one partly; blocks of two sizes; keys and
# values in one tile or in one each; pooled keys in two chunks ("causal").
CASES = {
  "cross": (
    cases.Case(t=200, s=130, h=2, g=1, k=40, v=48, block_q=64, sinks=True),
    "mean_global",
  ),
  "causal": (
    cases.Case(b=1, k=80, v=64, block_q=32, block_kv=2, causal=True),
    "mean_global",
  ),
  "segments": (
    cases.Case(t=63, s=63, h=2, g=1, k=80, v=40, block_kv=8, segments=3),
    "mean_var",
  ),
  "one query": (
    cases.Case(b=1, t=1, s=50, h=2, g=2, block_q=64, block_kv=8),
    "mean_local",
  ),
}


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
  monkeypatch.setattr(tpu_plan, "COLUMNS", 32)


@pytest.mark.parametrize("case, tail", quick.cases(CASES, {"causal"}))
def test_float64(case, tail):
  cases.check_float64(case, tail, **OPTIONS)


def test_bands_and_lengths():
  cases.check_bands(tpu.run)


def test_vmap_is_a_larger_batch():
  """Of queries and lists over the same keys and values."""
  case = cases.Case(b=2, h=2, g=1, k=8, v=8)
  args = cases.make(case, dtype=np.float32)

  def call(q, blocks, **options):
    return kernels_pallas.block_sparse_attention(
      q, args["k"], args["v"], blocks, block_q=16, block_kv=16, **options
    )

  several = jax.tree.map(
    lambda x: jnp.stack([x, jnp.roll(x, 1, axis=1)]),
    (args["q"], args["blocks"]),
  )
  mapped = jax.jit(jax.vmap(lambda *x: call(*x, **OPTIONS)))(*several)
  for n, got in enumerate(mapped):
    wanted = call(*jax.tree.map(operator.itemgetter(n), several))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16():
  cases.bfloat16("cross", "mean_global", **OPTIONS)


# A second core costs three times the first.
@pytest.mark.parametrize(
  "cores, tail, options",
  [
    (1, "mean", dict(t=40, s=40, g=1, block_q=8, causal=True, segments=2)),
    pytest.param(
      2,
      "mean_global",
      dict(t=24, s=24, g=2, k=100, v=100),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_memory_and_races(cores, tail, options, capfd):
  case = cases.Case(b=1, h=2, **options)
  args = cases.make(case, dtype=np.float32)
  # Copies that happen at once would be seen too early, and those that wait
  # for their semaphore too late.
  interpret = pltpu.InterpretParams(
    detect_races=True,
    random_seed=0,
    num_cores_or_threads=cores,
    dma_execution_mode="eager" if cores == 1 else "on_wait",
  )
  run = lambda: cases.run(args, tail, "pallas_tpu", interpret=interpret)
  got, found = tpu_test.race(run, capfd)
  assert not found
  with jax.enable_x64(True):
    wide = args | {name: args[name].astype(np.float64) for name in "qkv"}
    wanted = cases.run(wide, tail, "reference")
  cases.check(got, wanted, **cases.F32)


def refused(dtype, case, **options):
  x = jax.ShapeDtypeStruct((1, case.t, 1, case.k), dtype)
  lists = jax.ShapeDtypeStruct((1, 1, case.num_q, 2), jnp.int32)
  counts = jax.ShapeDtypeStruct((1, 1, case.num_q), jnp.int32)
  settings = problem.Options(1.0, case.block_q, case.block_kv, **options)
  run = lambda *arrays: tpu.run(problem.Inputs(*arrays), settings)
  with pytest.raises(NotImplementedError) as error:
    jax.eval_shape(run, x, x, x, lists, counts)
  return str(error.value)


def test_refusals(monkeypatch):
  case = cases.Case(t=4096, s=4096, k=128, block_q=64, block_kv=64)
  with jax.enable_x64(True):
    assert "float64" in refused(jnp.float64, case)
  for name in ("block_q", "block_kv"):
    odd = dataclasses.replace(case, **{name: 100})
    message = refused(jnp.float32, odd)
    assert f"{name} must be a multiple of 16" in message
    assert "got 100" in message
  monkeypatch.undo()
  large = dataclasses.replace(case, block_q=4096, block_kv=1024)
  assert "block_q up to 1024 fits" in refused(jnp.float32, large)
