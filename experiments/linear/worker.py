"""One contender of `experiments.bench_linear`, here or in another process.

The process's interpreter needs JAX, NumPy and the `jla` package
(jax-linear-attention), and of this project nothing but what is imported here.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import host_memory, workers

# Op to the name that `jla.ops.linear_attention` has for it.
PEER_KINDS = {"gdn": "gated_deltanet", "kda": "kda", "linear": "simple_gla"}

MODES = ("forward", "gradient")

Arrays = Mapping[str, jax.Array]


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


def save(
  path: str, arrays: Arrays, cotangents: Sequence[jax.Array]
) -> dict[str, str]:
  """Writes a problem for `peer`.

  Returns:
    The dtypes: NumPy's files have no bfloat16.
  """
  named = {f"cotangent{i}": x for i, x in enumerate(cotangents)}
  named = {**arrays, **named}
  np.savez(path, **{n: np.asarray(x, np.float32) for n, x in named.items()})
  return {name: str(x.dtype) for name, x in named.items()}


class Peer(workers.Worker):
  """A `Contender` in another interpreter: jax-linear-attention's plain form.

  Args:
    op: a key of `PEER_KINDS`.
    arrays: as for `Contender`.
    cotangents: likewise.
    directory: for files that carry arrays there and back.
    python: the interpreter.
  """

  modes = MODES

  def __init__(
    self,
    op: str,
    arrays: Arrays,
    cotangents: Sequence[jax.Array],
    directory: pathlib.Path,
    python: str,
  ):
    self._values = str(directory / "values.npz")
    path = str(directory / "problem.npz")
    dtypes = save(path, arrays, cotangents)
    super().__init__(
      "experiments.linear.worker",
      python,
      directory / "peer.log",
      op=op,
      path=path,
      dtypes=dtypes,
    )

  def values(self) -> dict[str, np.ndarray]:
    with np.load(self.ask(do="values", path=self._values)) as loaded:
      return dict(loaded)

  def seconds(self, mode: str, calls: int) -> float:
    return self.ask(do="seconds", mode=mode, calls=calls)

  def temp_bytes(self) -> dict[str, int]:
    return self.ask(do="temp_bytes")


def peer(op: str, path: str, dtypes: Mapping[str, str]) -> Contender:
  """The plain JAX form of jax-linear-attention, on the arrays at `path`."""
  from jla import ops

  host_memory.keep_freed()
  with np.load(path) as loaded:
    arrays = {
      name: jax.numpy.asarray(x, dtypes[name]) for name, x in loaded.items()
    }
  cotangents = tuple(arrays.pop(f"cotangent{i}") for i in range(2))

  def run(q, k, v, log_decay, beta=None):
    gates = {"g": log_decay} | ({} if beta is None else {"beta": beta})
    return ops.linear_attention(
      PEER_KINDS[op],
      q,
      k,
      v,
      impl="chunked",
      output_final_state=True,
      **gates,
    )

  return Contender(run, arrays, cotangents)


def answer(side: Contender, request: Mapping[str, Any]) -> Any:
  """What a request asks of the contender: seconds, or a file of its values."""
  if request["do"] == "seconds":
    return side.seconds(request["mode"], request["calls"])
  if request["do"] == "values":
    np.savez(request["path"], **side.values())
    return request["path"]
  return getattr(side, request["do"])()


if __name__ == "__main__":
  workers.serve(peer, answer)
