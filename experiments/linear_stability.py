"""How stable Momentum DeltaNet is, and why its coefficients are products.

  python -m experiments.linear_stability

Along a unit key k that repeats, s = S^T k and n = N^T k follow (s, n) <-
J (s, n) + input, with gates alpha, mu, beta, eta of the token and

  J = [[alpha (1 - beta eta), beta mu], [-eta alpha, mu]],
  det J = alpha mu,  tr J = alpha (1 - beta eta) + mu.

Both eigenvalues lie inside the unit circle if and only if
alpha beta eta < (1 + alpha) (1 + mu), for decays below 1, and they are a
complex pair, of modulus sqrt(alpha mu), if and only if alpha beta eta lies
between (sqrt alpha -+ sqrt mu)^2. Both statements are checked here against
computed eigenvalues, on random gates. Then come the growth of one step and of
products of steps, with gates uniform on their ranges and as an untrained layer
draws them, each with and without the layer's constraint (beta times
sin^2(theta), alpha times cos^2(theta)).

The last study takes the chunk's coefficients
Gamma = A diag(beta) U diag(eta) in float32, as that product and from running
log-sums, the form of the released kernels (HuuYuLong/MomentumDeltaNet,
c6e77fa), both written from their formulas, and compares with float64.

One JSON line goes to `experiments/records/linear_stability.jsonl`, pictures
beside it. It takes seconds.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import errors
from experiments.linear import coefficients, picture
from jaxlib_ext import records
from models import gates as layer_gates

Gates = coefficients.Gates

# The released 400M model's width, and what a bias-free projection with the
# default init_std makes of a normed input of that width.
_WIDTH = 1024
_LOGIT_STD = 0.02 * _WIDTH**0.5
# (log mu, log alpha), constant over a chunk.
CONSTANT_GATES = (
  (-0.05, -0.02),
  (-0.5, -0.1),
  (-1.0, -0.1),
  (-2.0, -0.1),
  (-4.0, -0.1),
  (-20.0, -0.1),
)
_SWEEP = np.geomspace(1e-4, 20, 41)  # -log mu


def uniform_gates(
  rng: np.random.Generator, shape: tuple[int, ...], constrained: bool
) -> Gates:
  """Every gate uniform on its range, the layer's f on (0, 4)."""
  alpha, mu, beta, eta, f = rng.random((5, *shape))
  eta = 2 * eta
  x = np.square(eta * 4 * f) if constrained else None
  if constrained:
    alpha, beta = alpha / (1 + x), beta * x / (1 + x)
  return Gates(np.log(alpha), np.log(mu), beta, eta)


def untrained_gates(
  seed: int, heads: int, tokens: int, constrained: bool, min_log_mu: float = 0
) -> Gates:
  """Gates `[tokens, heads]` of an untrained layer whose logits are normal."""
  keys = iter(jax.random.split(jax.random.key(seed), 7))
  rate = layer_gates.log_uniform_init(0.0, 16.0)(next(keys), (2, heads))
  bias = layer_gates.shared_step_bias_init(next(keys), (2, heads))
  factor = layer_gates.log_uniform_init(0.0, 4.0)(next(keys), (heads,))
  a, b, m, e = (
    _LOGIT_STD * jax.random.normal(next(keys), (1, tokens, heads))
    for _ in range(4)
  )
  drawn = layer_gates.momentum_gates(
    a,
    b,
    m,
    e,
    rate_log=rate,
    bias=bias,
    factor_log=factor,
    tau=_WIDTH**0.5,
    min_log_mu=min_log_mu,
  )
  if not constrained:
    drawn = drawn._replace(
      log_decay=layer_gates.log_decay(a, rate[0], bias[0]),
      beta=jax.nn.sigmoid(b),
    )
  return Gates(*(np.asarray(x[0], np.float64) for x in drawn))


def step_matrices(gates: Gates) -> np.ndarray:
  """J, `[..., 2, 2]`."""
  alpha, mu = np.exp(gates.log_alpha), np.exp(gates.log_mu)
  beta, eta = gates.beta, gates.eta
  rows = [
    np.stack([alpha * (1 - beta * eta), beta * mu], axis=-1),
    np.stack([-eta * alpha, mu], axis=-1),
  ]
  return np.stack(rows, axis=-2)


def gain(matrices: np.ndarray) -> np.ndarray:
  """The spectral norms of `[..., 2, 2]`: roots of x^2 - |J|^2 x + det^2."""
  square = np.sum(np.square(matrices), axis=(-2, -1))
  (a, b), (c, d) = np.moveaxis(matrices, (-2, -1), (0, 1))
  det = a * d - b * c
  root = np.sqrt(np.maximum(square**2 - 4 * det**2, 0))
  return np.sqrt((square + root) / 2)


