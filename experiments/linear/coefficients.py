"""The coefficients of a Momentum DeltaNet chunk, as a product and by log-sums.

Gamma_tj is the weight of k_j e_j^T in the state after token t. With A and U
the decays of state and momentum between two tokens,

  Gamma = A diag(beta) U diag(eta),

whose terms are all positive: nothing cancels. The released kernels
(HuuYuLong/MomentumDeltaNet, c6e77fa) take it from running log-sums instead,
without the inner product but with a difference of sums. Both are written here
from their formulas, for `experiments.linear_stability`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CHUNK = 64


class Gates(NamedTuple):
  """Gates of any one shape, float64.

  Attributes:
    log_alpha: log of the state's decay.
    log_mu: log of the momentum's decay.
    beta: weight of the momentum in the state.
    eta: weight of the error in the momentum.
  """

  log_alpha: np.ndarray
  log_mu: np.ndarray
  beta: np.ndarray
  eta: np.ndarray


def _between(log_gate: np.ndarray) -> np.ndarray:
  """exp of the sum of the gates after j up to t, `[..., C, C]`, lower."""
  size = log_gate.shape[-1]
  token, source = np.indices((size, size))
  terms = np.where(token > source, log_gate[..., :, None], 0)
  sums = np.cumsum(terms, axis=-2, dtype=log_gate.dtype)
  return np.where(token >= source, np.exp(sums), 0)


def product_form(gates: Gates) -> np.ndarray:
  """Gamma = A diag(beta) U diag(eta), `[..., C, C]`, in the gates' dtype."""
  decays = _between(gates.log_alpha) * gates.beta[..., None, :]
  return decays @ (_between(gates.log_mu) * gates.eta[..., None, :])


def log_space_form(gates: Gates) -> np.ndarray:
  """Gamma from running log-sums, in the gates' dtype.

  With ca and cm the cumulative sums of the log decays and c_t the sum of
  beta_i exp(cm_i - ca_i) over i <= t, Gamma_tj is
  exp(ca_t + log c_t - cm_j) (1 - exp(log c_{j-1} - log c_t)) eta_j. The 1e-6
  beside beta is that of the released kernels.
  """
  ca, cm = (np.cumsum(x, axis=-1, dtype=x.dtype) for x in gates[:2])
  terms = np.log(gates.beta + gates.beta.dtype.type(1e-6)) + cm - ca
  log_c = np.logaddexp.accumulate(terms, axis=-1)
  none = np.full_like(log_c[..., :1], -np.inf)
  before = np.concatenate([none, log_c[..., :-1]], axis=-1)
  size = ca.shape[-1]
  token, source = np.indices((size, size))
  with np.errstate(over="ignore", invalid="ignore"):
    scale = np.exp((ca + log_c)[..., :, None] - cm[..., None, :])
    ratio = np.exp(before[..., None, :] - log_c[..., :, None])
    gamma = scale * (1 - ratio) * gates.eta[..., None, :]
  return np.where(token >= source, gamma, 0)


FORMS = {"product": product_form, "log-space": log_space_form}


def float32_errors(gates: Gates) -> dict[str, dict[str, np.ndarray]]:
  """What float32 makes of the coefficients of gates `[..., C]`.

  Entries below 2**-24 of the largest of their row are not looked at: no
  float32 sum over the row notices them.

  Returns:
    Form to "error" (the largest relative error of an entry; infinite where
    one is not finite), "zeros" (entries that are 0) and "not_finite", each
    `[...]`.
  """
  narrow = Gates(*(x.astype(np.float32) for x in gates))
  # The float32 gates are the input: their rounding is nobody's error.
  want = product_form(Gates(*(x.astype(np.float64) for x in narrow)))
  entries = want > 2.0**-24 * want.max(axis=-1, keepdims=True)
  out = {}
  for name, form in FORMS.items():
    got = form(narrow).astype(np.float64)
    finite = np.isfinite(got)
    difference = np.where(entries & finite, got - want, 0)
    error = np.abs(difference) / np.where(entries, want, 1)
    error[entries & ~finite] = np.inf
    out[name] = {
      "error": error.max(axis=(-2, -1)),
      "zeros": (entries & (got == 0)).sum(axis=(-2, -1)),
      "not_finite": (entries & ~finite).sum(axis=(-2, -1)),
    }
  return out


def constant(log_mu: float, log_alpha: float) -> Gates:
  """A chunk of constant decays, with random beta and eta."""
  rng = np.random.default_rng(0)
  beta, eta = rng.random((2, CHUNK))
  ones = np.ones(CHUNK)
  return Gates(log_alpha * ones, log_mu * ones, beta, 2 * eta)
