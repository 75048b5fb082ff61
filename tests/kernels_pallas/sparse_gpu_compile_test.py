"""What the GPU kernels of sparse attention refuse, and that the rest compiles.

For an H100 that need not be here, see `hopper`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.sparse import (
  blocks,
  core,
  gpu,
  gpu_call,
  gpu_data,
  gpu_plan,
  problem,
  statistics,
)
from tests.kernels_pallas import hopper

pytestmark = pytest.mark.usefixtures("full_optimization")


def problem_of(
  *,
  t=4096,
  k=128,
  v=None,
  dtype="bfloat16",
  tail="drop",
  block_q=64,
  block_kv=64,
  longest=16,
  causal=False,
  segments=False,
  bands=0,
  ragged=False,
  interpret=False,
):
  """The shapes of a problem, and its options."""
  b, g, h = 1, 2, 4
  array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  num_q, num_kv = -(-t // block_q), -(-t // block_kv)
  inputs = problem.Inputs(
    q=array(b, t, h, k),
    k=array(b, t, g, k),
    v=array(b, t, g, v or k),
    indices=ints(b, h, num_q, longest),
    counts=ints(b, h, num_q),
    lengths=ints(b, g, num_kv) if ragged else None,
    segments=ints(b, t) if segments else None,
    bands=ints(h, bands, 2) if bands else None,
    sink_tokens=ints(h) if bands else None,
  )
  return inputs, problem.Options(
    scale=k**-0.5,
    block_q=block_q,
    block_kv=block_kv,
    tail=tail,
    causal=causal,
    interpret=interpret,
  )


@pytest.mark.parametrize(
  "kind, message",
  [
    (dict(block_q=24), "block_q must be a multiple of 16 .* got 24"),
    (dict(block_kv=8), "block_kv must be a multiple of 16 .* got 8"),
    (dict(dtype="float16"), "bfloat16 or float32 .* got float16"),
    (dict(v=257), "heads of at most 256 in bfloat16 .* got 257"),
    (dict(dtype="float32", k=129), "at most 128 in float32 .* got 129"),
  ],
)
def test_refusals(kind, message):
  with pytest.raises(NotImplementedError, match=message):
    gpu.run(*problem_of(**kind))


def test_float64_is_for_the_interpreter():
  with jax.enable_x64(True):
    with pytest.raises(NotImplementedError, match="got float64"):
      gpu.run(*problem_of(dtype="float64"))
    gpu_plan.make(*problem_of(dtype="float64", interpret=True))


@pytest.mark.parametrize("size", [16, 48, 64, 128, 384])
def test_tiles_divide_blocks(size):
  for dtype in ("bfloat16", "float32"):
    for k in (16, 64, 128):
      plan = gpu_plan.make(
        *problem_of(dtype=dtype, k=k, block_q=size, block_kv=size)
      )
      for tile in (plan.forward, plan.dq, plan.dkv):
        assert size % tile.rows == size % tile.keys == 0
        assert min(tile.rows, tile.keys) >= 16


def gradients(inputs, options):
  """A function of q, k, v and its arguments, through `gpu.run`."""

  def run(q, k, v, rest):
    f = lambda q, k, v: gpu.run(rest._replace(q=q, k=k, v=v), options)
    outputs, pullback = jax.vjp(f, q, k, v)
    return outputs, pullback(outputs)

  return run, (*inputs[:3], inputs._replace(q=None, k=None, v=None))


KERNELS = [
  f"sparse_attention_{name}"
  for name in ("forward", "backward_queries", "backward_keys")
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tail", problem.TAILS)
def test_lowers_without_a_gpu(tail, dtype):
  run, args = gradients(*problem_of(tail=tail, dtype=dtype, causal=True))
  text = hopper.lower(run, args, lowering_platforms=("cuda",)).as_text()
  assert all(name in text for name in KERNELS)
  assert text.count("__gpu$xla.gpu.triton") == len(KERNELS)


@pytest.fixture(scope="module")
def h100():
  """An H100's place, for arguments to be lowered for it."""
  return hopper.place()


