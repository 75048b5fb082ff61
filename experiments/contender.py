"""What a benchmark compiles and times: functions of arrays, optimizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optim

MODES = ("forward", "gradient")

Arrays = Mapping[str, jax.Array]

# Short calls are repeated within a turn until they last this long.
_TURN_SECONDS, _MAX_CALLS = 0.1, 20


def calls(seconds: float) -> int:
  """How many calls of so many seconds make a turn."""
  return int(np.clip(_TURN_SECONDS / seconds, 1, _MAX_CALLS))


class Contender:
  """A function of some arrays, compiled forward and with its gradient.

  Args:
    f: takes the arrays by name, gives o and the final states.
    arrays: its arguments, all differentiated.
    cotangents: of o and of the states.
    modes: of "forward" (o and states) and "gradient" (both and the arrays'
      cotangents).
  """

  def __init__(
    self,
    f: Callable[..., Any],
    arrays: Arrays,
    cotangents: Sequence[jax.Array],
    modes: Sequence[str] = MODES,
  ):
    flat = lambda arrays: tuple(jax.tree.leaves(f(**arrays)))

    def gradient(arrays, cotangents):
      outputs, pullback = jax.vjp(flat, arrays)
      return outputs, pullback(cotangents)[0]

    self._arguments = {
      "forward": (dict(arrays),),
      "gradient": (dict(arrays), tuple(cotangents)),
    }
    functions = {"forward": flat, "gradient": gradient}
    self._compiled = {
      mode: jax.jit(functions[mode]).lower(*self._arguments[mode]).compile()
      for mode in modes
    }

  @property
  def modes(self) -> tuple[str, ...]:
    """What was compiled."""
    return tuple(self._compiled)

  def temp_bytes(self) -> dict[str, int]:
    """Mode to the bytes of XLA's temporaries."""
    return {
      mode: compiled.memory_analysis().temp_size_in_bytes
      for mode, compiled in self._compiled.items()
    }

  def values(self) -> dict[str, np.ndarray]:
    """Outputs "o", "state0", .. and, if compiled, cotangents "dq", "dk", .."""
    if "gradient" in self._compiled:
      outputs, gradients = self._run("gradient")
    else:
      outputs, gradients = self._run("forward"), {}
    out = {"o": outputs[0]}
    out.update((f"state{i}", x) for i, x in enumerate(outputs[1:]))
    out.update((f"d{name}", x) for name, x in gradients.items())
    return {name: np.asarray(x, np.float64) for name, x in out.items()}

  def seconds(self, mode: str, calls: int) -> float:
    """Seconds per call, of calls one after another."""
    start = time.perf_counter()
    for _ in range(calls):
      self._run(mode)
    return (time.perf_counter() - start) / calls

  def _run(self, mode):
    return jax.block_until_ready(self._compiled[mode](*self._arguments[mode]))


class Update:
  """One step of an optimizer, compiled, parameters and state donated.

  Args:
    tx: the optimizer.
    params: the parameters, of which a copy is taken.
    grads: of every step.
  """

  def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any):
    def step(params, state, grads):
      updates, state = tx.update(grads, state, params)
      return optim.apply_updates(params, updates), state

    self.state_bytes = optim.state_bytes(tx, params)["state"]
    self._grads = grads
    self._held = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    self._compiled = jitted.lower(*self._held, grads).compile()

  def temp_bytes(self) -> int:
    """Bytes of XLA's temporaries."""
    return self._compiled.memory_analysis().temp_size_in_bytes

  def seconds(self, calls: int) -> float:
    """Seconds per step, of steps one after another."""
    start = time.perf_counter()
    for _ in range(calls):
      self._held = jax.block_until_ready(
        self._compiled(*self._held, self._grads)
      )
    return (time.perf_counter() - start) / calls
