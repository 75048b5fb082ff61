"""Block-sparse problems as a table, and the slow sums they are checked by."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas import BlockIndices
from kernels_pallas.sparse import problem, reference

TAILS = ("drop", "mean", "mean_global", "mean_local", "mean_var")
# Sums of a few hundred terms of order one, each rounded to 2^-53 or 2^-24;
# gradients sum products of such sums.
F64 = dict(atol=1e-12, rtol=1e-12)
F32 = dict(atol=2e-5, rtol=2e-5)


@dataclasses.dataclass(frozen=True)
class Case:
  """One problem; the odd sizes are on purpose.

  Attributes:
    b: batch, and so on in the letters of `kernels_pallas.sparse.problem`.
    longest: M, 0 for NK / 2.
    segments: how many segments, 0 for None.
    sinks: whether there are learned sinks.
  """

  b: int = 2
  t: int = 50
  s: int = 50
  h: int = 4
  g: int = 2
  k: int = 12
  v: int = 7
  block_q: int = 16
  block_kv: int = 16
  longest: int = 0
  causal: bool = False
  segments: int = 0
  sinks: bool = False

  @property
  def num_q(self) -> int:
    return -(-self.t // self.block_q)

  @property
  def num_kv(self) -> int:
    return -(-self.s // self.block_kv)


CASES = {
  "cross": Case(t=33, s=80, sinks=True),
  "one query": Case(b=1, t=1, s=50, h=1, g=1),
  "one block": Case(b=1, t=15, s=15, h=2, g=1, sinks=True),
  "causal": Case(causal=True, sinks=True),
  "causal wide queries": Case(b=1, t=100, s=100, block_q=32, causal=True),
  "causal wide keys": Case(b=1, t=64, s=64, block_kv=32, causal=True),
  "segments": Case(segments=4),
  "causal segments": Case(t=63, s=63, causal=True, segments=3, sinks=True),
  "complete lists": Case(longest=4, causal=True),
  "one head": Case(h=1, g=1, k=1, v=1),
}


def random_lists(case: Case, rng: np.random.Generator) -> BlockIndices:
  """Lists of every length, in any order; padding repeats the last."""
  most = case.longest or max(1, case.num_kv // 2)
  shape = (case.b, case.h, case.num_q)
  counts = rng.integers(1, most + 1, shape).astype(np.int32)
  indices = np.zeros((*shape, most), np.int32)
  for where in np.ndindex(shape):
    n = counts[where]
    indices[where][:n] = rng.permutation(case.num_kv)[:n]
    indices[where][n:] = indices[where][n - 1]
  return BlockIndices(jnp.asarray(indices), jnp.asarray(counts))


def make(case: Case, *, seed: int = 0, dtype=np.float64) -> dict:
  """The arguments of `block_sparse_attention`, and cotangents."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  args = dict(
    q=normal(case.b, case.t, case.h, case.k),
    k=normal(case.b, case.s, case.g, case.k),
    v=normal(case.b, case.s, case.g, case.v),
    blocks=random_lists(case, rng),
    block_q=case.block_q,
    block_kv=case.block_kv,
    causal=case.causal,
    segment_ids=None,
    sinks=None,
  )
  if case.segments:
    ids = rng.integers(0, case.segments, (case.b, case.t))
    args["segment_ids"] = jnp.asarray(np.sort(ids, axis=1))
  if case.sinks:
    args["sinks"] = normal(case.h)
  return args


def run(args: dict, tail: str, implementation: str, **options):
  """Output, log-partition and the gradients of every floating input.

  Rows that see nothing have a log-partition that no gradient flows through.
  """
  static = {x: args[x] for x in ("block_q", "block_kv", "causal")}
  static |= dict(tail=tail, implementation=implementation, **options)
  x = {name: args[name] for name in ("q", "k", "v", "sinks")}
  (_, (out, lse)), grads = _run(tuple(static.items()))(
    x, args["blocks"], args["segment_ids"]
  )
  grads = {name: grad for name, grad in grads.items() if grad is not None}
  return dict(out=out, lse=lse, **grads)


