"""What the GPU kernels of linear attention refuse, and that the rest compiles.

For an H100 that need not be here, see `hopper`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.linear import gpu, gpu_plan, gpu_walk, problem
from tests.kernels_pallas import hopper

pytestmark = pytest.mark.usefixtures("full_optimization")


def problem_of(
  *,
  states=1,
  t=4096,
  k=128,
  v=128,
  dtype="bfloat16",
  channels=False,
  delta=True,
  chunk_size=64,
):
  """The shapes of a problem, and its options."""
  b, g, h = 1, 2, 4
  narrow = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  kind = jnp.promote_types(dtype, jnp.float32)
  wide = lambda *shape: jax.ShapeDtypeStruct(shape, kind)
  second = wide(b, t, h) if states == 2 else None
  inputs = problem.Inputs(
    q=narrow(b, t, g, k),
    k=narrow(b, t, g, k),
    p=None,
    v=narrow(b, t, h, v),
    log_decay=wide(b, t, h, k) if channels else wide(b, t, h),
    log_momentum=second,
    beta=wide(b, t, h),
    eta=second,
    state=(wide(b, h, k, v),) * states,
    segments=jax.ShapeDtypeStruct((b, t), jnp.int32),
  )
  return inputs, problem.Options(
    scale=1.0, delta=delta, chunk_size=chunk_size, interpret=False
  )


def test_a_key_size_that_is_too_large():
  inputs, options = problem_of(k=257)
  with pytest.raises(
    NotImplementedError, match="K of at most 256 .* got K = 257"
  ):
    gpu.run(inputs, options)


def test_float64_without_the_interpreter():
  with jax.enable_x64(True):
    inputs, options = problem_of(dtype="float64")
  with pytest.raises(NotImplementedError, match="got v in float64"):
    gpu.run(inputs, options)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_chunks_are_cut_to_what_a_program_holds(size):
  plan = gpu_plan.make(*problem_of(chunk_size=size))
  assert plan.chunk == min(size, 64)
  plan = gpu_plan.make(*problem_of(chunk_size=size, k=256, channels=True))
  assert plan.chunk == min(size, 32)


def value_and_gradients(options):
  """A function of `Inputs` and cotangents, through `gpu.run`."""

  def run(inputs, do, dstate):
    f = lambda x: gpu.run(x._replace(segments=inputs.segments), options)
    outputs, pullback = jax.vjp(f, inputs._replace(segments=None))
    return outputs, pullback((do, dstate))

  return run


KERNELS = ("linear_attention_forward", "linear_attention_backward")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
  "kind",
  [dict(states=2, v=256), dict(channels=True, t=192), dict(delta=False)],
  ids=["mdn", "kda", "linear"],
)
def test_lowers_without_a_gpu(kind, dtype):
  inputs, options = problem_of(dtype=dtype, **kind)
  args = inputs, inputs.v, inputs.state
  text = hopper.lower(
    value_and_gradients(options), args, lowering_platforms=("cuda",)
  ).as_text()
  assert all(name in text for name in KERNELS)
  assert text.count("__gpu$xla.gpu.triton") == len(KERNELS)


# As in the models: MDN's two sizes, and 128 x 128 of the others.
SHAPES = {
  "mdn_400m": dict(states=2, v=256),
  "mdn_1300m": dict(states=2, k=256, v=512),
  "gdn": dict(),
  "kda": dict(channels=True),
  # Here two chunks of 64 tokens would not fit into shared memory.
  "kda_256": dict(channels=True, k=256, v=256),
  "linear": dict(delta=False),
  "gla": dict(delta=False, channels=True),
}
shapes = pytest.mark.parametrize("shape", SHAPES)
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])


@pytest.fixture(scope="module")
def h100():
  """An H100's place, for arguments to be lowered for it."""
  return hopper.place()


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape, dtype",
  [("mdn_400m", "bfloat16"), ("mdn_1300m", "float32"), ("kda", "bfloat16")],
)
def test_values_and_gradients_compile_without_a_gpu(shape, dtype, h100):
  inputs, options = problem_of(dtype=dtype, **SHAPES[shape])
  args = inputs, inputs.v, inputs.state
  compiled = hopper.lower(value_and_gradients(options), args, h100).compile()
  assert all(name in compiled.as_text() for name in KERNELS)


def kernels_of(inputs, options):
  """Both kernels as functions, and the shapes of their arguments."""
  plan = gpu_plan.make(inputs, options)

  def arguments(inputs):
    padded = gpu_plan.pad(inputs, plan)
    system = gpu._system(padded._replace(segments=None), padded.segments, plan)
    # L in place of its inverse, whose shape it has.
    walk = gpu._walk(padded, system, system.lower, plan)
    return walk, padded.v, padded.state

  forward = functools.partial(gpu_walk.forward, plan=plan, keep=True)
  backward = functools.partial(gpu_walk.backward, plan=plan)
  return (forward, backward), jax.eval_shape(arguments, inputs)


def compile_kernels(inputs, options, sharding):
  """Compiles both kernels alone; registers that spill are an error."""
  kernels, args = kernels_of(inputs, options)
  for kernel in kernels:
    hopper.compile_kernel(kernel, args, sharding)


@pytest.mark.gpu
@shapes
@dtypes
def test_kernels_do_not_spill(shape, dtype, h100):
  compile_kernels(*problem_of(dtype=dtype, **SHAPES[shape]), h100)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("size", [16, 32])
def test_kernels_of_shorter_chunks_do_not_spill(size, dtype, h100):
  kind = dict(dtype=dtype, chunk_size=size, **SHAPES["mdn_400m"])
  compile_kernels(*problem_of(**kind), h100)


@pytest.mark.gpu
def test_a_spill_would_be_an_error(monkeypatch, h100):
  """Twice the states that registers hold."""
  for name in ("_MAX_STATE", "_MAX_WIDTH"):
    monkeypatch.setattr(gpu_plan, name, 2 * getattr(gpu_plan, name))
  with pytest.raises(jax.errors.JaxRuntimeError, match="spilling"):
    compile_kernels(*problem_of(**SHAPES["mdn_400m"]), h100)
