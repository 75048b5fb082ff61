"""What the public functions refuse, and which implementation they pick."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import MomentumState
from tests.kernels_pallas import linear_cases as cases

SHAPE = cases.Shape(b=2, t=6, g=2, h=4, k=8, v=5)


def arguments(name="mdn"):
  return cases.narrow(cases.make(cases.MEMBERS[name], SHAPE), "float32")


def run(name="mdn", options=(), **changes):
  arrays = arguments(name) | changes
  op = cases.MEMBERS[name].op
  # Shapes only: what is refused is refused before anything is computed.
  return jax.eval_shape(lambda: cases.call(op, arrays, **dict(options)))


zeros = jnp.zeros
STATE = (2, 4, 8, 5)

# What is changed, and what the message says: the argument, what was got and
# what is allowed.
SHAPES = {
  "q rank": (
    dict(q=zeros((2, 6, 8))),
    r"^q must .*\[B, T, G, K\].*\[2, 6, 8\]",
  ),
  "q and v lengths": (dict(v=zeros((2, 7, 4, 5))), r"^v must .*\[2, 6\].*7"),
  "no tokens": (
    {x: zeros((2, 0, 2, 8)) for x in "qk"} | dict(v=zeros((2, 0, 4, 5))),
    r"^q must .*at least 1.*\[2, 0, 2, 8\]",
  ),
  "no channels": (dict(v=zeros((2, 6, 4, 0))), r"^v must .*\[2, 6, 4, 0\]"),
  "k": (dict(k=zeros((2, 6, 2, 7))), r"^k must .*\[2, 6, 2, 8\].*7\]"),
  "erase_key": (dict(erase_key=zeros((2, 6, 4, 8))), r"^erase_key must"),
  "heads": (dict(v=zeros((2, 6, 3, 5))), r"multiple of q's and k's 2.*got 3"),
  "gate": (dict(eta=zeros((2, 6, 2))), r"^eta must .*\[2, 6, 4\].*6, 2\]"),
  "gate per channel": (
    dict(log_decay=zeros((2, 6, 4, 8))),
    r"^log_decay must .*\[B, T, H\]",
  ),
  "state": (
    dict(initial_state=MomentumState(zeros(STATE), zeros((2, 4, 5, 8)))),
    r"^initial_state.n must .*\[2, 4, 8, 5\].*\[2, 4, 5, 8\]",
  ),
}


@pytest.mark.parametrize("change,message", SHAPES.values(), ids=SHAPES)
def test_shapes(change, message):
  with pytest.raises(ValueError, match=message):
    run(**change)


def test_shapes_per_channel():
  with pytest.raises(ValueError, match=r"^log_decay must .*\[2, 6, 4, 8\]"):
    run("kda", log_decay=zeros((2, 6, 4)))
  with pytest.raises(ValueError, match=r"^log_decay must .*\[2, 6, 4, 8\]"):
    run("gla", log_decay=zeros((2, 6, 4, 1)))
  with pytest.raises(ValueError, match=r"^initial_state must .*\[2, 4, 8, 5\]"):
    run("gdn", initial_state=zeros((4, 8, 5)))


@pytest.mark.parametrize("name", ["q", "k", "v", "erase_key", "beta", "eta"])
def test_dtypes(name):
  wrong = jnp.ones(arguments("mdn_erase")[name].shape, jnp.int32)
  with pytest.raises(TypeError, match=f"^{name} must be floating, got int32"):
    run("mdn_erase", **{name: wrong})


def test_missing_gates_and_states_of_the_wrong_kind():
  with pytest.raises(TypeError, match="^log_momentum must be an array"):
    run(log_momentum=None)
  with pytest.raises(TypeError, match="^log_decay must be an array"):
    run("kda", log_decay=None)
  with pytest.raises(TypeError, match=r"^initial_state must be a tuple \(s, n"):
    run(initial_state=zeros(STATE))


def test_segment_ids():
  ids = np.zeros((2, 6), np.int32)
  with pytest.raises(TypeError, match="^segment_ids must be integers"):
    run(options=dict(segment_ids=ids.astype(np.float32)))
  with pytest.raises(ValueError, match=r"^segment_ids .*\[2, 6\].*\[6\]"):
    run(options=dict(segment_ids=ids[0]))


def test_every_change_of_the_segment_id_starts_a_segment():
  """Eagerly as when traced, up or down, in all of its bits."""
  arrays = arguments("gdn")
  f = lambda ids: cases.call(
    kernels_pallas.gated_delta_rule, arrays, segment_ids=ids
  )
  up = np.array([[0, 0, 1, 1, 2, 2]] * 2)
  down = np.array([[3, 3, 1, 1, 0, 0]] * 2)
  large = np.array([[0, 0, 2**32, 2**32, 0, 0]] * 2)
  same = lambda *pair: jax.tree.map(np.testing.assert_array_equal, *pair)
  same(f(down), f(up))
  same(f(large), f(up))
  same(jax.jit(f)(jnp.asarray(down)), jax.jit(f)(jnp.asarray(up)))


def test_lengths():
  for wrong in (np.array([3, 7]), np.array([-1, 2]), [2**32 + 1, 1]):
    with pytest.raises(ValueError, match="^lengths must be from 0 to T = 6"):
      run(options=dict(lengths=wrong))
  with pytest.raises(ValueError, match=r"^lengths .*\[2\].*\[1\]"):
    run(options=dict(lengths=[1]))
  with pytest.raises(TypeError, match="^lengths must be integers"):
    run(options=dict(lengths=np.ones(2)))


@pytest.mark.parametrize("size", [0, 8, 48, 512, True, "64"])
def test_chunk_size(size):
  with pytest.raises(ValueError, match=r"^chunk_size .*\[16, 32, 64, 128, 256"):
    run(options=dict(chunk_size=size))


@pytest.mark.parametrize("count", [0, 7, True, 2.0, None])
def test_num_splits(count):
  with pytest.raises(ValueError, match="^num_splits .*1 to T = 6, got"):
    run(options=dict(num_splits=count))


@pytest.mark.parametrize("axis", ["data", 3])
def test_context_axis(axis):
  with pytest.raises(ValueError, match=f"^context_axis .*got {axis!r}"):
    run(options=dict(context_axis=axis))


def test_scale():
  with pytest.raises(TypeError, match="^scale must be a Python number"):
    run(options=dict(scale=jnp.ones(2)))
  for scale in (float("nan"), np.inf):
    with pytest.raises(ValueError, match="^scale must be finite"):
      run(options=dict(scale=scale))
  arrays = arguments("linear")
  o, _ = cases.call(kernels_pallas.linear_attention, arrays)
  twice, _ = cases.call(
    kernels_pallas.linear_attention, arrays, scale=2 * 8**-0.5
  )
  np.testing.assert_array_equal(twice, 2 * o)


@pytest.mark.parametrize("name", ["triton", ("xla", "cuda"), ()])
def test_names_that_do_not_exist(name):
  with pytest.raises(
    ValueError, match="^implementation .*reference, xla, pallas_tpu, pallas_gpu"
  ):
    run(options=dict(implementation=name))


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_that_cannot_run_here_says_so(name):
  f = lambda names: cases.call(
    kernels_pallas.gated_delta_rule, arguments("gdn"), implementation=names
  )
  for names in (name, (name, name)):
    for call in (f, jax.jit(f, static_argnums=0)):
      with pytest.raises(
        NotImplementedError, match=f"^{name} runs on .* only, and not on cpu"
      ):
        call(names)


def test_a_sequence_is_an_order_of_preference():
  arrays = arguments("gdn")
  f = lambda names: cases.call(
    kernels_pallas.gated_delta_rule, arrays, implementation=names
  )
  got = f(("pallas_gpu", "pallas_tpu", "reference", "xla"))
  jax.tree.map(np.testing.assert_array_equal, got, f("reference"))


def test_dtypes_of_the_result():
  arrays = arguments("gdn")
  arrays["v"] = arrays["v"].astype(jnp.bfloat16)
  arrays["initial_state"] = arrays["initial_state"].astype(jnp.bfloat16)
  o, state = run("gdn", **arrays)
  assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  with jax.enable_x64(True):
    arrays["beta"] = np.asarray(arrays["beta"], np.float64)
    o, state = run("gdn", **arrays)
  assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float64)


def test_numbers_of_numpy_are_numbers():
  arrays = arguments("gdn")
  f = lambda **how: cases.call(
    kernels_pallas.gated_delta_rule, arrays, implementation="xla", **how
  )
  got = f(scale=np.float32(0.5), chunk_size=np.int64(16), num_splits=np.int8(2))
  want = f(scale=0.5, chunk_size=16, num_splits=2)
  jax.tree.map(np.testing.assert_array_equal, got, want)
