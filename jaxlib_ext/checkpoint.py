"""Checkpoints that are whole or absent, and checked when they are read.

Orbax writes a checkpoint under a temporary name and renames it, so a kill
leaves the previous one in place. Beside the state lies a checksum of every
array, computed on the devices that hold it: a file that was damaged later
does not come back as plausible numbers.

Whoever only reads writes nothing, so a run that goes on can be read.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxlib_ext import paths, reading


class CheckpointError(Exception):
  """A checkpoint that cannot be written, or none that can be read."""


@jax.jit
def checksums(tree: Any) -> dict[str, jax.Array]:
  """A 32-bit checksum of each leaf: the same on any mesh and process count.

  A sum of the elements' bits, each multiplied by an odd number that depends
  on its position: every single changed element changes it.
  """
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {paths.leaf_name(path): _checksum(leaf) for path, leaf in flat}


def _checksum(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  bits = jnp.finfo(x.dtype).bits if _is_float(x) else None
  if bits is not None and bits < 8:
    x = x.astype(jnp.float32)
  elif jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
    x = x.astype(jnp.int8)
  elif x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  x = jax.lax.bitcast_convert_type(x, _UINTS[x.dtype.itemsize])
  x = x.astype(jnp.uint32)
  weight = jnp.uint32(1)  # stays odd, so invertible modulo 2^32
  for axis in range(x.ndim):
    position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weight = weight * jnp.uint32(2654435761) + 2 * position
  return jnp.sum(x * weight, dtype=jnp.uint32)


# As orbax spells it: no other spelling of a number.
_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_DISK_FULL = "No space left on device"
_UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


class Checkpointer:
  """Saves and restores one pytree of arrays by step number.

  Nothing is written before the first save, which also removes what a killed
  process has left unfinished: at most one process, or the processes of one
  run, may save in a directory.

  Args:
    directory: made on the first save.
    keep: how many of the latest checkpoints to keep.
  """

  def __init__(self, directory: str | pathlib.Path, *, keep: int = 2):
    self._directory = pathlib.Path(directory).resolve()
    self._keep = keep
    self._saving = False

  @functools.cached_property
  def _manager(self) -> ocp.CheckpointManager:
    self._saving = True
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        create=True,
        step_prefix="step",
        cleanup_tmp_directories=True,
      ),
    )

  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, damaged or not, in order."""
    if not self._directory.is_dir():
      return []
    found = map(_STEP.fullmatch, os.listdir(self._directory))
    return sorted(int(match[1]) for match in found if match)

  def save(self, step: int, state: Any) -> None:
    """Starts to write `state`, which may be donated or changed right after.

    Raises:
      CheckpointError: this or the previous checkpoint could not be written.
    """
    sums = {k: int(v) for k, v in checksums(state).items()}
    with _write_errors():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), checksums=ocp.args.JsonSave(sums)
        ),
      )

  def wait(self) -> None:
    """Waits until the last checkpoint is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    if self._saving:
      with _write_errors():
        self._manager.wait_until_finished()

  def restore(self, step: int, target: Any) -> Any:
    """Reads the checkpoint of `step`.

    Args:
      step: one of `steps()`.
      target: pytree of `jax.ShapeDtypeStruct` with the shardings wanted; they
        need not be those of the run that wrote it.

    Raises:
      CheckpointError: the checkpoint is damaged or of another structure.
    """
    try:
      state, sums = self._read(step, target)
    except Exception as e:  # orbax and tensorstore raise many kinds
      raise CheckpointError(_first_line(e)) from e
    found = {k: int(v) for k, v in checksums(state).items()}
    wanted = jax.tree_util.tree_flatten_with_path(target)[0]
    names = (paths.leaf_name(path) for path, _ in wanted)
    missing = [name for name in names if name not in found]
    if missing:
      # Orbax puts None for an array that was None when it was written.
      raise CheckpointError(
        f"it holds no array {missing[0]!r}: another version or other "
        "arguments wrote it"
      )
    wrong = [k for k, v in found.items() if sums.get(k) != v]
    if wrong:
      raise CheckpointError(f"the checksum of {wrong[0]!r} does not match")
    return state

  def _read(self, step: int, target: Any) -> tuple[Any, dict[str, int]]:
    """The state and the checksums that were written with it."""
    directory = self._directory / f"step_{step}"
    reading.check_tree(directory)
    sums = reading.read_json(directory / "checksums" / "metadata", {str: int})
    reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    try:
      arguments = ocp.args.StandardRestore(target)
      return reader.restore(directory / "state", args=arguments), sums
    finally:
      reader.close()

  def restore_latest(
    self, target: Any
  ) -> Iterator[tuple[int, Any | CheckpointError]]:
    """Tries checkpoints from the latest back; each failure is yielded too.

    Yields:
      `(step, state)`, or `(step, CheckpointError)` for a damaged one.
    """
    for step in reversed(self.steps()):
      try:
        yield step, self.restore(step, target)
      except CheckpointError as e:
        yield step, e

  def latest_readable(self, target: Any) -> tuple[int, Any]:
    """`(step, state)` of the latest checkpoint that is whole.

    Raises:
      CheckpointError: there is none; says what each one suffers from.
    """
    failed = []
    for step, found in self.restore_latest(target):
      if not isinstance(found, CheckpointError):
        return step, found
      failed.append(f"step {step}: {found}")
    raise CheckpointError("; ".join(failed) or "there are no checkpoints")

  def set_aside(self, step: int, destination: str | os.PathLike) -> None:
    """Moves a damaged checkpoint out of the way of a new one.

    Call it before the first save.

    Args:
      step: one of `steps()`.
      destination: where to; a number is put behind a name that is taken.
    """
    free, number = pathlib.Path(destination), 1
    while os.path.lexists(free):
      number += 1
      free = free.with_name(f"{pathlib.Path(destination).name}_{number}")
    self._directory.joinpath(f"step_{step}").rename(free)

  def close(self) -> None:
    """Waits for the last write and frees the writer's threads."""
    self.wait()
    if self._saving:
      self._manager.close()


class _write_errors:
  """Turns whatever a failed write raises into a `CheckpointError`."""

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, Exception):
      raise CheckpointError(
        f"cannot write the checkpoint: {_first_line(error)}"
      ) from error


def _first_line(error: Exception) -> str:
  """The root cause of an exception in one line."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = str(error).strip() or type(error).__name__
  if _DISK_FULL in text:
    return _DISK_FULL
  return text.splitlines()[0][:300]
