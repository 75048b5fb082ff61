"""Lines from noise to data, the times drawn on them, Euler's method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import dit_flow


def test_euler_follows_constant_and_linear_velocities():
  noise = jnp.asarray([[3.0, -2.0]])
  # Sums of multiples of 1/4 are exact.
  for times in (dit_flow.euler_times(4), dit_flow.euler_times(4)[:3]):
    got = dit_flow.euler(lambda x, t: jnp.full_like(x, 2.0), noise, times)
    np.testing.assert_array_equal(got, noise - 2 * (1 - times[-1]))
  got = dit_flow.euler(lambda x, t: 8 * t + 0 * x, noise, times=[1, 0.5, 0])
  np.testing.assert_array_equal(got, noise - 6)


def test_interpolation_is_between_data_and_noise():
  data, noise = jnp.zeros((3, 2)), jnp.ones((3, 2))
  x, v = dit_flow.interpolate(data, noise, jnp.asarray([0.0, 0.25, 1.0]))
  np.testing.assert_array_equal(x[:, 0], [0, 0.25, 1])
  np.testing.assert_array_equal(v, np.ones((3, 2)))


def test_times_are_spread():
  key = jax.random.key(0)
  draw = jax.jit(dit_flow.draw_times, static_argnums=(1, 2))
  t = np.asarray(draw(key, 64, "uniform"))
  np.testing.assert_array_equal(np.floor(t * 64), np.arange(64))
  t = np.asarray(draw(key, 4096, "logit_normal"), np.float64)
  z = np.log(t / (1 - t))
  # Spread draws are closer to the moments than 1/sqrt(4096).
  assert abs(z.mean()) < 5e-3 and abs(z.std() - 1) < 5e-3
  with pytest.raises(ValueError, match="times: got 'cosine'; allowed"):
    dit_flow.draw_times(key, 2, "cosine")
