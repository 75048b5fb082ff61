"""The stability study: its formulas against what they describe."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from experiments import linear_stability
from experiments.linear import coefficients
from jaxlib_ext import records
from kernels_pallas.linear import chunk


def _gates(shape, *, constrained=False):
  rng = np.random.default_rng(3)
  return linear_stability.uniform_gates(rng, shape, constrained)


def test_step_matrix_is_what_a_token_does():
  heads, size = 6, 5
  gates = _gates((heads,))
  rng = np.random.default_rng(0)
  k = rng.standard_normal(size)
  k /= np.linalg.norm(k)
  pair = rng.standard_normal((2, heads, 3))  # s and n, of values of 3
  with jax.enable_x64(True):
    keys = jnp.broadcast_to(jnp.asarray(k), (1, heads, size))
    states = [jnp.einsum("k,hv->hkv", k, x)[None] for x in pair]
    _, after = kernels_pallas.momentum_delta_rule_step(
      kernels_pallas.MomentumState(*states),
      keys,
      keys,
      jnp.zeros((1, heads, 3)),
      *(jnp.asarray(x)[None] for x in gates),
    )
    got = [np.einsum("k,hkv->hv", k, x[0]) for x in after]
  matrices = linear_stability.step_matrices(gates)
  want = np.einsum("hij,jhv->ihv", matrices, pair)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_gain_is_the_spectral_norm():
  matrices = np.random.default_rng(0).standard_normal((50, 2, 2))
  np.testing.assert_allclose(
    linear_stability.gain(matrices), np.linalg.norm(matrices, 2, axis=(1, 2))
  )


def test_formulas_agree_with_eigenvalues():
  found = linear_stability.check_formulas(np.random.default_rng(1), 20_000)
  assert found["stability_disagreements"] == 0
  assert found["complex_disagreements"] == 0
  assert found["unstable_layers"] == 0
  assert found["largest_radius"] < 1
  # The condition is met and missed.
  assert 1_000 < found["unstable_beyond"] < 9_000
  # |lambda|^2 = det for a pair.
  assert found["modulus_error"] < 1e-12


def test_one_step_of_uniform_gates():
  """The design's figures, to what 100,000 draws resolve."""
  free = linear_stability.one_step(_gates((100_000,)))
  held = linear_stability.one_step(_gates((100_000,), constrained=True))
  assert free["gain"]["median"] == pytest.approx(0.87, abs=0.01)
  assert free["gain"]["p99"] == pytest.approx(1.92, abs=0.02)
  assert held["gain"]["median"] == pytest.approx(0.63, abs=0.01)
  assert held["gain"]["p99"] == pytest.approx(1.36, abs=0.02)
  assert held["gain"]["max"] > 2
  assert held["alpha_plus_beta"] <= 1 < free["alpha_plus_beta"]
  for row in (free, held):
    assert row["complex_formula"] == row["complex_numeric"]


def test_untrained_gates_keep_the_layers_ranges():
  gates = linear_stability.untrained_gates(0, 64, 32, True)
  free = linear_stability.untrained_gates(0, 64, 32, False)
  assert gates.beta.shape == (32, 64)
  assert np.all(np.exp(gates.log_alpha) + gates.beta <= 1)
  assert np.all((gates.eta > 0) & (gates.eta < 2))
  np.testing.assert_array_equal(gates.log_mu, free.log_mu)
  assert np.all(free.log_alpha >= gates.log_alpha)
  bounded = linear_stability.untrained_gates(0, 64, 32, True, -2.0)
  assert gates.log_mu.min() < -2 == bounded.log_mu.min()


def test_running_gain_is_that_of_products():
  gates = _gates((4, 3))
  product = np.eye(2)
  for matrix in linear_stability.step_matrices(gates)[:, 1]:
    product = matrix @ product
  got = linear_stability.running_gain(gates)
  assert got.shape == (4, 3)
  assert got[-1, 1] == pytest.approx(np.linalg.norm(product, 2))


def test_both_forms_are_the_library_s_coefficients():
  # The log-space form's 1e-6 beside beta is part of it: beta far above.
  gates = coefficients.constant(-0.05, -0.02)
  gates = gates._replace(beta=0.5 + gates.beta / 2)
  with jax.enable_x64(True):
    column = lambda x: jnp.asarray(x)[:, None]
    ones = jnp.ones((coefficients.CHUNK, 1))
    system = chunk.scalar_system(
      ones,
      ones,
      None,
      chunk.Gates(*map(column, gates)),
      None,
      scale=1.0,
      delta=True,
    )
    want = np.asarray(system.at)
  product = coefficients.product_form(gates)
  np.testing.assert_allclose(product, want, rtol=1e-13)
  log_space = coefficients.log_space_form(gates)
  np.testing.assert_allclose(log_space, want, rtol=3e-6)


def test_float32_errors():
  mild = coefficients.float32_errors(coefficients.constant(-0.05, -0.02))
  # A sum of 64 exponents and one of 64 terms, each rounded by 2**-24.
  assert mild["product"]["error"] < 64 * 2.0**-24
  assert 1e-5 < mild["log-space"]["error"] < 1e-2
  hard = coefficients.float32_errors(coefficients.constant(-4.0, -0.1))
  assert hard["product"]["error"] < 128 * 2.0**-24
  assert hard["product"]["zeros"] == hard["product"]["not_finite"] == 0
  assert hard["log-space"]["error"] == np.inf
  assert hard["log-space"]["not_finite"] > 500


@pytest.mark.slow
def test_main(monkeypatch, tmp_path, capsys):
  path = tmp_path / "records" / "out.jsonl"
  values = types.SimpleNamespace(
    draws=200, heads=8, tokens=10, record=str(path)
  )
  monkeypatch.setattr(linear_stability.flags, "FLAGS", values)
  linear_stability.main()
  assert "untrained, constrained" in capsys.readouterr().out
  (record,) = records.read(path)
  assert record["formulas"]["draws"] == 200
  assert [row["log_mu"] for row in record["constant"]][-1] == -20
  assert "Infinity" not in path.read_text()
  for suffix in (".png", ".svg"):
    assert path.with_suffix(suffix).stat().st_size > 10_000
