"""Small runs for the tests: a corpus, a config, processes to kill."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from experiments import configs, loop
from jaxlib_ext import records

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORDS = "the cat sat on a mat and saw ten small dogs run far away".split()
SMALL = (
  "model.d_model=32",
  "model.d_ff=64",
  "training.steps=12",
  "training.batch_size=8",
  "training.seq_len=32",
  "training.warmup_steps=2",
  "training.checkpoint_every=4",
  "training.eval_every=6",
  "training.eval_batches=2",
  "training.log_every=1",
)


def write_corpus(directory: pathlib.Path) -> pathlib.Path:
  """Twelve files of words in an order that a seed decides."""
  directory.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for i in range(12):
    words = rng.choice(WORDS, 600)
    (directory / f"{i:02}.txt").write_text(" ".join(words) + "\n")
  return directory


def settings(corpus: pathlib.Path, *more: str) -> list[str]:
  """Overrides of a run that takes a second."""
  small = list(SMALL)
  if "training.steps=1" in more:
    small.remove("training.warmup_steps=2")
    small.append("training.warmup_steps=1")
  return [*small, "data.source=files", f"data.path={corpus}", *more]


def run(workdir: pathlib.Path, overrides: list[str]) -> dict:
  """Runs in this process; returns what summary.json holds."""
  return loop.Run(configs.resolve("smoke", overrides), workdir).train()


def start(
  workdir: pathlib.Path, overrides: list[str], *flags: str, devices: int = 8
) -> subprocess.Popen:
  """Starts the main in a process of its own."""
  return subprocess.Popen(
    [
      sys.executable, "-m", "experiments.pretrain", "--config=smoke",
      f"--workdir={workdir}", *(f"--set={o}" for o in overrides), *flags,
    ],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_PLATFORMS": "cpu",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def wait_for_step(
  process: subprocess.Popen, workdir: pathlib.Path, step: int
) -> None:
  """Waits until the run has recorded `step`, or fails with its output."""
  deadline = time.monotonic() + 120
  path = workdir / "metrics.jsonl"
  while time.monotonic() < deadline:
    lines = path.read_text().count("\n") if path.exists() else 0
    if lines and records.read(path)[-1]["step"] >= step:
      return
    if process.poll() is not None:
      raise AssertionError(f"ended early: {process.communicate()}")
    time.sleep(0.005)
  process.kill()
  raise AssertionError(f"step {step} was not reached in two minutes")


def final_state(workdir: pathlib.Path, overrides: list[str]):
  """The state of the last checkpoint, as numpy arrays."""
  run_ = loop.Run(configs.resolve("smoke", overrides), workdir)
  state = run_.restore()
  run_.checkpoints.close()
  return jax.tree.map(np.asarray, state)


def assert_same_bits(a, b) -> None:
  """Every array of both trees has the same bytes."""
  flat_a, tree_a = jax.tree.flatten(a)
  flat_b, tree_b = jax.tree.flatten(b)
  assert tree_a == tree_b
  for x, y in zip(flat_a, flat_b, strict=True):
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
