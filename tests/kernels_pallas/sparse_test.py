"""Block-sparse attention: the reference by hand, XLA by the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas.sparse import blocks as block_lists
from tests.kernels_pallas import sparse_cases as cases

# One tail of every case, and of two all.
TABLE = [
  (name, tail)
  for i, name in enumerate(cases.CASES)
  for j, tail in enumerate(cases.TAILS)
  if not (tail == "mean_global" and cases.CASES[name].segments)
  and (name in ("causal", "causal segments") or (i + 2 * j) % 5 == 4)
]


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("name, tail", TABLE)
@pytest.mark.slow
def test_reference_is_the_definition(name, tail):
  args = cases.make(cases.CASES[name])
  out, lse = cases.by_hand(args, tail)
  got = cases.expected(name, tail)
  np.testing.assert_allclose(got["out"], out, **cases.F64)
  np.testing.assert_allclose(got["lse"], lse, **cases.F64)


@pytest.mark.parametrize("name, tail", TABLE)
def test_xla_is_the_reference(name, tail):
  got = cases.run(cases.make(cases.CASES[name]), tail, "xla")
  cases.check(got, cases.expected(name, tail), **cases.F64)


@pytest.mark.parametrize("tail", ("mean_local", "mean_var"))
def test_float32_against_float64(tail):
  args = cases.make(cases.CASES["causal"], dtype=np.float32)
  got = cases.run(args, tail, "xla")
  assert got["out"].dtype == got["lse"].dtype == jnp.float32
  cases.check(got, cases.in_float64(args, tail), **cases.F32)


@pytest.mark.parametrize("tail", ("drop", "mean_global"))
def test_bfloat16(tail):
  cases.bfloat16("cross", tail, implementation="xla")


def test_rows_that_see_nothing_are_zero():
  """Causal lists of later blocks only: no key, no sink, no gradient."""
  case = cases.Case(b=1, t=32, s=32, h=1, g=1, causal=True)
  args = cases.make(case)
  later = jnp.ones((1, 1, 2, 1), jnp.int32)
  args["blocks"] = kernels_pallas.BlockIndices(later, later[..., 0])
  for implementation in ("reference", "xla"):
    got = cases.run(args, "drop", implementation)
    assert np.all(np.asarray(got["out"])[:, :16] == 0)
    assert np.all(np.asarray(got["lse"])[:, :16] == -1e30)
    assert np.all(np.asarray(got["q"])[:, :16] == 0)
    for x in got.values():
      assert np.all(np.isfinite(x))


@pytest.mark.parametrize("size", (1e3, 1e-30))
def test_extreme_scores(size):
  args = cases.make(cases.CASES["cross"])
  args["q"] = args["q"] * size
  wanted = cases.run(args, "mean", "reference")
  narrow = dict(args, **{x: args[x].astype(np.float32) for x in "qkv"})
  got = cases.run(narrow, "mean", "xla")
  for name, x in got.items():
    assert np.all(np.isfinite(x)), name
  # A score of 1e4 has a spacing of 1e-3, and so has its exponential.
  tolerance = 1e-5 if size < 1 else 2e-2
  np.testing.assert_allclose(
    got["out"], wanted["out"], rtol=tolerance, atol=tolerance
  )


@pytest.mark.parametrize("tail", ("drop", "mean_global"))
def test_density_one_is_dense_attention(tail):
  case = cases.Case(b=1, t=40, s=40, h=2, g=1, v=12, longest=3, causal=True)
  args = cases.make(case)
  every = jnp.broadcast_to(jnp.arange(3), (1, 2, 3, 3))
  args["blocks"] = (every, jnp.full((1, 2, 3), 3))
  got = cases.run(args, tail, "xla")["out"]
  wanted = jax.nn.dot_product_attention(
    args["q"], args["k"], args["v"], is_causal=True
  )
  # JAX's softmax is float32 whatever its inputs.
  np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_batches_and_shards():
  """vmap, and heads over devices, give what a plain call gives."""
  case = cases.Case(b=4, h=4, g=4)
  args = cases.make(case)
  call = lambda q, k, v, blocks: kernels_pallas.block_sparse_attention(
    q, k, v, blocks, block_q=16, block_kv=16, tail="mean_global"
  )
  inputs = args["q"], args["k"], args["v"], args["blocks"]
  wanted = call(*inputs)
  one = lambda *x: call(*jax.tree.map(lambda y: y[None], x))[0]
  np.testing.assert_allclose(jax.vmap(one)(*inputs), wanted, **cases.F64)

  mesh = jax.make_mesh(
    (2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  by = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
  tokens, lists = by("data", None, "tensor"), by("data", "tensor")
  f = jax.jit(call, in_shardings=(tokens, tokens, tokens, lists))
  compiled = f.lower(*inputs).compile()
  assert "all-gather" not in compiled.as_text()
  np.testing.assert_allclose(f(*inputs), wanted, **cases.F64)


def test_memory_is_not_quadratic():
  """Doubling T doubles the temporaries, where T x T would double twice."""

  def temporary(t):
    x = jax.ShapeDtypeStruct((1, t, 1, 16), jnp.float32)
    lists = jax.ShapeDtypeStruct((1, 1, t // 64, 4), jnp.int32)
    counts = jax.ShapeDtypeStruct((1, 1, t // 64), jnp.int32)

    def loss(q, k, v, indices, counts):
      return kernels_pallas.block_sparse_attention(
        q, k, v, (indices, counts)
      ).sum()

    f = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = f.lower(x, x, x, lists, counts).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(8192) < 2.2 * temporary(4096)


def test_transposed_lists():
  rng = np.random.default_rng(0)
  lists = cases.random_lists(cases.Case(), rng)
  member = np.asarray(block_lists.membership(*lists[:2], 4))
  rows, counts = (np.asarray(x) for x in block_lists.transposed(*lists[:2], 4))
  for b, h, j in np.ndindex(counts.shape):
    wanted = np.flatnonzero(member[b, h, :, j])
    assert counts[b, h, j] == len(wanted)
    np.testing.assert_array_equal(rows[b, h, j, : len(wanted)], wanted)
    last = wanted[-1] if len(wanted) else 0
    assert np.all(rows[b, h, j, len(wanted) :] == last)
