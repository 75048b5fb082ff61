"""Factorizations of several stacks do not wait for each other for ever."""

import os
import subprocess
import sys

import pytest
from absl.testing import absltest

# On two threads: as many as there are stacks are needed to stand still.
_PROGRAM = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax
import jax.numpy as jnp
import optim
from jaxlib_ext import sequencing
from optim.low_rank import projection

grads = {
  str(i): jax.random.normal(jax.random.key(i), (8, 512, 130 - i))
  for i in range(3)
}
tx = optim.scale_by_dion(rank=128 - 3)
step = jax.jit(tx.update)
state = tx.init(grads)
for _ in range(3):
  _, state = jax.block_until_ready(step(grads, state))

parts = list(grads.values())
for find in (
  lambda xs: projection.subspaces(xs, [60] * 3, "randomized"),
  lambda xs: projection.random_bases(
    list(jax.random.split(jax.random.key(0), 3)), xs, [60] * 3),
):
  find = jax.jit(find)
  for _ in range(3):
    jax.block_until_ready(find(parts))

odd = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
for first in (0, 1, 2):
  got = jax.jit(sequencing.after)(odd, odd[first:])
  print([str(x) for x in got])
"""


@pytest.mark.slow
class ThreadsTest(absltest.TestCase):
  def test_stacks_of_several_shapes_on_two_threads(self):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
      [sys.executable, "-c", _PROGRAM],
      env=environment,
      capture_output=True,
      text=True,
      timeout=240,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stdout.splitlines(), ["['nan', 'inf', '-inf']"] * 3)


if __name__ == "__main__":
  absltest.main()
