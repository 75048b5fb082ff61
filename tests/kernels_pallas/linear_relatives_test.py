"""GDN-2, RWKV-7 and DeltaProduct against their own recurrences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from tests.kernels_pallas import linear_cases as cases

pytestmark = pytest.mark.slow

B, T, G, H, K, V, N = 2, 37, 2, 4, 8, 6, 3
F64 = dict(forward=1e-12, gradient=1e-12)

mul = lambda row, s: jnp.einsum("bhk,bhkv->bhv", row, s)
outer = lambda k, v: k[..., None] * v[..., None, :]
heads = lambda x: jnp.repeat(x, H // G, axis=-2)


def gdn2_token(s, q, k, v, log_decay, erase, write):
  s = jnp.exp(log_decay)[..., None] * s
  k = heads(k)
  s = s + outer(k, write * v - mul(erase * k, s))
  return mul(heads(q) * K**-0.5, s), s


def rwkv7_token(s, q, log_decay, k, v, a, b):
  decayed = jnp.exp(log_decay)[..., None] * s
  s = decayed + outer(b, mul(a, s)) + outer(k, v)
  return mul(q, s), s


def delta_product_token(s, q, k, v, log_decay, beta):
  s = jnp.exp(log_decay)[..., None, None] * s
  for i in range(N):
    key = heads(k[:, i])
    s = s + outer(key, beta[:, i, :, None] * (v[:, i] - mul(key, s)))
  return mul(heads(q) * K**-0.5, s), s


def _arrays(*shapes, unit=(), gates=(), decays=()):
  rng = np.random.default_rng(0)
  arrays = []
  for i, shape in enumerate(shapes):
    x = rng.standard_normal(shape)
    if i in unit:
      x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    elif i in gates:
      x = rng.uniform(0, 1, shape)
    elif i in decays:
      x = -np.exp(rng.uniform(-4, 1, shape))
    arrays.append(x)
  return arrays


def _rwkv7_arrays():
  q, log_decay, k, v, a, b = _arrays(
    *[(B, T, H, K)] * 3,
    (B, T, H, V),
    *[(B, T, H, K)] * 2,
    unit=(4,),
    decays=(1,),
  )
  # As the model makes them: what a removes b puts back in part.
  return q, log_decay, k, v, -a, a / (1 + np.exp(-b))


CASES = {
  "gdn2": (
    kernels_pallas.gdn2,
    kernels_pallas.gdn2_step,
    gdn2_token,
    _arrays(
      *[(B, T, G, K)] * 2,
      (B, T, H, V),
      *[(B, T, H, K)] * 2,
      (B, T, H, V),
      unit=(1,),
      gates=(4, 5),
      decays=(3,),
    ),
  ),
  "rwkv7": (
    kernels_pallas.rwkv7,
    kernels_pallas.rwkv7_step,
    rwkv7_token,
    _rwkv7_arrays(),
  ),
  "delta_product": (
    kernels_pallas.delta_product,
    kernels_pallas.delta_product_step,
    delta_product_token,
    _arrays(
      (B, T, G, K),
      (B, T, N, G, K),
      (B, T, N, H, V),
      (B, T, H),
      (B, T, N, H),
      unit=(1,),
      gates=(4,),
      decays=(3,),
    ),
  ),
}
members = pytest.mark.parametrize(
  "op,step,token,arrays", CASES.values(), ids=CASES
)


def recurrence(token, arrays, state, fresh):
  """Token by token; `fresh` [B, T] marks where a segment starts."""

  def walk(s, x):
    fresh, args = x
    s = jnp.where(fresh[:, None, None, None], 0.0, s)
    o, s = token(s, *args)
    return s, o

  first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (fresh, arrays))
  state, o = jax.lax.scan(walk, state, first)
  return jnp.moveaxis(o, 0, 1), state


@members
def test_against_the_recurrence(op, step, token, arrays):
  del step
  rng = np.random.default_rng(1)
  state = rng.standard_normal((B, H, K, V))
  cotangents = (
    rng.standard_normal((B, T, H, V)),
    rng.standard_normal((B, H, K, V)),
  )
  ids = np.stack([np.arange(T) // 15, np.arange(T) // 50]).astype(np.int32)
  fresh = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0

  def values_and_grads(f):
    def run(arrays, state):
      out, pullback = jax.vjp(f, arrays, state)
      return out, pullback(cotangents)

    return jax.jit(run)(arrays, state)

  with jax.enable_x64(True):
    want = values_and_grads(lambda x, s: recurrence(token, x, s, fresh))
    got = values_and_grads(
      lambda x, s: op(*x, initial_state=s, segment_ids=ids, chunk_size=16)
    )
  cases.check(got, jax.tree.map(np.asarray, want), **F64)


@members
def test_steps(op, step, token, arrays):
  del token
  with jax.enable_x64(True):
    arrays = [jnp.asarray(x) for x in arrays]
    want, final = op(*arrays)
    state = jnp.zeros((B, H, K, V))
    advance = jax.jit(step)
    for t in range(T):
      o, state = advance(state, *(x[:, t] for x in arrays))
      np.testing.assert_allclose(o, want[:, t], rtol=0, atol=1e-12)
    np.testing.assert_allclose(state, final, rtol=0, atol=1e-12)


def test_refusals():
  q, k, v, log_decay, erase, write = CASES["gdn2"][3]
  with pytest.raises(ValueError, match=r"^erase must .*\[B, T, H, K\]"):
    kernels_pallas.gdn2(q, k, v, log_decay, erase[:, :, :2], write)
  with pytest.raises(ValueError, match=r"^write must .*\[B, T, H, V\]"):
    kernels_pallas.gdn2(q, k, v, log_decay, erase, erase)
  q, log_decay, k, v, a, b = CASES["rwkv7"][3]
  with pytest.raises(ValueError, match=r"^b must .*\[B, T, H, K\]"):
    kernels_pallas.rwkv7(q, log_decay, k, v, a, v)
  q, k, v, log_decay, beta = CASES["delta_product"][3]
  with pytest.raises(ValueError, match=r"^k must .*\[B, T, N, G, K\]"):
    kernels_pallas.delta_product(q, k[:, :, 0], v, log_decay, beta)
  with pytest.raises(ValueError, match=r"^beta must have .*\[B, T, N, H\]"):
    kernels_pallas.delta_product(q, k, v, log_decay, beta[:, :, :2])


RELATIVES = {
  "gdn2": (
    kernels_pallas.gdn2,
    dict(
      q=(2, 5, 2, 8),
      k=(2, 5, 2, 8),
      v=(2, 5, 4, 6),
      log_decay=(2, 5, 4, 8),
      erase=(2, 5, 4, 8),
      write=(2, 5, 4, 6),
    ),
  ),
  "rwkv7": (
    kernels_pallas.rwkv7,
    dict.fromkeys(("q", "log_decay", "k", "v", "a", "b"), (2, 5, 4, 8)),
  ),
  "delta_product": (
    kernels_pallas.delta_product,
    dict(
      q=(2, 5, 2, 8),
      k=(2, 5, 3, 2, 8),
      v=(2, 5, 3, 4, 6),
      log_decay=(2, 5, 4),
      beta=(2, 5, 3, 4),
    ),
  ),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_name_what_is_wrong(name):
  op, shapes = RELATIVES[name]
  arrays = {x: jnp.ones(shape) * -0.1 for x, shape in shapes.items()}
  run = lambda **changes: jax.eval_shape(lambda: op(**(arrays | changes)))
  run()
  for argument, x in arrays.items():
    if (name, argument) != ("delta_product", "log_decay"):
      with pytest.raises(TypeError, match=f"^{argument} must be .*None"):
        run(**{argument: None})
    with pytest.raises(TypeError, match=f"^{argument} must be floating"):
      run(**{argument: x.astype(jnp.int32)})
    with pytest.raises(ValueError, match="must have the shape"):
      run(**{argument: x[0]})
  with pytest.raises(ValueError, match=r"^lengths .*0 to T = 5"):
    run(lengths=[6, 1])
