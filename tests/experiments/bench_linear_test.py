"""The linear benchmark's floor, its values' check, and what it may print."""

import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from experiments import bench_linear, contender, errors
from experiments.linear import cases, floors, worker
from jaxlib_ext import records
from tests.experiments import runs

TINY = cases.Shape(1, 40, 2, 8, 8)


def _nested(params):
  for value in params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      if hasattr(x, "eqns"):
        yield x
      elif hasattr(x, "jaxpr"):
        yield x.jaxpr


def matmul_flops(jaxpr, times=1):
  """2 m n k of every product of a jaxpr, as often as scans repeat it."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      terms = math.prod(shape[i] for i in contracted)
      total += times * 2 * terms * math.prod(eqn.outvars[0].aval.shape)
    else:
      repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
      for inner in _nested(eqn.params):
        total += matmul_flops(inner, times * repeats)
  return total


def _between(log_gate):
  sums = jnp.cumsum(log_gate)
  return jnp.tril(jnp.exp(jnp.tril(sums[:, None] - sums)))


def _before(x):
  return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def _textbook(op, invert, states, q, k, v, log_decay, **gates):
  """One chunk of one head by the published forms: o and the new states.

  Args:
    op: "mdn", "gdn" or "linear".
    invert: gives (I + L)^-1 of L.
    states: those that enter, `[K, V]`.
    q: `[C, K]`.
    k: `[C, K]`.
    v: `[C, V]`.
    log_decay: `[C]`.
    **gates: the others, `[C]`.
  """
  a, decay = jnp.exp(jnp.cumsum(log_decay)), _between(log_decay)
  into_o, into_state = [a], [[a[-1]]]
  if op == "mdn":
    m = jnp.exp(jnp.cumsum(gates["log_momentum"]))
    momentum = _between(gates["log_momentum"]) * gates["eta"]
    gamma = (decay * gates["beta"]) @ momentum
    b = jnp.sum(decay * (gates["beta"] * m), axis=1)
    into_o, into_state = [a, b], [[a[-1], b[-1]], [0.0, m[-1]]]
    weights = [gamma[-1], momentum[-1]]
  else:
    gamma = decay * gates.get("beta", 1.0)
    weights = [gamma[-1]]
  mix = lambda row, terms: sum(x * y for x, y in zip(row, terms, strict=True))
  columns = [x[:, None] for x in into_o]
  e = v
  if op != "linear":
    p = jnp.exp(log_decay)[:, None] * k
    met = [_before(x) for x in columns]
    met[0] = met[0].at[0].set(1.0)
    e = v - mix(met, [p @ x for x in states])
    e = invert((p @ k.T) * _before(gamma)) @ e
  o = ((q @ k.T) * gamma) @ e + mix(columns, [q @ x for x in states])
  return o, *(
    k.T @ (weight[:, None] * e) + mix(row, states)
    for row, weight in zip(into_state, weights, strict=True)
  )


@pytest.mark.parametrize("op", ["mdn", "gdn", "linear"])
@pytest.mark.slow
def test_forward_floor_is_the_count_of_the_published_form(op):
  size = 16
  shape = cases.Shape(1, size, 1, 6, 10)
  with jax.enable_x64(True):
    arrays, (_, *states) = cases.make(op, shape, "float64")
    states = tuple(jnp.asarray(x, float) for x in states)
    rows = {name: jnp.asarray(x[0, :, 0], float) for name, x in arrays.items()}
    run = lambda invert: _textbook(
      op, invert, [x[0, 0] for x in states], **rows
    )
    got = run(lambda lower: jnp.linalg.inv(jnp.eye(size) + lower))
    want = jax.tree.leaves(
      cases.OPS[op][0](
        **arrays,
        scale=1.0,
        initial_state=(
          kernels_pallas.MomentumState(*states) if op == "mdn" else states[0]
        ),
        implementation="reference",
      )
    )
    for x, y in zip(got, want, strict=True):
      y = y.reshape(x.shape)
      np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    # The inverse has a count of its own.
    counted = matmul_flops(jax.make_jaxpr(lambda: run(lambda x: x))().jaxpr)
  floor = floors.forward(op, size, shape.key, shape.value)
  if op != "linear":
    floor -= floors.inverse(size)
  assert counted == size * floor


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("size", [32, 64])
def test_nothing_goes_below_the_floor(op, size):
  shape = cases.Shape(1, 256, 2, 64, 64)
  arrays, cotangents = cases.make(op, shape, "float32")
  run = lambda arrays: tuple(
    jax.tree.leaves(
      cases.OPS[op][0](**arrays, implementation="xla", chunk_size=size)
    )
  )
  gradient = lambda arrays: jax.vjp(run, arrays)[1](cotangents)
  floor = floors.forward(op, size, shape.key, shape.value)
  for f, more in (
    (run, 0),
    (gradient, floors.backward(op, size, shape.key, shape.value)),
  ):
    counted = matmul_flops(jax.make_jaxpr(f)(arrays).jaxpr)
    # Up to three times as many: per-channel decay has log2 C scores, and
    # products with zeros, which take the place of slices, are counted too.
    assert 1 <= counted / (shape.token_heads * (floor + more)) < 3


def test_inverse_counts_triples_and_halves():
  triples = sum(1 for i in range(16) for k in range(i) for _ in range(k))
  assert 16 * floors.inverse(16) == 2 * triples
  # 16 to 32: per pair of blocks two products of 16 x 16 matrices.
  joined = 32 * floors.inverse(32)
  assert joined == 2 * (2 * triples) + 2 * 2 * 16**3


def test_arrays_fit_their_op():
  arrays, cotangents = cases.make("mdn", TINY, "bfloat16")
  assert list(arrays)[3:] == ["log_decay", "log_momentum", "beta", "eta"]
  assert arrays["q"].dtype == cotangents[0].dtype == jnp.bfloat16
  assert arrays["eta"].dtype == cotangents[1].dtype == jnp.float32
  cut, first = cases.first_tokens((arrays, cotangents), 16)
  assert cut["v"].shape == first[0].shape == (1, 16, 2, 8)
  assert first[1].shape == (1, 2, 8, 8)


def test_scan_is_differentiated_only_where_it_fits():
  for name in cases.CPU_SHAPES:
    shape = cases.SHAPES[name]
    assert cases.scan_length("mdn", shape) == shape.length
  large = cases.SHAPES["B1_T8192_H96_D128"]
  assert cases.scan_length("mdn", large) == 128


def test_values_must_agree_to_rounding():
  want = {"o": np.array([1.0, -4.0]), "dq": np.array([2.0, 1.0])}
  off = lambda o, dq: {"o": want["o"] + o, "dq": want["dq"] + dq}
  judge = lambda got: cases.disagreement(
    cases.largest_errors(got, want), "float32"
  )
  assert judge(off(7e-5, 3e-4)) is None
  assert "o differs by 2.5e-05" in judge(off(1e-4, 0))
  assert "dq differs" in judge(off(0, 5e-4))
  assert "o differs" in judge(off(np.nan, 0))


def test_judge_takes_ratios_round_by_round():
  turns = {"reference": [4.0, 9.0, 2.0], "xla/16": [2.0, 3.0, 4.0]}
  rate = 16 * TINY.token_heads * floors.forward("gdn", 16, 8, 8)
  walks = {"xla/16": rate / 4}
  out = bench_linear.judge("gdn", TINY, {"forward": turns}, rate, walks)
  assert out["floor"]["forward"] == {"xla/16": 1 / 16}
  assert out["of_floor"]["forward"] == {"xla/16": 48}
  assert out["of_walk"]["forward"] == {"xla/16": 12}
  assert out["ratio"]["forward"]["xla/16"] == {
    "reference": {"median": 2.0, "min": 0.5, "max": 3.0}
  }


@pytest.mark.parametrize(
  "name, size",
  [("xla/auto", 64), ("pallas_tpu/16", 16), ("reference", None), ("jla", None)],
)
def test_chunk_sizes(name, size):
  shape = cases.Shape(1, 300, 2, 8, 8)
  assert bench_linear.chunk_size("linear", shape, name) == size


@pytest.fixture
def flags(monkeypatch, tmp_path):
  """What main reads, small."""
  monkeypatch.setitem(cases.SHAPES, "tiny", TINY)
  values = types.SimpleNamespace(
    ops=["linear"],
    shapes=["tiny"],
    implementations=["xla"],
    chunk_sizes=["16", "auto"],
    dtype="float32",
    rounds=2,
    peer_python="",
    record=str(tmp_path / "records" / "out.jsonl"),
  )
  monkeypatch.setattr(bench_linear.flags, "FLAGS", values)
  monkeypatch.setattr(bench_linear.host, "keep_freed_memory", lambda: None)
  return values


def test_main_checks_times_and_records(flags, capsys):
  # This interpreter has no jax-linear-attention.
  flags.peer_python = sys.executable
  bench_linear.main()
  out = capsys.readouterr().out
  assert "of the floor of" in out
  assert "jla not measured: ModuleNotFoundError: No module named 'jla'" in out
  (record,) = records.read(flags.record)
  assert record["name"] == "tiny"
  assert set(record["errors"]["xla/16"]) == {
    *("o", "state0", "dq", "dk", "dv", "dlog_decay")
  }
  for mode in bench_linear.MODES:
    assert set(record["seconds"][mode]) == {"reference", "xla/16", "xla/auto"}
    assert all(len(x) == 2 for x in record["seconds"][mode].values())
    assert record["temp_bytes"]["xla/16"][mode] > 0
    assert record["of_floor"][mode]["xla/16"] > 0
    assert record["of_walk"][mode]["xla/16"] > 0


@pytest.mark.slow
def test_gradients_are_compared_where_the_scan_has_them(monkeypatch):
  # 1024 bytes a token: half of TINY's 40 tokens.
  monkeypatch.setattr(cases, "_SCAN_BYTES", 20 * 1024)
  record = bench_linear.measure("linear", TINY, ["xla/16"], rounds=1)
  assert set(record["errors"]["xla/16"]) >= {"o", "state0", "dq"}
  assert set(record["seconds"]["forward"]) == {"reference", "xla/16"}
  assert set(record["seconds"]["gradient"]) == {"xla/16"}
  assert "reference gradient" in record["missing"]
  assert "reference gradient not measured" in bench_linear.report(record)


def test_main_times_nothing_that_disagrees(flags, capsys, monkeypatch):
  monkeypatch.setitem(cases.TOLERANCES, "float32", (0.0, 0.0))
  with pytest.raises(SystemExit, match="differs by .* no time is taken"):
    bench_linear.main()
  assert not capsys.readouterr().out
  assert not records.read(flags.record)


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("ops", ["mnd"], "--ops: got \\['mnd'\\], allowed: .*'mdn'"),
    ("shapes", ["T1"], "--shapes: got .*T4096_H4_D128"),
    ("chunk_sizes", ["48"], "--chunk_sizes: got .*'auto', '16'"),
    ("peer_python", "/no/python", "--peer_python: .* no program"),
    ("implementations", ["mosaic"], "mosaic/16: .*reference, xla"),
  ],
)
def test_bad_flags(flags, field, value, words):
  setattr(flags, field, value)
  with pytest.raises(errors.UserError, match=words):
    bench_linear.main()


def test_mistakes_end_in_one_line():
  process = subprocess.run(
    [sys.executable, "-m", "experiments.bench_linear", "--shapes=T1"],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 2
  assert process.stderr.startswith("bench_linear: --shapes: got ['T1']")
  assert process.stderr.count("\n") == 1


def test_peer_gets_its_own_names(monkeypatch, tmp_path):
  """A stand-in for `jla` that computes by our reference."""
  given = {}

  def linear_attention(kind, q, k, v, *, impl, output_final_state, g, beta):
    given.update(kind=kind, impl=impl, state=output_final_state)
    return kernels_pallas.gated_delta_rule(
      q, k, v, g, beta, implementation="reference"
    )

  ops = types.SimpleNamespace(linear_attention=linear_attention)
  monkeypatch.setitem(sys.modules, "jla", types.SimpleNamespace(ops=ops))
  monkeypatch.setattr(worker.host, "keep_freed_memory", lambda: None)
  arrays, cotangents = cases.make("gdn", TINY, "bfloat16")
  path = str(tmp_path / "problem.npz")
  dtypes = worker.save(path, arrays, cotangents)
  side = worker.peer("gdn", path, dtypes)
  assert given == {"kind": "gated_deltanet", "impl": "chunked", "state": True}
  run = lambda **arrays: kernels_pallas.gated_delta_rule(
    **arrays, implementation="reference"
  )
  want = contender.Contender(run, arrays, cotangents).values()
  answer = worker.answer
  saved = answer(side, {"do": "values", "path": str(tmp_path / "out.npz")})
  with np.load(saved) as got:
    assert set(got) == set(want)
    for name, x in want.items():
      np.testing.assert_array_equal(got[name], x)
  seconds = {"do": "seconds", "mode": "forward", "calls": 2}
  assert answer(side, seconds) > 0
  assert set(answer(side, {"do": "temp_bytes"})) == set(bench_linear.MODES)