def stable_by_formula(gates: Gates) -> np.ndarray:
  """alpha beta eta < (1 + alpha) (1 + mu), for decays below 1."""
  alpha, mu = np.exp(gates.log_alpha), np.exp(gates.log_mu)
  return alpha * gates.beta * gates.eta < (1 + alpha) * (1 + mu)


def complex_by_formula(gates: Gates) -> np.ndarray:
  """(sqrt alpha - sqrt mu)^2 < alpha beta eta < (sqrt alpha + sqrt mu)^2."""
  root, other = np.exp(gates.log_alpha / 2), np.exp(gates.log_mu / 2)
  middle = np.square(root) * gates.beta * gates.eta
  return (np.square(root - other) < middle) & (middle < np.square(root + other))


def check_formulas(rng: np.random.Generator, draws: int) -> dict[str, Any]:
  """Both statements of the module, against computed eigenvalues.

  Half of the draws are gates as layers have them, beta below 1 and eta below
  2; in the other half beta eta goes up to 32, since no layer's is unstable.

  Returns:
    "draws"; "unstable", "largest_radius" of the layers' half; "unstable" of
    the other half; "disagreements" of each statement. Draws nearer to a
    border than rounding can tell are left out and counted: "undecided".
  """
  inside = uniform_gates(rng, (draws // 2,), False)
  beyond = uniform_gates(rng, (draws - draws // 2,), False)
  beyond = beyond._replace(beta=16 * beyond.beta)
  both = Gates(*(np.concatenate(x) for x in zip(inside, beyond, strict=True)))
  eigenvalues = np.linalg.eigvals(step_matrices(both))
  radius = np.abs(eigenvalues).max(axis=-1)
  # A double eigenvalue moves by the root of the rounding of the entries.
  border = 1e-6
  clear = np.abs(radius - 1) > border
  numeric = np.abs(eigenvalues[:, 0].imag)
  apart = np.abs(eigenvalues[:, 0] - eigenvalues[:, 1]) > border
  modulus = np.exp((both.log_alpha + both.log_mu) / 2)
  pairs = numeric > 0
  return {
    "draws": draws,
    "largest_radius": float(radius[: draws // 2].max()),
    "unstable_layers": int(np.sum(radius[: draws // 2] >= 1)),
    "unstable_beyond": int(np.sum(radius[draws // 2 :] >= 1)),
    "stability_disagreements": int(
      np.sum(clear & (stable_by_formula(both) != (radius < 1)))
    ),
    "complex_disagreements": int(
      np.sum(apart & (complex_by_formula(both) != pairs))
    ),
    "modulus_error": float(np.abs(radius - modulus)[pairs & apart].max()),
    "undecided": int(np.sum(~clear) + np.sum(~apart)),
  }


def quantiles(values: np.ndarray) -> dict[str, float]:
  """Median, 99th percentile and maximum."""
  middle, high = np.quantile(values, (0.5, 0.99))
  return {
    "median": float(middle),
    "p99": float(high),
    "max": float(values.max()),
  }


def one_step(gates: Gates) -> dict[str, Any]:
  """Of frozen gates: eigenvalues, and how much one step may grow (s, n)."""
  matrices = step_matrices(gates)
  eigenvalues = np.linalg.eigvals(matrices)
  total = np.exp(gates.log_alpha) + gates.beta
  return {
    "radius": quantiles(np.abs(eigenvalues).max(axis=-1)),
    "complex_formula": float(complex_by_formula(gates).mean()),
    "complex_numeric": float((eigenvalues[..., 0].imag != 0).mean()),
    "gain": quantiles(gain(matrices)),
    "growing": float((gain(matrices) > 1).mean()),
    "alpha_plus_beta": float(total.max()),
  }


def running_gain(gates: Gates) -> np.ndarray:
  """Norms `[T, H]` of the products J_t .. J_1 of gates `[T, H]`."""
  out, product = [], np.eye(2)
  for matrix in step_matrices(gates):
    product = matrix @ product
    out.append(gain(product))
  return np.stack(out)


def study(draws: int, heads: int, tokens: int) -> tuple[dict, dict]:
  """All studies.

  Args:
    draws: of random gates.
    heads: of untrained layers.
    tokens: of the products of steps.

  Returns:
    The record, and the arrays that are drawn.
  """
  rng = np.random.default_rng(0)
  record = {"draws": draws, "heads": heads, "tokens": tokens}
  record["formulas"] = check_formulas(rng, draws)
  arrays = {"gain": {}, "running": {}, "eigenvalues": {}}
  for constrained in (False, True):
    for source in ("uniform", "untrained"):
      name = f"{source}, {'' if constrained else 'un'}constrained"
      if source == "uniform":
        gates = uniform_gates(rng, (draws,), constrained)
        varying = uniform_gates(rng, (tokens, heads), constrained)
      else:
        varying = untrained_gates(0, heads, tokens, constrained)
        gates = varying
      record[name] = one_step(gates)
      running = running_gain(varying)
      record[name]["product"] = quantiles(running.max(axis=0))
      record[name]["product_last"] = quantiles(running[-1])
      arrays["gain"][name] = np.sort(gain(step_matrices(gates)).ravel())
      arrays["running"][name] = running
      first = Gates(*(x.ravel()[:2000] for x in gates))
      arrays["eigenvalues"][name] = np.linalg.eigvals(step_matrices(first))
  record["constant"] = [
    {
      "log_mu": log_mu,
      "log_alpha": log_alpha,
      **_plain(
        coefficients.float32_errors(coefficients.constant(log_mu, log_alpha))
      ),
    }
    for log_mu, log_alpha in CONSTANT_GATES
  ]
  swept = [
    coefficients.float32_errors(coefficients.constant(-x, -0.1)) for x in _SWEEP
  ]
  arrays["coefficients"] = {
    form: (_SWEEP, np.array([x[form]["error"] for x in swept]))
    for form in coefficients.FORMS
  }
  record["layers"] = []
  for bound in (0.0, -2.0):
    gates = untrained_gates(0, heads, coefficients.CHUNK, True, bound)
    found = coefficients.float32_errors(Gates(*(x.T for x in gates)))
    record["layers"].append(
      {
        "min_log_mu": bound,
        **{
          form: {
            "above_1_percent": int(np.sum(x["error"] > 0.01)),
            "largest": _finite(x["error"].max()),
          }
          for form, x in found.items()
        },
      }
    )
  return record, arrays


def _plain(found):
  return {
    form: {
      "error": _finite(x["error"]),
      "zeros": int(x["zeros"]),
      "not_finite": int(x["not_finite"]),
    }
    for form, x in found.items()
  }


def _finite(x: Any) -> float | str:
  """A number, for JSON has no infinity."""
  return float(x) if np.isfinite(x) else "not finite"


def report(record: Mapping[str, Any]) -> str:
  """The lines printed."""
  formulas = record["formulas"]
  wrong = formulas["stability_disagreements"], formulas["complex_disagreements"]
  lines = [
    f"{formulas['draws']:,} draws: the formulas of stability and of complex "
    f"pairs disagree with the eigenvalues in {wrong[0]} and {wrong[1]}; "
    f"{formulas['unstable_layers']} unstable ones within the layers' ranges, "
    f"{formulas['unstable_beyond']:,} beyond them"
  ]
  for name in [n for n in record if n.endswith("constrained")]:
    row = record[name]
    show = lambda x: " ".join(f"{x[k]:9.3g}" for k in ("median", "p99", "max"))
    lines.append(
      f"{name:24s} complex {row['complex_formula']:4.0%}, alpha + beta at most "
      f"{row['alpha_plus_beta']:.2f}\n"
      f"  median, p99, max of: radius {show(row['radius'])}; one step "
      f"{show(row['gain'])}; products {show(row['product'])}"
    )
  lines.append("largest relative error of a coefficient in float32")
  show = lambda x: x if isinstance(x, str) else f"{x:.1e}"
  for row in record["constant"]:
    ours, other = (row[form] for form in coefficients.FORMS)
    lines.append(
      f"  log mu {row['log_mu']:6.2f}, log alpha {row['log_alpha']:5.2f}: "
      f"product {show(ours['error'])}, log-space {show(other['error'])} "
      f"({other['zeros']} zeros, {other['not_finite']} not finite)"
    )
  for row in record["layers"]:
    counts = ", ".join(
      f"{form} {row[form]['above_1_percent']} (largest "
      f"{show(row[form]['largest'])})"
      for form in coefficients.FORMS
    )
    lines.append(
      f"  of {record['heads']} untrained heads, log mu "
      f"{'not bounded' if not row['min_log_mu'] else row['min_log_mu']}: "
      f"above 1%: {counts}"
    )
  return "\n".join(lines)


def main() -> None:
  """Runs the studies, prints, draws and records them."""
  values = flags.FLAGS
  path = pathlib.Path(values.record)
  record, arrays = study(values.draws, values.heads, values.tokens)
  print(report(record))
  path.parent.mkdir(parents=True, exist_ok=True)
  picture.draw(arrays, path)
  records.append(path, {**record, **records.provenance()})


def _define_flags() -> None:
  flags.DEFINE_integer("draws", 200_000, "Random gates.", lower_bound=2)
  flags.DEFINE_integer("heads", 2048, "Untrained heads.", lower_bound=1)
  flags.DEFINE_integer("tokens", 512, "Steps of a product.", lower_bound=1)
  flags.DEFINE_string(
    "record",
    "experiments/records/linear_stability.jsonl",
    "The JSON Lines file that gets the record; pictures lie beside it.",
  )


if __name__ == "__main__":
  errors.run_main("linear_stability", main, _define_flags)
