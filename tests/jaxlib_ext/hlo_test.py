"""Counts from compiled programs whose work is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, PartitionSpec

from jaxlib_ext import hlo


def count(f, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  jitted = jax.jit(f)
  return hlo.costs(jitted.lower(*args).compile().as_text())


# TPUs write a batched product so; 3 windows see 3 places of the batch, one
# of them within the other operand. No copy of a real program: the batch of 3
# products [5, 7] by [7, 11] and nothing else.
TPU = """
HloModule products

%body (x: (s32[], f32[3,5,7])) -> (s32[], f32[3,5,7]) {
  %x = (s32[], f32[3,5,7]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %a = f32[3,5,7]{2,1,0} get-tuple-element(%x), index=1
  %b = f32[3,7,11]{2,1,0} constant({...})
  %y = f32[3,5,11]{2,1,0} convolution(%a, %b), window={size=3 stride=2 \
pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
  ROOT %out = (s32[], f32[3,5,7]{2,1,0}) tuple(%i, %a)
}

%condition (x: (s32[], f32[3,5,7])) -> pred[] {
  %x = (s32[], f32[3,5,7]{2,1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(4), metadata={op_name="cond"}
  %i = s32[] get-tuple-element(%x), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: f32[3,5,7]) -> (s32[], f32[3,5,7]) {
  %a = f32[3,5,7]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[3,5,7]{2,1,0}) tuple(%zero, %a)
  %g = f32[12,5,7]{2,1,0} all-gather(%a), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %loop = (s32[], f32[3,5,7]{2,1,0}) while(%start), \
condition=%condition, body=%body
}
"""


# A loop as a TPU and a GPU may write it: an unsigned bound behind a fusion, a
# stride, a start that is not 0.
LOOP = """
HloModule loop

%less (p: KIND[], q: KIND[]) -> pred[] {
  %p = KIND[] parameter(0)
  %q = KIND[] parameter(1)
  ROOT %lt = pred[] compare(%p, %q), direction=ORDER
}

%next (p: KIND[]) -> KIND[] {
  %p = KIND[] parameter(0)
  %step = KIND[] constant(STEP)
  ROOT %sum = KIND[] add(%p, %step)
}

%body (x: (KIND[], f32[4,5])) -> (KIND[], f32[4,5]) {
  %x = (KIND[], f32[4,5]{1,0}) parameter(0)
  %i = KIND[] get-tuple-element(%x), index=0
  %a = f32[4,5]{1,0} get-tuple-element(%x), index=1
  %y = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, \
rhs_contracting_dims={1}
  %j = KIND[] fusion(%i), kind=kLoop, calls=%next
  ROOT %out = (KIND[], f32[4,5]{1,0}) tuple(%j, %a)
}

%condition (x: (KIND[], f32[4,5])) -> pred[] {
  %x = (KIND[], f32[4,5]{1,0}) parameter(0)
  %i = KIND[] get-tuple-element(%x), index=0
  %bound = KIND[] constant(BOUND)
  ROOT %lt = pred[] fusion(%i, %bound), kind=kLoop, calls=%less
}

ENTRY %main (a: f32[4,5]) -> (KIND[], f32[4,5]) {
  %a = f32[4,5]{1,0} parameter(0)
  %first = KIND[] constant(FIRST)
  %start = (KIND[], f32[4,5]{1,0}) tuple(%first, %a)
  ROOT %loop = (KIND[], f32[4,5]{1,0}) while(%start), \
condition=%condition, body=%body
}
"""

# One asynchronous all-gather of a TPU: three fusions share its channel.
PIECES = """
HloModule pieces

%first (p: f32[3,5]) -> f32[12,5] {
  %p = f32[3,5]{1,0} parameter(0)
  ROOT %g = f32[12,5]{1,0} all-gather(%p), channel_id=7, \
replica_groups=[2,4]<=[8], dimensions={0}
}

%second (q: f32[3,5]) -> f32[12,5] {
  %q = f32[3,5]{1,0} parameter(0)
  ROOT %h = f32[12,5]{1,0} all-gather(%q), channel_id=7, \
replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (r: f32[12,5]) -> f32[3,5] {
  %r = f32[12,5]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %s = f32[12,5]{1,0} all-reduce(%r), channel_id=8, \
replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = f32[3,5]{1,0} dynamic-slice(%s, %zero, %zero), \
dynamic_slice_sizes={3,5}
}

ENTRY %main (a: f32[3,5]) -> f32[3,5] {
  %a = f32[3,5]{1,0} parameter(0)
  %x = f32[12,5]{1,0} fusion(%a), kind=kCustom, calls=%first
  %y = f32[12,5]{1,0} fusion(%a), kind=kCustom, calls=%second
  ROOT %z = f32[3,5]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


class HloTest(parameterized.TestCase):
  def test_a_product(self):
    costs = count(jnp.matmul, (4, 5, 7), (4, 7, 3))
    self.assertEqual(costs.matmul_flops, 2 * 4 * 5 * 7 * 3)
    self.assertEqual(costs.total_collective_bytes, 0)

  @parameterized.parameters(
    ("u32", "LT", 0, 1, 6, 6),
    ("s32", "LT", 0, 2, 7, 4),
    ("u64", "LT", 3, 1, 7, 4),
    ("s64", "LE", 1, 3, 7, 3),
    ("s32", "GT", 9, -2, 0, 5),
    ("s32", "GE", 8, -2, 0, 5),
    ("s32", "NE", 0, 4, 12, 3),
    ("s32", "LT", 5, 1, 5, 0),
  )
  def test_loops_of_any_bound_and_stride(
    self, kind, order, first, step, bound, rounds
  ):
    text = LOOP.replace("KIND", kind).replace("ORDER", order)
    text = text.replace("FIRST", str(first)).replace("STEP", str(step))
    costs = hlo.costs(text.replace("BOUND", str(bound)))
    self.assertEqual(costs.matmul_flops, rounds * 2 * 4 * 4 * 5)

  def test_pieces_of_one_asynchronous_collective_count_once(self):
    costs = hlo.costs(PIECES)
    self.assertEqual(costs.collectives, {"all-gather": 1, "reduce-scatter": 1})
    self.assertEqual(
      costs.collective_bytes,
      {"all-gather": 3 * 15 * 4, "reduce-scatter": 0.75 * 60 * 4},
    )

  def test_loops_count_as_often_as_they_run(self):
    def f(x, y):
      inner = lambda x, _: (jnp.tanh(x @ y), None)
      outer = lambda x, _: jax.lax.scan(inner, x, None, 3)
      return jax.lax.scan(outer, x, None, 5)[0]

    costs = count(f, (6, 7), (7, 7))
    self.assertEqual(costs.matmul_flops, 15 * 2 * 6 * 7 * 7)

  def test_the_dearest_branch(self):
    def f(i, x):
      branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
      return jax.lax.switch(i[0].astype(jnp.int32), branches, x)

    self.assertEqual(count(f, (1,), (8, 8)).matmul_flops, 2 * 2 * 8**3)

  def test_a_loop_of_unknown_length(self):
    f = lambda x: jax.lax.while_loop(
      lambda x: jnp.sum(x) < 1e3, lambda x: x @ x, x
    )
    with self.assertRaisesRegex(ValueError, "unknown length"):
      count(f, (8, 8))

  @parameterized.parameters(
    ("all-gather", lambda x: jax.lax.all_gather(x, "a"), 3 * 24),
    ("all-reduce", lambda x: jax.lax.psum(x, "a"), 2 * 24 * 3 / 4),
    (
      "all-to-all",
      lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True),
      24 * 3 / 4,
    ),
    (
      "reduce-scatter",
      lambda x: jax.lax.psum_scatter(x, "a", tiled=True),
      24 * 3 / 4,
    ),
    (
      "collective-permute",
      lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]),
      24,
    ),
  )
  def test_bytes_received(self, kind, f, elements):
    mesh = jax.make_mesh((2, 4), ("b", "a"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("b", "a")
    run = jax.shard_map(
      f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    costs = count(run, (8, 24))  # [4, 6] on each
    self.assertEqual(costs.collective_bytes, {kind: 4 * elements})
    self.assertEqual(costs.collectives, {kind: 1})

  def test_a_tpus_program(self):
    costs = hlo.costs(TPU)
    self.assertEqual(costs.matmul_flops, 4 * 2 * 3 * 5 * 7 * 11)
    self.assertEqual(costs.collective_bytes, {"all-gather": 3 * 4 * 3 * 5 * 7})


if __name__ == "__main__":
  absltest.main()
