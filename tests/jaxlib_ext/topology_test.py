"""Compilation for TPUs that are not here."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxlib_ext import topology

pytestmark = pytest.mark.usefixtures("full_optimization")

needs_libtpu = pytest.mark.skipif(
  not topology.available(), reason="libtpu is not installed (thriftax[tpu])"
)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def mlp(params, x):
  """Four layers of one sharded matrix each, under a scan."""
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


MLP = {"w": shape(4, 512, 512)}, shape(64, 512)


def test_without_libtpu_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topology, "available", lambda: False)
  with pytest.raises(ImportError, match=r"pip install 'thriftax\[tpu\]'"):
    topology.compile_for(mlp, *MLP)


def test_counts_each_collective_once():
  hlo = """
  %a = bf16[8]{0} all-gather(%x), channel_id=1, dimensions={0}
  %b.1 = (bf16[8]{0}, bf16[8]{0}) all-gather-start(%x), channel_id=2
  %b.2 = bf16[8]{0} all-gather-done(%b.1), channel_id=2
  %b.3 = bf16[8]{0:T(8,128)S(1)} all-gather(%y), channel_id=2
  ROOT %c = f32[] all-reduce(%z), replica_groups={{0,1}}
  %d = f32[] all-reduce(%z), replica_groups={{0,1}}
  %all-to-all.3 = f32[] fusion(%all-reduce.2), kind=kLoop
  """
  assert topology.count_collectives(hlo) == {"all-gather": 2, "all-reduce": 2}


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:3x5x7", ""])
def test_unknown_topology(name):
  with pytest.raises(ValueError, match="topology must be a chip and a layout"):
    topology.compile_for(mlp, *MLP, topology=name)


@needs_libtpu
@pytest.mark.tpu
def test_one_chip():
  x = np.zeros((256, 256), np.float32)
  report = topology.compile_for(
    lambda x: x @ x, x, topology="v5e:2x2", text=True
  )
  assert report.devices == 4
  assert report.collectives == {}
  assert report.argument_bytes == report.output_bytes == 4 * 256 * 256
  assert report.peak_bytes >= report.argument_bytes + report.output_bytes
  assert 2 * 256**3 <= report.flops < 2.1 * 256**3
  assert report.bytes_accessed >= 2 * 4 * 256 * 256
  assert "HloModule" in report.text
  assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"]
  assert jax.default_backend() == "cpu"


@needs_libtpu
@pytest.mark.tpu
def test_a_kernel_and_its_memory():
  block = pl.BlockSpec((256, 1024), lambda i: (i, 0))

  def kernel(x, out, total):
    @pl.when(pl.program_id(0) == 0)
    def _():
      total[...] = jnp.zeros_like(total)

    total[...] += x[...]
    out[...] = total[...]

  def running_sum(x):
    return pl.pallas_call(
      kernel,
      grid=(512,),
      in_specs=[block],
      out_specs=block,
      out_shape=x,
      scratch_shapes=[pltpu.VMEM(block.block_shape, x.dtype)],
      name="running_sum",
    )(x)

  # Too large to be placed in VMEM as a whole.
  x = jax.ShapeDtypeStruct((512 * 256, 1024), jnp.float32)
  report = topology.compile_for(running_sum, x)
  ((name, size),) = report.kernel_vmem.items()
  assert "running_sum" in name
  # Two blocks of each, to overlap copies with work, and the scratch.
  assert size == 5 * 4 * 256 * 1024


@needs_libtpu
@pytest.mark.tpu
def test_fully_sharded_parameters_are_gathered():
  compiled = lambda **how: topology.compile_for(
    mlp, *MLP, topology="v5e:4x4", **how
  )
  alone = compiled()
  sharded = compiled(
    mesh={"fsdp": 8, "tensor": 2},
    in_shardings=({"w": P(None, "fsdp", "tensor")}, P("fsdp")),
  )
  assert alone.devices == sharded.devices == 16
  assert alone.collectives == {} and alone.text is None
  assert sharded.collectives["all-gather"] >= 1
  # 1/16 of the matrices and 1/8 of the batch.
  assert alone.argument_bytes == 2 * (4 * 512 * 512 + 64 * 512)
  assert sharded.argument_bytes == 2 * (4 * 512 * 512 // 16 + 64 * 512 // 8)


@needs_libtpu
@pytest.mark.tpu
def test_a_jitted_function_may_donate_and_place_its_result():
  mesh = topology.make_mesh("v5e:2x2", {"data": 4})
  step = jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=P("data"))
  sharding = jax.sharding.NamedSharding(mesh, P("data"))
  report = topology.compile_for(
    step,
    shape(64, 512),
    topology="v5e:2x2",
    mesh=mesh,
    in_shardings=(sharding,),
  )
  assert report.alias_bytes == report.argument_bytes == 2 * 64 * 512 // 4


@needs_libtpu
@pytest.mark.tpu
def test_shardings_that_do_not_fit():
  mesh = {"data": 4}
  compiled = lambda **how: topology.compile_for(
    mlp, *MLP, topology="v5e:2x2", **how
  )
  with pytest.raises(ValueError, match="needs 5 devices, v5e:2x2 has 4"):
    compiled(mesh={"data": 5})
  with pytest.raises(ValueError, match=r"argument 1.*does not fit.*'data': 4"):
    compiled(mesh=mesh, in_shardings=(None, P("tensor")))
  with pytest.raises(ValueError, match="for each of the 2 arguments"):
    compiled(mesh=mesh, in_shardings=P("data"))
  with pytest.raises(ValueError, match=r"argument 0\['w'\] of shape \(3, 5\)"):
    topology.compile_for(
      lambda p: p["w"] + 1,
      {"w": shape(3, 5)},
      topology="v5e:2x2",
      mesh=mesh,
      in_shardings=(P("data"),),
    )


@needs_libtpu
@pytest.mark.tpu
def test_memory_that_does_not_fit_is_refused():
  # 32 GiB on a chip of 16.
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
    topology.compile_for(
      lambda x: x + 1, shape(2**17, 2**17), topology="v5e:2x2"
    )