@functools.cache
def _run(static):
  """The jitted function of some static arguments: shapes may come again."""

  def loss(x, blocks, segment_ids):
    out, lse = kernels_pallas.block_sparse_attention(
      **x,
      blocks=blocks,
      segment_ids=segment_ids,
      return_lse=True,
      **dict(static),
    )
    wide = jnp.promote_types(out.dtype, jnp.float32)
    rng = np.random.default_rng(99)
    weights = jnp.asarray(rng.normal(size=out.shape), wide)
    lse_weights = jnp.asarray(rng.normal(size=lse.shape), wide)
    seen = jnp.where(lse > -1e29, lse, 0)
    total = jnp.sum(out.astype(wide) * weights) + jnp.sum(seen * lse_weights)
    return total, (out, lse)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def by_hand(args: dict, tail: str) -> tuple[np.ndarray, np.ndarray]:
  """Output and log-partition, one query and one key at a time, in NumPy."""
  wide = lambda x: np.asarray(x, np.float64)
  q, k, v = (wide(args[x]) for x in "qkv")
  scale = q.shape[-1] ** -0.5
  indices, counts = (np.asarray(x) for x in args["blocks"][:2])
  repeat = q.shape[2] // k.shape[2]
  out = np.zeros((*q.shape[:3], v.shape[3]))
  lse = np.full(q.shape[:3], -1e30)
  for b, t, h in np.ndindex(q.shape[:3]):
    block = t // args["block_q"]
    listed = indices[b, h, block, : counts[b, h, block]]
    terms = _terms(
      args, tail, q[b, t, h], k[b, :, h // repeat], v[b, :, h // repeat],
      (b, t), set(listed.tolist()), scale,
    )  # fmt: skip
    if args["sinks"] is not None:
      terms.append((float(args["sinks"][h]), 0.0, 0.0))
    if not terms:
      continue
    top = max(score for score, _, _ in terms)
    total = sum(np.exp(score - top) for score, _, _ in terms)
    out[b, t, h] = (
      sum(
        np.exp(score - top) * (value + first) for score, value, first in terms
      )
      / total
    )
    lse[b, t, h] = top + np.log(total)
  return out, lse


def _terms(args, tail, q, k, v, where, listed, scale):
  """(score, value, first-order value) of all that one query meets."""
  b, t = where
  size = args["block_kv"]
  ids = args["segment_ids"]
  start = t // args["block_q"] * args["block_q"]
  blocks = [range(i, min(i + size, len(k))) for i in range(0, len(k), size)]

  def sees(s):
    later = args["causal"] and s > t
    return not later and (ids is None or ids[b, s] == ids[b, t])

  def moments(keys):
    mean = k[list(keys)].mean(0)
    return mean, sum(np.outer(k[s] - mean, v[s]) for s in keys)

  behind = [
    keys
    for i, keys in enumerate(blocks)
    if not args["causal"] or (i + 1) * size <= start
  ]
  terms = []
  for j, keys in enumerate(blocks):
    if j in listed:
      terms += [(scale * q @ k[s], v[s], 0.0) for s in keys if sees(s)]
    elif tail != "drop" and keys in behind and all(sees(s) for s in keys):
      mean, matrix = moments(keys)
      score = scale * q @ mean + np.log(len(keys))
      first = 0.0
      if tail == "mean_var":
        spread = ((k[list(keys)] - mean) ** 2).mean(0)
        score += min(scale**2 * (q**2 @ spread) / 2, 2.0)
      if tail == "mean_local":
        first = scale * q @ matrix / len(keys)
      if tail == "mean_global":
        whole = sum(moments(keys)[1] for keys in behind)
        first = scale * q @ whole / sum(len(keys) for keys in behind)
      terms.append((score, v[list(keys)].mean(0), first))
  return terms


@functools.cache
def expected(name: str, tail: str) -> dict:
  """What the reference says of a case, in float64: jitted once."""
  return run(make(CASES[name]), tail, "reference")


def check(got: dict, wanted: dict, *, atol: float, rtol: float) -> None:
  """Every array of `got` against `wanted`, relative to its largest entry."""
  assert got.keys() == wanted.keys()
  for name, x in wanted.items():
    x = np.asarray(x, np.float64)
    size = np.abs(x[x > -1e29]).max(initial=0.0)
    np.testing.assert_allclose(
      np.asarray(got[name], np.float64),
      x,
      rtol=rtol,
      atol=atol * max(1.0, size),
      err_msg=name,
    )


def check_float64(case: Case, tail: str, **options: Any) -> None:
  """An implementation against the reference, both in float64."""
  with jax.enable_x64(True):
    args = make(case)
    check(run(args, tail, **options), run(args, tail, "reference"), **F64)


def in_float64(args: dict, tail: str) -> dict:
  """What the reference says of the same numbers in float64."""
  names = [x for x in ("q", "k", "v", "sinks") if args[x] is not None]
  with jax.enable_x64(True):
    wide = {name: args[name].astype(np.float64) for name in names}
    return run(args | wide, tail, "reference")


def bfloat16(name: str, tail: str, **options) -> None:
  """Runs a case in bfloat16 and holds it to the RMS of its float64 values."""
  args = make(CASES[name], dtype=jnp.bfloat16)
  args["sinks"] = args["sinks"].astype(jnp.float32)
  check_bfloat16(run(args, tail, **options), in_float64(args, tail))


def check_bfloat16(got: dict, wanted: dict) -> None:
  """Probabilities, score gradients, pooled keys and results are rounded to
  2^-9 each."""
  assert got["out"].dtype == got["q"].dtype == jnp.bfloat16
  assert got["lse"].dtype == jnp.float32
  for name in ("out", "q", "k", "v"):
    error = np.asarray(got[name], np.float64) - np.asarray(wanted[name])
    size = np.sqrt(np.mean(np.square(wanted[name])))
    assert np.sqrt(np.mean(error**2)) < 4 * 2**-9 * size, name


def check_bands(run_interpreted) -> None:
  """Bands, sink tokens, blocks with fewer keys or none, rows that see nothing.

  Args:
    run_interpreted: an implementation's `run(inputs, options)`.
  """
  case = Case(b=1, h=4, g=2)
  rng = np.random.default_rng(1)
  options = problem.Options(
    scale=0.3, block_q=case.block_q, block_kv=case.block_kv, interpret=True
  )

  def values_and_grads(run, inputs):
    def f(q, k, v):
      out, lse = run(inputs._replace(q=q, k=k, v=v), options)
      seen = jnp.where(lse > problem.MASKED / 2, lse, 0)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(seen)), (out, lse)

    f = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
    (_, (out, lse)), (q, k, v) = f(*inputs[:3])
    return dict(out=out, lse=lse, q=q, k=k, v=v)

  with jax.enable_x64(True):
    args = make(case)
    lengths = rng.integers(0, case.block_kv + 1, (case.b, case.g, case.num_kv))
    last = case.s - (case.num_kv - 1) * case.block_kv
    lengths[..., -1] = np.minimum(lengths[..., -1], last)
    bands = rng.integers((-20, 0), (0, 50), (case.h, 2, 2))
    inputs = problem.Inputs(
      q=args["q"],
      k=args["k"],
      v=args["v"],
      indices=args["blocks"].indices,
      counts=args["blocks"].counts,
      lengths=jnp.asarray(lengths, jnp.int32),
      bands=jnp.asarray(bands, jnp.int32),
      sink_tokens=jnp.arange(case.h, dtype=jnp.int32) * 3,
    )
    wanted = values_and_grads(reference.run, inputs)
    unseen = np.asarray(wanted["lse"]) == problem.MASKED
    assert 0 < np.mean(unseen) < 0.5
    check(values_and_grads(run_interpreted, inputs), wanted, **F64)