@pytest.mark.gpu
@pytest.mark.parametrize("tail", ["mean_global", "mean_local"])
def test_values_and_gradients_compile_without_a_gpu(tail, h100):
  kind = dict(tail=tail, k=80, v=40, t=1000, causal=True)
  run, args = gradients(*problem_of(**kind))
  compiled = hopper.lower(run, args, h100).compile()
  assert all(name in compiled.as_text() for name in KERNELS)


def kernels_of(inputs, options):
  """The kernels as functions, and the shapes of their arguments."""
  plan = gpu_plan.make(inputs, options)

  def arguments(inputs):
    exact = core.pad(inputs, options)
    data, lists = gpu_data.data(exact, plan), gpu_data.lists(exact)
    tail = None
    if options.tail != "drop":
      tail = statistics.tail(exact, options)
      tail = gpu_data.pooled(exact, tail, plan)
    row = exact.q[..., 0].astype(plan.wide)
    g = jnp.zeros((*row.shape, exact.v.shape[-1]), plan.wide)
    rows = gpu_data.rows(exact, plan, row, g, row)
    num_kv = exact.lengths.shape[2]
    turned = gpu_data.Lists(*blocks.transposed(*lists, num_kv))
    return (data, lists, tail), (data, lists, rows), (data, turned, rows)

  kernels = (
    gpu_call.forward,
    gpu_call.backward_queries,
    gpu_call.backward_keys,
  )
  kernels = [functools.partial(kernel, plan=plan) for kernel in kernels]
  return list(zip(kernels, jax.eval_shape(arguments, inputs), strict=True))


def compile_kernels(inputs, options, sharding, which=slice(None)):
  """Compiles kernels alone; registers that spill are an error."""
  for kernel, args in kernels_of(inputs, options)[which]:
    hopper.compile_kernel(kernel, args, sharding)


MASKED = dict(causal=True, segments=True, ragged=True)
KINDS = {
  "drop": dict(),
  "drop_masked": dict(bands=2, **MASKED),
  "mean": dict(tail="mean"),
  "mean_masked": dict(tail="mean", **MASKED),
  "mean_var": dict(tail="mean_var"),
  "mean_var_masked": dict(tail="mean_var", **MASKED),
  "mean_global": dict(tail="mean_global"),
  # Which has no segments.
  "mean_global_masked": dict(tail="mean_global", causal=True, ragged=True),
}
SIZES = [("bfloat16", size) for size in (64, 128, 256)] + [
  ("float32", size) for size in (64, 128)
]


@pytest.mark.gpu
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("dtype, size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_do_not_spill(kind, dtype, size, block, h100):
  args = problem_of(
    dtype=dtype, k=size, block_q=block, block_kv=block, **KINDS[kind]
  )
  # The backward kernels know no tails.
  which = slice(None) if kind.startswith("drop") else slice(1)
  compile_kernels(*args, h100, which)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "kind",
  [
    dict(t=1 << 17, longest=256, causal=True, tail="mean_global"),
    dict(k=40, v=80, t=1, longest=1, tail="mean"),
    dict(k=256, v=64, block_q=256, block_kv=32, bands=1, tail="drop"),
    dict(k=64, v=256, block_q=48, block_kv=384, tail="mean_var"),
    dict(dtype="float32", k=128, v=40, block_q=128, block_kv=16, **MASKED),
  ],
  ids=str,
)
def test_other_shapes_do_not_spill(kind, h100):
  compile_kernels(*problem_of(**kind), h100)


@pytest.mark.gpu
def test_a_spill_would_be_an_error(monkeypatch, h100):
  """Half of the warps that hold these sums."""
  half = gpu_plan._half

  def narrow(*args):
    return [gpu_plan.Tile(x.rows, x.keys, x.warps // 2) for x in half(*args)]

  monkeypatch.setattr(gpu_plan, "_half", narrow)
  with pytest.raises(jax.errors.JaxRuntimeError, match="spilling"):
    compile_kernels(*problem_of(k=256), h100)
