"""Linear attention is the program of the platform that it is lowered for."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import kernels_pallas
from kernels_pallas.linear import xla
from tests.kernels_pallas import linear_cases as cases

SHAPE = cases.Shape(b=1, t=200, g=1, h=2, k=16, v=16)


def problem(name):
  member = cases.MEMBERS[name]
  return member, cases.narrow(cases.make(member, SHAPE), "float32")


def exported(f, *args, platforms):
  return export.export(jax.jit(f), platforms=platforms)(*args).mlir_module()


def squares(text):
  return set(map(int, re.findall(r"x(\d+)x\1xf32>", text)))


@pytest.mark.parametrize("name", ["gdn", "gla"])
def test_chunks_and_walks_are_the_platforms(name):
  member, arrays = problem(name)
  f = functools.partial(cases.call, member.op)
  cpu, tpu = (exported(f, arrays, platforms=(p,)) for p in ("cpu", "tpu"))
  assert 64 in squares(tpu)
  # A CPU goes by chunks of 32 with the delta rule, by tokens without.
  assert 64 not in squares(cpu)
  assert (32 in squares(cpu)) == (name == "gdn")
  both = exported(f, arrays, platforms=("cpu", "tpu"))
  assert 64 in squares(both) and "stablehlo.case" in both


@pytest.mark.parametrize("name", ["gdn", "kda"])
def test_gradients_of_another_platforms_chunks(name, monkeypatch):
  """What is kept goes through arrays of the host's shapes unchanged."""
  member, arrays = problem(name)
  loss = lambda arrays: jnp.sum(cases.call(member.op, arrays)[0] ** 2)
  want = jax.jit(jax.grad(loss))(arrays)
  monkeypatch.setattr(xla, "_host", lambda ways: ways[1])
  got = jax.jit(jax.grad(loss))(arrays)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("platform, calls", [("cpu", 0), ("tpu", 2)])
def test_preferences_are_the_platforms(platform, calls):
  member, arrays = problem("linear")
  how = dict(implementation=("pallas_tpu", "xla"))
  f = jax.grad(lambda arrays: jnp.sum(cases.call(member.op, arrays, **how)[0]))
  text = exported(f, arrays, platforms=(platform,))
  assert text.count("custom_call @tpu_custom_call") == calls
  f = functools.partial(cases.call, member.op, **how)
  text = exported(f, arrays, platforms=("cpu", "tpu"))
  assert text.count("custom_call @tpu_custom_call") == 1
  with pytest.raises(NotImplementedError, match="pallas_tpu runs on tpu only"):
    f = functools.partial(cases.call, member.op, implementation="pallas_tpu")
    exported(f, arrays, platforms=("cpu", "tpu"))


def test_symbolic_batches():
  (b,) = export.symbolic_shape("b")
  op = kernels_pallas.gated_delta_rule
  loss = lambda q, beta: jnp.sum(op(q, q, q, None, beta)[0] ** 2)
  f = jax.value_and_grad(loss, (0, 1))
  abstract = [
    jax.ShapeDtypeStruct((b, *shape), jnp.float32)
    for shape in ((20, 2, 8), (20, 2))
  ]
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.standard_normal((3, 20, 2, 8)) * 0.3, jnp.float32)
  args = q, jnp.full((3, 20, 2), 0.5)
  got = export.export(jax.jit(f))(*abstract).call(*args)
  assert (
    max(cases.errors(got, jax.tree.map(np.asarray, f(*args))).values())
    < (cases.F32["gradient"])
  )


def test_lengths_are_sequences_without_their_padding():
  """Values, and gradients that padding does not get, whatever it holds."""
  shape = cases.Shape(b=3, t=40, g=1, h=2, k=8, v=8)
  lengths = np.array([40, 0, 23])
  # The padding's ids begin again: the final state is of what is real.
  ids = np.where(np.arange(40) < 23, np.arange(40) // 9, 0)
  ids = np.stack([np.arange(40) // 15, ids, ids])
  for name in ("mdn_erase", "gla"):
    member = cases.MEMBERS[name]
    arrays = cases.make(member, shape)
    bad = dict(arrays)
    bad["v"] = np.array(arrays["v"])
    bad["v"][2, 30] = np.nan
    given = cases.cotangents(member, shape)
    with jax.enable_x64(True):
      for implementation in ("xla", "reference"):
        how = dict(implementation=implementation, chunk_size=16)

        def run(arrays, lengths, how=how, member=member, given=given):
          how = dict(how, segment_ids=ids, lengths=lengths)
          f = functools.partial(cases.call, member.op, **how)
          out, pullback = jax.vjp(f, arrays)
          return out, pullback(given)[0]

        (o, state), grads = jax.jit(run)(bad, lengths)
        for row, length in enumerate(lengths):
          of_row = lambda x, row=row: x[row : row + 1]
          assert not np.any(o[row, length:])
          for key, x in grads.items():
            if key != "initial_state":
              assert not np.any(x[row, length:]), key
          if not length:
            want_state = jax.tree.map(of_row, arrays["initial_state"])
          else:
            cut = lambda key, x, n=length, of_row=of_row: (
              jax.tree.map(of_row, x)
              if key == "initial_state"
              else of_row(x)[:, :n]
            )
            alone = {key: cut(key, x) for key, x in arrays.items()}
            want, want_state = cases.call(
              member.op,
              alone,
              segment_ids=of_row(ids)[:, :length],
              implementation="reference",
            )
            np.testing.assert_allclose(of_row(o)[:, :length], want, atol=1e-12)
          got_state = jax.tree.map(of_row, state)
          table = cases.errors(got_state, jax.tree.map(np.asarray, want_state))
          assert max(table.values()) < cases.F64["forward"], table
