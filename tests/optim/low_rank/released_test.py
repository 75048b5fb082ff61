"""Steps of the releases of Fira and APOLLO, over 24 gradients.

The numbers are those of the released optimizers (xichen-fy/Fira at 5c28b13,
zhuhanqing/APOLLO at 76b3472; PyTorch 2.13, float64), run once on `gradient`'s
matrices with rank 2, one subspace, eps = 1e-2, and APOLLO's random matrix
replaced by the sines below: Frobenius norms of the steps at learning rate 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim.low_rank import apollo, fira

NORMS = {
  ("fira", (4, 6)): (
    3.606136736, 2.278675797, 2.059810659, 1.33027744, 1.269500662,
    1.287067393, 1.168364173, 1.223615088, 0.701466569, 0.672018289,
    0.767535078, 0.660049709, 0.707852591, 0.695579171, 0.720101701,
    0.743441588, 0.697439581, 0.560410283, 0.44677999, 0.461354807,
    0.603580936, 0.436399153, 0.516757982, 0.525381734,
  ),
  ("fira", (6, 4)): (
    3.854602997, 2.557265868, 2.216049585, 1.665313157, 1.546545216,
    1.562691406, 1.419402617, 1.425744199, 1.450488206, 1.421132949,
    1.462705685, 1.179555068, 1.224433247, 1.217664149, 0.759555482,
    0.85048738, 0.739200587, 0.838469428, 0.600962577, 0.64260872,
    0.6326181, 0.583569037, 0.616695303, 0.634392069,
  ),
  ("apollo", (4, 6)): (
    5.550547751, 2.226234009, 1.930249925, 1.773506715, 1.095346016,
    1.058900198, 1.037246923, 1.02564176, 1.02127129, 1.022350467,
    1.027686203, 1.036447276, 1.048034556, 1.062003734, 0.711603734,
    0.723350879, 0.736137967, 0.74985528, 0.764413435, 0.628468843,
    0.641389666, 0.654837363, 0.668776381, 0.68317625,
  ),
  ("apollo", (6, 4)): (
    12.116711691, 2.597653891, 1.602566456, 1.472432318, 1.212063764,
    1.171734356, 1.147773755, 0.865253392, 0.730824537, 0.731596799,
    0.735415067, 0.741684515, 0.749976405, 0.759972788, 0.77143209,
    0.78416688, 0.798029047, 0.812899648, 0.828681785, 0.845295513,
    0.86267412, 0.423096104, 0.432102226, 0.441406106,
  ),
}  # fmt: skip


def gradient(shape: tuple[int, int], t: int) -> np.ndarray:
  """Cosines of integers, every fifth matrix four times as large."""
  i = np.arange(np.prod(shape)).reshape(shape)
  size = 1 + 3 * ((t * 7) % 5 == 0)
  return size * np.cos(1.7 * i + 0.9 * i * i % 11 + 2.3 * t + 0.11 * t * i)


@pytest.mark.parametrize("method, shape", NORMS)
def test_norms_of_steps(method, shape, monkeypatch):
  def sines(key, shape, dtype):
    del key
    i = np.arange(np.prod(shape)).reshape(shape)
    return jnp.asarray(np.sin(1.0 + i), dtype)

  if method == "apollo":
    monkeypatch.setattr(apollo.jax.random, "normal", sines)
    make = apollo.scale_by_apollo
  else:
    make = fira.scale_by_fira
  with jax.enable_x64(True):
    tx = make(rank=2, eps=1e-2, released=True)
    state = tx.init({"w": jnp.zeros(shape, jnp.float64)})
    update = jax.jit(tx.update)
    norms = []
    for t in range(24):
      out, state = update({"w": jnp.asarray(gradient(shape, t))}, state)
      norms.append(float(jnp.linalg.norm(out["w"])))
  # The releases add 1e-8 to the norms that they divide by; ours do not. Each
  # divisor is above 0.03, and limited norms compound 24 of them.
  np.testing.assert_allclose(norms, NORMS[method, shape], rtol=1e-5)
