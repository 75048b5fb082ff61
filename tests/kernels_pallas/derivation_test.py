"""The equations of DERIVATION.md, transcribed into float64 NumPy.

They are compared with the token recurrence, written out here once more, and
with the code. Everything is of order one and sums have at most a few hundred
terms, so that 1e-13 leaves a factor of ten above float64 rounding.
"""

from __future__ import annotations

import math
import pathlib
import re
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear import chunk, inverse, vector
from tests.kernels_pallas.derivation import (
  MEMBERS,
  SCALE,
  SEGMENTS,
  C,
  K,
  V,
  decays,
  makers,
  problem,
  recurrence,
  scalar,
  step,
  transposed,
  unit,
)

FOLDER = pathlib.Path(chunk.__file__).parent
TEXT = (FOLDER / "DERIVATION.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def close(got, want):
  np.testing.assert_allclose(np.asarray(got), want, rtol=1e-13, atol=1e-13)


def arguments(z):
  """What `scalar_system` and `vector_system` differentiate, and the rest."""
  gates = chunk.Gates(
    z["log_alpha"],
    z["log_mu"],
    z["beta"] if z["delta"] else None,
    z["eta"] if z["order"] == 2 else None,
  )
  segments = chunk.Segments(z["seg"][1:, None], z["seg"][:1, None])
  return (z["Q"], z["K"], z["P"], gates), segments


def make(builder, z, **how):
  """A maker as a function of its arrays, and these."""
  arrays, segments = arguments(z)
  return lambda *x: builder(
    *x, segments, scale=SCALE, delta=z["delta"], **how
  ), arrays


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("member", MEMBERS)
def test_scalar_system_and_step(member, segments):
  z = problem(member, segments)
  s, extra = scalar(z)
  vectors = extra["P"], z["Q"], z["K"]
  O, E, X = step(s, vectors, z["V"], z["X"])
  want_o, want_x = recurrence(z)
  close(O, want_o)
  jax.tree.map(close, X, want_x)

  builder, arrays = make(chunk.scalar_system, z)
  system = jax.jit(builder)(*arrays)
  for name, want in s.items():
    jax.tree.map(close, getattr(system, name), want)
  T = None if s["lower"] is None else np.linalg.inv(np.eye(C) + s["lower"])
  got = jax.jit(chunk.step)(system, T, z["V"], z["X"])
  jax.tree.map(close, got, (O, E, X))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("member", MEMBERS)
def test_step_vjp(member, channels):
  z = problem(member, "three")
  s, extra = scalar(z)
  if channels:
    column = np.exp(-np.linspace(0, 1, K))[:, None]
    s["decay"] = ((column, *s["decay"][0][1:]), *s["decay"][1:])
  vectors = extra["P"], z["Q"], z["K"]
  _, E, new = step(s, vectors, z["V"], z["X"])
  rng = np.random.default_rng(1)
  dO, *dX = (rng.standard_normal(x.shape) for x in (z["V"], *new))
  dX = tuple(dX)
  want, Z, states = transposed(s, vectors, E, z["X"], dO, dX)
  if want["p_scale"] and not z["free"]:
    want["k"], want["p"] = want["k"] + want["p"], None
  elif not want["p_scale"]:
    want["p"] = None

  system = chunk.System(p=z["P"], q=z["Q"], k=z["K"], **s)
  T = None if s["lower"] is None else np.linalg.inv(np.eye(C) + s["lower"])
  got, dv, dstate = jax.jit(chunk.step_vjp)(system, T, E, z["X"], dO, dX)
  close(dv, Z)
  jax.tree.map(close, dstate, states)
  assert jax.tree.structure(got) == jax.tree.structure(chunk.System(**want))
  jax.tree.map(close, got, chunk.System(**want))


@pytest.mark.parametrize("segments", ["one", "three"])
@pytest.mark.parametrize("member", MEMBERS)
def test_makers_vjp(member, segments):
  z = problem(member, segments)
  builder, arrays = make(chunk.scalar_system, z)
  rng = np.random.default_rng(2)
  d = jax.tree.map(
    lambda x: rng.standard_normal(x.shape), jax.eval_shape(builder, *arrays)
  )
  pull = jax.jit(lambda arrays, d: jax.vjp(builder, *arrays)[1](d))
  dq, dk, dp, dgates = pull(arrays, d)
  # The vectors' own cotangents pass through; the products' add to them.
  through = lambda x, y: None if x is None else np.asarray(x) - y
  (dQ, dK, dP), *want = makers(z, *scalar(z), d)
  close(through(dq, d.q), dQ)
  close(through(dk, d.k), dK)
  if z["free"]:
    close(through(dp, d.p), dP)
  jax.tree.map(close, tuple(dgates), tuple(want))


@pytest.mark.parametrize("segments", ["one", "three"])
@pytest.mark.parametrize("member", ["linear", "gdn", "gdn_erase"])
def test_per_channel(member, segments):
  """Section 5: the system, by pairs, and the borders between halves."""
  z = problem(member, segments, channels=K)
  A, a = decays(z["log_alpha"], z["seg"])
  A_, a_ = A * np.tri(C, k=-1)[..., None], a
  if z["free"]:
    A_, a_ = decays(z["log_alpha"], z["seg"], before=True)
  P, beta = z["P"] if z["free"] else z["K"], z["beta"]
  scores = lambda x, A: np.einsum("td,jd,tjd->tj", x, z["K"], A) * beta.T
  ones = np.ones((C, 1))
  s = dict(
    at=SCALE * scores(z["Q"], A),
    lower=scores(P, A_) if z["delta"] else None,
    p_scale=(ones,) if z["delta"] else (),
    q_scale=(SCALE * ones,),
    k_scale=(beta,),
    decay=((a[-1:].T,),),
  )
  vectors = P * a_, z["Q"] * a, z["K"] * A[-1]
  O, _, X = step(s, vectors, z["V"], z["X"])
  want_o, want_x = recurrence(z)
  close(O, want_o)
  jax.tree.map(close, X, want_x)

  for whole in (False, True):
    builder, arrays = make(vector.vector_system, z, whole=whole)
    system = jax.jit(builder)(*arrays)
    for name, want in s.items():
      jax.tree.map(close, getattr(system, name), want)
    names = ("p", "q", "k") if z["delta"] else ("q", "k")
    for name, want in zip(names, vectors[-len(names) :], strict=True):
      close(getattr(system, name), want)


def test_borders_between_halves():
  for t in range(64):
    for j in range(t):
      levels = [
        h
        for h in (1, 2, 4, 8, 16, 32)
        if t // (2 * h) == j // (2 * h) and t // h > j // h
      ]
      assert levels == [1 << ((t ^ j).bit_length() - 1)]
      border = t // levels[0] * levels[0]
      assert j < border <= t


def test_inverse():
  """Section 6: what is small, what is not, and one doubling."""
  lower = np.tri(64, k=-1)
  want = np.eye(64) - np.eye(64, k=-1)
  np.testing.assert_array_equal(np.linalg.inv(np.eye(64) + lower), want)
  with jax.enable_x64(False):
    got = jax.jit(inverse.unit_lower_inverse)(lower.astype(np.float32))
  np.testing.assert_array_equal(got, want)
  power = np.linalg.matrix_power(lower, 32)
  assert power[63, 0] == math.comb(62, 31) > 1e17
  # The Neumann product in float32.
  x, square = np.eye(64, dtype=np.float32), -lower.astype(np.float32)
  for _ in range(6):
    x, square = x + square @ x, square @ square
  assert not np.abs(x - want).max() < 1e6

  rng = np.random.default_rng(3)
  k, beta = unit(rng.standard_normal((C, K)) + 1), rng.uniform(0, 2, (C, 1))
  L = np.tril(k @ k.T, -1) * beta.T
  T = np.linalg.inv(np.eye(C) + L)
  assert (np.abs(np.tril(T, -1)) <= beta.T).all()
  half = np.kron(np.eye(2), np.ones((C // 2, C // 2)))
  X = np.linalg.inv(np.eye(C) + L * half)
  close(X - X @ (L * (1 - half)) @ X, T)


def test_masked_sums_of_logarithms():
  """Section 4: a strong gate costs other pairs nothing in float32."""
  rng = np.random.default_rng(4)
  size = 64
  g = -rng.uniform(0, 0.1, (size, 1))
  g[20] = -1000.0
  gates = chunk.Gates(g.astype(np.float32))
  x = np.zeros((size, K), np.float32)
  with jax.enable_x64(False):
    # Without momentum and the delta rule, the last row of A is k_scale.
    make = lambda gates: chunk.scalar_system(
      x, x, None, gates, None, scale=1.0, delta=False
    )
    row = np.asarray(jax.jit(make)(gates).k_scale[0])[:, 0]
  g = gates.log_decay.astype(np.float64)
  want = np.exp([g[j + 1 :].sum() for j in range(size)])
  assert np.abs(row - want).max() <= 0.37 * size * 2**-24
  sums = np.cumsum(gates.log_decay[:, 0], dtype=np.float32)
  difference = np.exp((sums[-1] - sums).astype(np.float64))
  assert np.abs(difference - want).max() > 1e-5


@pytest.mark.parametrize("member", MEMBERS)
def test_pieces(member):
  """Section 10: the maps, from their formulas and from a walk."""
  z = problem(member, "one")
  s, extra = scalar(z)
  vectors = P, Q, key = extra["P"], z["Q"], z["K"]
  M = z["order"]
  T = np.linalg.inv(np.eye(C) + s["lower"]) if z["delta"] else np.eye(C)
  erased = lambda n: T @ (s["p_scale"][n] * P) if z["delta"] else 0 * P
  zero = np.zeros((1, 1))
  D = [[zero if d is None else d for d in row] for row in s["decay"]]
  phi = np.block(
    [
      [
        D[m][n] * np.eye(K) - (s["k_scale"][m] * key).T @ erased(n)
        for n in range(M)
      ]
      for m in range(M)
    ]
  )
  omega = np.hstack(
    [s["q_scale"][n] * Q - s["at"] @ erased(n) for n in range(M)]
  )
  psi = np.vstack([(k * key).T @ T @ z["V"] for k in s["k_scale"]])
  O, _, X = step(s, vectors, z["V"], z["X"])
  entering = np.vstack(z["X"])
  close(phi @ entering + psi, np.vstack(X))
  close(omega @ entering + s["at"] @ T @ z["V"], O)

  basis = np.hstack([np.zeros((M * K, V)), np.eye(M * K)])
  values = np.hstack([z["V"], np.zeros((C, M * K))])
  O, _, X = step(s, vectors, values, tuple(np.split(basis, M)))
  close(O, np.hstack([s["at"] @ T @ z["V"], omega]))
  close(np.vstack(X), np.hstack([psi, phi]))


def products(f, *args):
  """Floating point operations per token in the products of a function."""
  total = 0

  def walk(jaxpr):
    nonlocal total
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        inner = math.prod(shape[i] for i in axes)
        total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
      for sub in eqn.params.values():
        if hasattr(sub, "jaxpr"):
          walk(sub.jaxpr)

  walk(jax.make_jaxpr(f)(*args).jaxpr)
  return total / args[0].shape[0]


@pytest.mark.parametrize("member", MEMBERS)
def test_costs(member):
  """Section 11: the products of a traced chunk."""
  delta, M, free = MEMBERS[member]
  C, K, V = 64, 24, 40
  x = lambda *shape: jnp.ones(shape)
  gates = chunk.Gates(
    x(C, 1),
    x(C, 1) if M == 2 else None,
    x(C, 1) if delta else None,
    x(C, 1) if M == 2 else None,
  )
  make = lambda q, k, p, gates: chunk.scalar_system(
    q, k, p, gates, None, scale=SCALE, delta=delta
  )
  arrays = x(C, K), x(C, K), x(C, K) if free else None, gates
  scores = 4 * C * K if delta else 2 * C * K
  square, linear = {
    (1, False): (2, 0),
    (1, True): (4, 0),
    (2, False): (6, 2),
    (2, True): (10, 4),
  }[M, free]
  assert products(make, *arrays) == scores + square * C**2 + linear * C

  system, state = make(*arrays), (x(K, V),) * M
  T = x(C, C) if delta else None
  forward, backward = 4 * K * V + 2 * C * V, 8 * K * V + 4 * C * V
  if delta:
    forward, backward = 6 * M * K * V + 4 * C * V, 12 * M * K * V + 8 * C * V
  run = lambda v: chunk.step(system, T, v, state)
  assert products(run, x(C, V)) == forward
  run = lambda do: chunk.step_vjp(system, T, x(C, V), state, do, state)
  assert products(run, x(C, V)) == backward


def test_costs_of_the_inverse_and_per_channel():
  C, K = 128, 24
  x = lambda *shape: jnp.ones(shape)
  got = products(inverse.unit_lower_inverse, x(C, C))
  assert got == 4 * C**2 * math.log2(C / 16) + 64 * C
  gates = chunk.Gates(x(C, K), None, x(C, 1))
  for delta, each in ((False, 4), (True, 6)):
    make = lambda q, delta=delta: vector.vector_system(
      q, q, None, gates, None, scale=SCALE, delta=delta
    )
    assert products(make, x(C, K)) == each * K * (2 * C + 32) + 4 * C * K


def test_document():
  """Its links and names lead somewhere, its figure is well-formed."""
  for target in re.findall(r"\]\(([^)]+)\)", TEXT):
    assert (FOLDER / target).exists(), target
  root = FOLDER.parents[1]
  for path in re.findall(r"`((?:tests|experiments)/[^`]+)`", TEXT):
    assert (root / path).exists(), path
  names = set(re.findall(r"^\| \$.*?\| (`.*?`) \|", TEXT, re.MULTILINE))
  names = {name for cell in names for name in re.findall(r"`(\w+)`", cell)}
  code = (FOLDER / "chunk.py").read_text(encoding="utf-8")
  assert len(names) > 15
  for name in names:
    assert re.search(rf"\b{name}\b", code), name
  ET.parse(FOLDER / "chunk.svg")
