"""The saddle: its curvatures, its steps, its record."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import errors, muon_saddle
from experiments.analyses import saddle_picture
from jaxlib_ext import records
from tests.experiments import runs


def options(tmp_path, **changes):
  return muon_saddle.Options(
    **{
      "norms": ("rms", "spectral"),
      "directions": ("dense",),
      "shapes": ("entries",),
      "dims": (32,),
      "methods": ("muon", "sign descent"),
      "seeds": 2,
      "rate": 0.05,
      "noise": 0.1,
      "condition": 10.0,
      "max_steps": 200,
      "record": tmp_path / "r.jsonl",
      **changes,
    }
  )


def test_origin_is_a_strict_saddle_of_one_direction():
  _, (v,), s = muon_saddle.problem((4, 8), "dense", [0], 0.1, 10.0)
  flat = lambda w: 32 * muon_saddle.loss(w.reshape(4, 8), v, s)
  zero = jnp.zeros(32)
  np.testing.assert_allclose(jax.grad(flat)(zero), 0, atol=1e-7)
  values, vectors = np.linalg.eigh(jax.hessian(flat)(zero))
  assert values[0] == pytest.approx(-1, abs=1e-5)
  # Rows' curvatures go from 1 / 10 to 1; V takes one direction out of them.
  assert 0.09 < values[1] and values[-1] < 1.01
  assert abs(vectors[:, 0] @ v.ravel()) == pytest.approx(1, abs=1e-5)
  minimum = jnp.sqrt(32.0) * v
  assert float(muon_saddle.loss(minimum, v, s)) == pytest.approx(-0.25)
  gradient = jax.grad(muon_saddle.loss)(minimum, v, s)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_norms(shape):
  u = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
  want = np.linalg.norm(u, 2, axis=(1, 2)) / np.sqrt(32)
  got = muon_saddle._size(jnp.asarray(u), "spectral")
  np.testing.assert_allclose(got.ravel(), want, rtol=1e-5)
  got = muon_saddle._size(jnp.asarray(u), "rms")
  rms = np.sqrt(np.mean(u**2, axis=(1, 2)))
  np.testing.assert_allclose(got.ravel(), rms, rtol=1e-6)
  # Of a rank of one they are equal, however small.
  one = jnp.asarray(1e-25 * np.outer(u[0, :, 0], u[0, 0])[None], jnp.float32)
  sizes = [float(muon_saddle._size(one, norm)[0, 0, 0])
           for norm in muon_saddle.NORMS]  # fmt: skip
  assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_escape_along_v_is_the_shortest_way():
  """From a start on the line, gradient descent goes straight."""
  _, v, s = muon_saddle.problem((4, 8), "sparse", [0, 1], 0.1, 10.0)
  assert np.sort(v.reshape(2, -1))[:, -2:].tolist() == [[0, 1]] * 2
  start = 1e-3 * np.sqrt(32) * v
  steps, aligned = muon_saddle.escape(
    optax.identity(), start, v, s, norm="rms", rate=0.1, max_steps=50
  )
  np.testing.assert_allclose(aligned, 1, rtol=1e-5)
  # x = 1e-3 + 0.1 n first exceeds sqrt(1 - sqrt(1/2)) = 0.541 at n = 6.
  np.testing.assert_array_equal(steps, 6)
  steps, _ = muon_saddle.escape(
    optax.identity(), start, v, s, norm="rms", rate=0.1, max_steps=5
  )
  np.testing.assert_array_equal(steps, -1)


def test_shapes_have_the_dimension_they_say():
  for dim in muon_saddle.DIMS:
    rows, columns = muon_saddle.SHAPES["entries"](dim)
    assert rows * columns == dim and rows in (columns, 2 * columns)
    assert muon_saddle.SHAPES["tall"](dim) == (dim, 16)


@pytest.mark.slow
def test_runs_record_and_resume(tmp_path, capsys):
  first = muon_saddle.run(options(tmp_path))
  path = tmp_path / "r.jsonl"
  text = path.read_text()
  assert len(first) == len(records.read(path)) == 8
  assert all(r["steps"] > 10 and r["git"] for r in first)
  # The line that a kill cut is run again, nothing else is.
  path.write_text(text[: text.rindex('"steps"')])
  again = muon_saddle.run(options(tmp_path))
  assert len(records.read(path)) == 8
  assert [r["steps"] for r in again] == [r["steps"] for r in first]
  saddle_picture.draw(again, path)
  assert path.with_suffix(".png").stat().st_size > 1000
  assert "<svg" in path.with_suffix(".svg").read_text()
  table = saddle_picture.table(again).splitlines()
  assert len(table) == 6 and table[2].startswith(
    "| rms | dense | entries | muon |"
  )


def test_growth_is_the_exponent():
  steps = {d: [3 * d**0.5] * 3 for d in (4, 16, 64)}
  assert saddle_picture.growth(steps) == pytest.approx(0.5)
  assert np.isnan(saddle_picture.growth({4: [1.0]}))


def test_bad_flags_get_one_line(tmp_path):
  for changes, words in (
    ({"shapes": ("round",)}, "--shapes: got 'round'; allowed: entries"),
    ({"dims": (33,)}, "--dims: got 33; allowed: powers of two"),
  ):
    with pytest.raises(errors.UserError, match=words):
      options(tmp_path, **changes)
  done = subprocess.run(
    [sys.executable, "-m", "experiments.muon_saddle", "--methods=lion"],
    cwd=runs.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert "--methods: got 'lion'; allowed: muon" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
