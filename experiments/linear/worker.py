"""The contender of `experiments.bench_linear` that is in another process.

The process's interpreter needs JAX, NumPy and the `jla` package
(jax-linear-attention), and of this project nothing but what is imported here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import contender, workers
from jaxlib_ext import host

# Op to the name that `jla.ops.linear_attention` has for it.
PEER_KINDS = {
  "gdn": "gated_deltanet",
  "kda": "kda",
  "linear": "simple_gla",
  "gla": "gla",
}


def save(
  path: str, arrays: contender.Arrays, cotangents: Sequence[jax.Array]
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
  """jax-linear-attention's plain form in another interpreter.

  It has what a `contender.Contender` has.

  Args:
    op: a key of `PEER_KINDS`.
    arrays: as for `contender.Contender`.
    cotangents: likewise.
    directory: for files that carry arrays there and back.
    python: the interpreter.
  """

  modes = contender.MODES

  def __init__(
    self,
    op: str,
    arrays: contender.Arrays,
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


def peer(op: str, path: str, dtypes: Mapping[str, str]) -> contender.Contender:
  """The plain JAX form of jax-linear-attention, on the arrays at `path`."""
  from jla import ops

  host.keep_freed_memory()
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

  return contender.Contender(run, arrays, cotangents)


def answer(side: contender.Contender, request: Mapping[str, Any]) -> Any:
  """What a request asks of the contender: seconds, or a file of its values."""
  if request["do"] == "seconds":
    return side.seconds(request["mode"], request["calls"])
  if request["do"] == "values":
    np.savez(request["path"], **side.values())
    return request["path"]
  return getattr(side, request["do"])()


if __name__ == "__main__":
  workers.serve(peer, answer)
