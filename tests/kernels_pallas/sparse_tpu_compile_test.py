"""The TPU kernels of block-sparse attention, for chips that are not here.

Mosaic's front end runs everywhere and refuses what it cannot lay out. With
libtpu the compiler runs to the end: what it refuses, scalar memory and VMEM
that do not fit above all, is an error here as on the chip.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxlib_ext import topology
from kernels_pallas import tpu_core
from kernels_pallas.sparse import problem, tpu, tpu_plan

pytestmark = pytest.mark.usefixtures("full_optimization")

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
KERNELS = ("forward", "dq", "dkv")

needs_libtpu = pytest.mark.skipif(
  not topology.available(), reason="libtpu is not installed (thriftax[tpu])"
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A problem in the letters of `problem`, with lists of `longest`."""

  t: int = 4096
  b: int = 1
  h: int = 2
  g: int = 1
  k: int = 128
  v: int = 128
  block_q: int = 128
  block_kv: int = 64
  longest: int = 8
  tail: str = "mean"
  causal: bool = True
  segments: bool = False
  bands: int = 0
  dtype: str = "bfloat16"


def call(case: Case):
  """A function of values and gradients, and its abstract arguments."""
  array = jax.ShapeDtypeStruct
  rows = case.b, case.h, -(-case.t // case.block_q)
  heads = lambda n, size: array((case.b, case.t, n, size), case.dtype)
  integers = lambda *shape: array(shape, jnp.int32)
  inputs = problem.Inputs(
    q=heads(case.h, case.k),
    k=heads(case.g, case.k),
    v=heads(case.g, case.v),
    indices=integers(*rows, case.longest),
    counts=integers(*rows),
  )
  if case.segments:
    inputs = inputs._replace(segments=integers(case.b, case.t))
  if case.bands:
    inputs = inputs._replace(
      bands=integers(case.h, case.bands, 2), sink_tokens=integers(case.h)
    )
  options = problem.Options(
    scale=case.k**-0.5,
    block_q=case.block_q,
    block_kv=case.block_kv,
    tail=case.tail,
    causal=case.causal,
  )

  def values_and_grads(inputs, do, dlse):
    f = lambda q, k, v: tpu.run(inputs._replace(q=q, k=k, v=v), options)
    outputs, pullback = jax.vjp(f, *inputs[:3])
    return outputs, pullback((do, dlse))

  do = heads(case.h, case.v)
  return values_and_grads, (inputs, do, array(do.shape[:3], jnp.float32))


LOWERED = {
  "bfloat16": Case(t=200, k=40, v=80, tail="mean_global"),
  "float32": Case(
    t=300,
    block_q=16,
    block_kv=48,
    longest=3,
    tail="mean_var",
    causal=False,
    segments=True,
    dtype="float32",
  ),
  "float16-bands": Case(
    t=256, longest=2, tail="drop", bands=2, dtype="float16"
  ),
}


@pytest.mark.parametrize("name", LOWERED)
def test_the_front_end_lowers(name):
  """Block shapes and operations, which needs no TPU compiler."""
  f, args = call(LOWERED[name])
  text = jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("stablehlo.custom_call @tpu_custom_call") == 3
  for kernel in KERNELS:
    assert f"sparse_attention_{kernel}" in text


def test_the_front_end_lowers_a_batched_call():
  f, args = call(Case(t=256, longest=2, segments=True))
  batch = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
  lowered = jax.jit(jax.vmap(f)).trace(*jax.tree.map(batch, args))
  text = lowered.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("stablehlo.custom_call @tpu_custom_call") == 3


# One block of queries for a few of keys at a time, and large ones; densities
# of an eighth and less.
SHORT = {
  "d64": Case(h=4, k=64, v=64, tail="mean_global"),
  "d128": Case(
    block_q=256, block_kv=128, longest=4, tail="mean_var", causal=False
  ),
  "d128-float32": Case(tail="mean_global", causal=False, dtype="float32"),
  "d256-segments": Case(k=256, v=256, segments=True, dtype="float32"),
  "bands": Case(block_q=64, tail="drop", bands=2),
}
LONG = {
  "d64": Case(
    t=2**17, k=64, v=64, block_q=256, longest=256, tail="mean_global"
  ),
  "d128": Case(
    t=2**17,
    block_kv=128,
    longest=64,
    tail="mean_var",
    causal=False,
    segments=True,
  ),
  "d128-float32": Case(t=2**17, block_q=512, longest=128, dtype="float32"),
}


@pytest.fixture
def plans(monkeypatch):
  """The plans made during a test."""
  made, make = [], tpu_plan.make

  def record(*args):
    made.append(make(*args))
    return made[-1]

  monkeypatch.setattr(tpu_plan, "make", record)
  return made


def kernel_vmem(report):
  """Bytes of VMEM that the kernels use.

  The report's are up to the last byte, above arrays that XLA keeps there.
  """
  starts = re.findall(
    r'%(\S+) = .*"tpu_custom_call".*'
    r'"scoped_memory_configs":\[\{[^}]*"offset":"(\d+)"',
    re.sub(r'"used_scoped.*', "", report.text),
  )
  return [report.kernel_vmem[name] - int(start) for name, start in starts]


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, id=f"{name}-{case.t}")
    for table in (SHORT, LONG)
    for name, case in table.items()
  ],
)
def test_compiles_ahead_of_time(case, chip, plans):
  f, args = call(case)
  report = topology.compile_for(f, *args, topology=chip, text=True)
  used = kernel_vmem(report)
  assert len(used) == 3
  planned = max(tpu_plan.vmem_bytes(plan) for plan in plans)
  assert 0 < min(used) <= max(used) <= planned <= tpu_core.VMEM_LIMIT
  # XLA goes by our count.
  forward, backward = plans
  costs = [tpu_plan.cost(forward, "forward")]
  costs += [tpu_plan.cost(backward, kernel) for kernel in KERNELS[1:]]
  assert report.flops >= sum(cost.flops for cost in costs)
  assert report.collectives == {}


