"""The token recurrence against plain loops, and decode steps against it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear import recurrent
from tests.kernels_pallas import linear_cases as cases

SHAPE = cases.Shape(t=9, g=2, h=6, k=5, v=3)

members = pytest.mark.parametrize("name", cases.MEMBERS)


def by_hand(member, arrays, ids, scale):
  """Loops over batch, heads and tokens, in numpy."""
  q, k, v = (arrays[x] for x in ("q", "k", "v"))
  (b, t), (h, size) = q.shape[:2], v.shape[2:]
  repeat = h // q.shape[2]
  one = np.ones((b, t, h))
  gate = lambda name: arrays.get(name)
  delta = "beta" in member.gates
  decay = np.exp(gate("log_decay")) if "log_decay" in arrays else one
  initial = arrays["initial_state"]
  o = np.zeros((b, t, h, size))
  final = np.array(initial if member.second_order else [initial])
  for i in range(b):
    for j in range(h):
      s = final[0, i, j]
      n = final[1, i, j] if member.second_order else None
      for x in range(t):
        if x and ids[i, x] != ids[i, x - 1]:
          s, n = 0 * s, None if n is None else 0 * n
        key, query = k[i, x, j // repeat], q[i, x, j // repeat]
        a = decay[i, x, j] * np.ones(len(key))
        e = v[i, x, j]
        if delta:
          p = (
            arrays["erase_key"][i, x, j // repeat] if member.erase else a * key
          )
          e = e - s.T @ p
        s = np.diag(a) @ s
        if n is not None:
          mu = np.exp(gate("log_momentum")[i, x, j])
          n = mu * n + gate("eta")[i, x, j] * np.outer(key, e)
          s = s + gate("beta")[i, x, j] * n
        else:
          s = s + (gate("beta")[i, x, j] if delta else 1) * np.outer(key, e)
        o[i, x, j] = s.T @ query * scale
      final[0, i, j] = s
      if n is not None:
        final[1, i, j] = n
  return o, final


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@members
def test_walks_are_the_recurrence(name, implementation, monkeypatch):
  monkeypatch.setattr(recurrent, "faster", lambda *_, **__: True)
  member = cases.MEMBERS[name]
  arrays = cases.make(member, SHAPE)
  ids = np.array([[0, 0, 0, 1, 1, 2, 3, 3, 3], [4] * 9], np.int32)
  with jax.enable_x64(True):
    run = jax.jit(
      lambda x: cases.call(
        member.op,
        x,
        segment_ids=ids,
        scale=0.7,
        implementation=implementation,
      )
    )
    o, state = run(arrays)
    assert o.dtype == jnp.float64
  want_o, want_state = by_hand(member, arrays, ids, 0.7)
  np.testing.assert_allclose(o, want_o, rtol=0, atol=1e-13)
  state = state if member.second_order else (state,)
  np.testing.assert_allclose(np.stack(state), want_state, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
  "name, sizes, walks",
  [
    ("gla", (128, 16), True),
    ("kda", (128, 300), True),
    ("kda", (129, 16), False),
    ("linear", (64, 64), True),
    ("ssd", (64, 65), False),
    ("gdn", (8, 8), False),
    ("mdn", (8, 8), False),
  ],
)
def test_where_tokens_are_walked_one_by_one(name, sizes, walks, monkeypatch):
  member = cases.MEMBERS[name]
  shape = cases.Shape(b=1, t=3, g=1, h=1, k=sizes[0], v=sizes[1])
  arrays = cases.narrow(cases.make(member, shape), "float32")
  walked = []
  walk = recurrent.run
  monkeypatch.setattr(
    recurrent, "run", lambda *args: walked.append(1) or walk(*args)
  )

  def loss(arrays, **options):
    run = functools.partial(cases.call, implementation="xla", **options)
    return jax.tree.reduce(
      lambda total, x: total + jnp.sum(x), run(member.op, arrays), 0.0
    )

  loss(arrays)
  assert bool(walked) == walks
  walked.clear()
  # Chunks that are asked for, and what is differentiated.
  loss(arrays, chunk_size=16)
  jax.grad(loss)(arrays)
  assert not walked


@members
def test_steps_continue_the_parallel_form(name):
  member = cases.MEMBERS[name]
  arrays = cases.make(member, SHAPE)

  def walk(arrays):
    arrays = dict(arrays)
    state = arrays.pop("initial_state")
    for gate in ("log_decay", "beta"):
      arrays.setdefault(gate, None)
    if "beta" not in member.gates:
      del arrays["beta"]

    def body(state, token):
      o, state = member.step(state, **token)
      return state, o

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays)
    state, o = jax.lax.scan(body, state, tokens)
    return jnp.moveaxis(o, 0, 1), state

  with jax.enable_x64(True):
    got = jax.jit(walk)(arrays)
    want = jax.jit(
      functools.partial(cases.call, member.op, implementation="reference")
    )(arrays)
    assert jax.tree.structure(got) == jax.tree.structure(want)
  table = cases.errors(got, want)
  assert max(table.values()) < 1e-13, table


def test_steps_keep_the_value_dtype():
  member = cases.MEMBERS["mdn"]
  arrays = cases.narrow(cases.make(member, SHAPE), "bfloat16")
  state = arrays.pop("initial_state")
  token = {name: x[:, 0] for name, x in arrays.items()}
  o, state = member.step(state, **token)
  assert o.dtype == jnp.bfloat16
  assert o.shape == (SHAPE.b, SHAPE.h, SHAPE.v)
  assert state.s.dtype == state.n.dtype == jnp.float32


def test_steps_name_what_is_wrong():
  member = cases.MEMBERS["gdn"]
  arrays = cases.narrow(cases.make(member, SHAPE), "float32")
  state = arrays.pop("initial_state")
  token = {name: x[:, 0] for name, x in arrays.items()}
  with pytest.raises(ValueError, match=r"q must have 3 axes.*\[2, 9, 2, 5\]"):
    member.step(state, **dict(token, q=arrays["q"]))
  with pytest.raises(ValueError, match=r"log_decay must have 2 axes"):
    member.step(state, **dict(token, log_decay=arrays["log_decay"]))
  with pytest.raises(ValueError, match=r"state must have.*\[2, 6, 5, 3\]"):
    member.step(state[:, :1], **token)
  with pytest.raises(TypeError, match="state must be"):
    member.step(None, **token)
  with pytest.raises(TypeError, match="beta must be"):
    member.step(state, **dict(token, beta=None))
