"""The TPU kernels of linear attention, for chips that are not here.

Mosaic's front end runs everywhere and refuses what it cannot lay out. With
libtpu the compiler runs to the end: what it refuses, VMEM that does not fit
above all, is an error here as on the chip.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxlib_ext import topology
from kernels_pallas import tpu_core
from kernels_pallas.linear import tpu_cost, tpu_plan
from tests.kernels_pallas import linear_cases as cases

pytestmark = pytest.mark.usefixtures("full_optimization")

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")

needs_libtpu = pytest.mark.skipif(
  not topology.available(), reason="libtpu is not installed (thriftax[tpu])"
)


def call(name, shape, dtype, chunk_size, *, packed=False):
  """A function of values and gradients, and its abstract arguments."""
  member = cases.MEMBERS[name]
  sizes = cases.Shape(b=1, t=2, g=1, h=1, k=2, v=2)
  small = cases.narrow(cases.make(member, sizes), dtype)
  dims = {"q": (shape.g, shape.k), "k": (shape.g, shape.k)}
  dims |= {"erase_key": dims["k"], "v": (shape.h, shape.v)}
  tokens = shape.b, shape.t
  state = jax.ShapeDtypeStruct(
    (shape.b, shape.h, shape.k, shape.v), jnp.float32
  )

  def one(name, x):
    if name == "initial_state":
      return jax.tree.map(lambda _: state, x)
    tail = dims.get(name, (shape.h, *(shape.k,) * (x.ndim == 4)))
    return jax.ShapeDtypeStruct((*tokens, *tail), x.dtype)

  arrays = {name: one(name, x) for name, x in small.items()}
  ids = jax.ShapeDtypeStruct(tokens, jnp.int32) if packed else None
  do = arrays["v"]

  def values_and_grads(arrays, ids, do, dstate):
    f = lambda arrays: cases.call(
      member.op,
      arrays,
      segment_ids=ids,
      chunk_size=chunk_size,
      implementation="pallas_tpu",
    )
    outputs, pullback = jax.vjp(f, arrays)
    return outputs, pullback((do, dstate))[0]

  return values_and_grads, (arrays, ids, do, arrays["initial_state"])


SMALL = cases.Shape(b=1, t=20, g=2, h=4, k=24, v=40)
LOWERED = {
  "linear-float16": ("linear", SMALL, "float16", 16),
  "gla-bfloat16": ("gla", SMALL, "bfloat16", 16),
  "comba-float32": ("comba", SMALL, "float32", 64),
  "kda-64 lanes": ("kda", cases.Shape(t=65, k=64, v=64), "bfloat16", 64),
  "mdn-shared key": (
    "mdn",
    cases.Shape(t=65, g=1, h=6, k=128, v=256),
    "bfloat16",
    64,
  ),
  "mdn_erase-1.3B": (
    "mdn_erase",
    cases.Shape(b=1, t=128, g=6, h=6, k=256, v=512),
    "bfloat16",
    64,
  ),
}


@pytest.mark.parametrize("case", LOWERED)
def test_the_front_end_lowers(case):
  """Block shapes and operations, which needs no TPU compiler."""
  f, args = call(*LOWERED[case], packed=True)
  text = jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("stablehlo.custom_call @tpu_custom_call") == 2
  for kernel in ("forward", "backward"):
    assert f"linear_attention_{kernel}" in text


def test_the_front_end_lowers_a_batched_call():
  f, args = call("gdn", SMALL, "float32", 16, packed=True)
  batch = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
  lowered = jax.jit(jax.vmap(f)).trace(*jax.tree.map(batch, args))
  text = lowered.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("stablehlo.custom_call @tpu_custom_call") == 2


D128 = cases.Shape(b=1, t=4096, g=4, h=4, k=128, v=128)
M400 = cases.Shape(b=1, t=4096, g=6, h=6, k=128, v=256)
M1300 = cases.Shape(b=1, t=4096, g=6, h=6, k=256, v=512)
COMPILED = {
  "d128": (D128, "bfloat16", 64),
  "d128-float32": (D128, "float32", 64),
  "d128-chunk 128": (D128, "bfloat16", 128),
  "d128-float32-chunk 128": (D128, "float32", 128),
  "400M": (M400, "bfloat16", 64),
  "1.3B": (M1300, "bfloat16", 64),
  "1.3B-chunk 128": (M1300, "bfloat16", 128),
}


# All members and chips at two shapes; the members that differ most at all.
COMBINATIONS = [
  *itertools.product(
    ("mdn", "gdn", "kda", "linear", "gla"), ("d128", "1.3B"), CHIPS
  ),
  *itertools.product(
    ("mdn", "gdn", "kda"), sorted(set(COMPILED) - {"d128", "1.3B"}), CHIPS[:1]
  ),
]


@pytest.fixture
def plans(monkeypatch):
  """The plans made during a test."""
  made, make = [], tpu_plan.make

  def record(*args):
    made.append(make(*args))
    return made[-1]

  monkeypatch.setattr(tpu_plan, "make", record)
  return made


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("name, case, chip", COMBINATIONS)
def test_compiles_ahead_of_time(name, case, chip, plans):
  f, args = call(name, *COMPILED[case])
  report = topology.compile_for(f, *args, topology=chip)
  (plan,) = plans
  used = report.kernel_vmem
  assert len(used) == 2
  planned = tpu_plan.vmem_bytes(plan)
  assert max(used.values()) <= planned <= tpu_core.VMEM_LIMIT, used
  # XLA goes by our count.
  flops = sum(tpu_cost.work(plan, back).flops for back in (False, True))
  assert flops <= report.flops < 1.1 * flops
  assert report.collectives == {}


@needs_libtpu
@pytest.mark.tpu
def test_batches_and_heads_over_a_mesh():
  """XLA cannot cut a kernel; in a `shard_map` nothing is communicated."""
  shape = cases.Shape(b=2, t=128, g=2, h=4, k=128, v=128)
  f, args = call("gdn", shape, "bfloat16", 64, packed=True)
  mesh = topology.make_mesh("v5e:2x2", {"data": 2, "tensor": 2})
  tokens, states = P("data", None, "tensor"), P("data", "tensor")
  arrays = {
    name: states if name == "initial_state" else tokens for name in args[0]
  }
  specs = (arrays, P("data"), tokens, states)
  mapped = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=specs,
    out_specs=((tokens, states), arrays),
    check_vma=False,
  )
  report = topology.compile_for(
    mapped, *args, topology="v5e:2x2", mesh=mesh, in_shardings=specs
  )
  assert len(report.kernel_vmem) == 2
  assert report.collectives == {}


def test_work_is_that_of_the_formulas(plans):
  """Products per token and value head, from the chunk form by hand."""
  c, k, v = 64, 128, 256
  shape = cases.Shape(b=2, t=128, g=2, h=4, k=k, v=v)
  # Folding to and from blocks of 16, then two levels of two products.
  inverse = 2 * 2 * 16 * c + 4 * 2 * c * c
  # Sums of log decays; scores and what they weigh; the state's products; with
  # momentum Gamma and b.
  hand = {
    "ssd": (1, 2 * c * (k + v) + 4 * k * v),
    "gdn": (1, 4 * c * (k + v) + 6 * k * v + inverse),
    "mdn": (2, 4 * c * (k + v) + 12 * k * v + 2 * c * c + 2 * c + inverse),
  }
  for name, (sums, others) in hand.items():
    f, args = call(name, shape, "float32", c)
    jax.eval_shape(f, *args)
    work = tpu_cost.work(plans[-1], backward=False)
    # Of bfloat16 pieces: a mask of zeros and ones is one piece.
    wanted = 3 * sums * 2 * c * c + 6 * others
    assert work.flops == wanted * shape.b * shape.t * shape.h, name