@needs_libtpu
@pytest.mark.tpu
def test_batches_and_heads_over_a_mesh():
  """XLA cannot cut a kernel; in a `shard_map` nothing is communicated."""
  f, args = call(Case(t=256, b=2, h=4, g=2, longest=2))
  mesh = topology.make_mesh("v5e:2x2", {"data": 2, "tensor": 2})
  tokens, lists = P("data", None, "tensor"), P("data", "tensor")
  inputs = problem.Inputs(tokens, tokens, tokens, lists, lists)
  specs = inputs, tokens, tokens
  mapped = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=specs,
    out_specs=((tokens, tokens), (tokens,) * 3),
    check_vma=False,
  )
  report = topology.compile_for(
    mapped, *args, topology="v5e:2x2", mesh=mesh, in_shardings=specs
  )
  assert len(report.kernel_vmem) == 3
  assert report.collectives == {}


def test_cost_is_that_of_the_formulas(plans):
  """Of a list's blocks and of the tail, by hand."""
  case = Case(b=2, h=4, g=2, longest=8, tail="mean", causal=False)
  f, args = call(case)
  jax.eval_shape(f, *args)
  forward, backward = plans
  heads, listed = 2 * 4, 8 * 64
  # rho 4 T^2 d, where rho = 8 blocks of 64, and 4 T n d for n pooled keys,
  # padded from 64 to a tile of 128.
  exact = heads * 4 * 4096 * listed * 128
  pooled = heads * 4 * 4096 * 128 * 128
  assert tpu_plan.cost(forward, "forward").flops == exact + pooled
  # Scores again, their cotangents, and a product for each of dq, dk and dv.
  assert tpu_plan.cost(backward, "dq").flops == 3 * exact // 2
  assert tpu_plan.cost(backward, "dkv").flops == 2 * exact
