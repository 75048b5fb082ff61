"""Meshes change who computes, not what is computed."""

import numpy as np
import pytest

from experiments import configs, trainer
from jaxlib_ext import records, sharding
from tests.experiments import runs

OPTIMIZERS = ("adamw", "muon", "scale", "eco")
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


def losses(workdir):
  return np.array([m["loss"] for m in records.read(workdir / "metrics.jsonl")])


@pytest.fixture
def corpus(tmp_path):
  return runs.write_corpus(tmp_path / "corpus")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_eight_devices_agree_with_one(tmp_path, corpus, optimizer):
  settings = runs.settings(
    corpus,
    f"optimizer.name={optimizer}",
    "optimizer.ns_dtype=float32" if optimizer == "muon" else "model.z_loss=0",
    "training.steps=6",
  )
  runs.run(tmp_path / "one", settings)
  runs.run(tmp_path / "eight", settings + list(EIGHT))
  one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
  # Sums in another order: a few units of float32 rounding (6e-8 relative)
  # in the first loss, then what the optimizer makes of it. Sign-like first
  # steps and stochastic rounding turn a last bit into a whole step of a few
  # weights out of thousands.
  np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
  np.testing.assert_allclose(
    eight, one, rtol=1e-5 if optimizer not in ("lion", "eco") else 2e-3
  )


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_resumes_on_four_and_one(
  tmp_path, corpus
):
  first = runs.settings(corpus)
  runs.run(tmp_path / "one", first)
  workdir = tmp_path / "moved"
  process = runs.start(workdir, first + list(EIGHT))
  runs.wait_for_step(process, workdir, 5)
  process.kill()
  process.communicate()
  process = runs.start(
    workdir, first + ["mesh.fsdp=4", "training.log_every=1"], devices=4
  )
  runs.wait_for_step(process, workdir, 9)
  process.kill()
  process.communicate()
  runs.run(workdir, first)
  np.testing.assert_allclose(
    losses(workdir), losses(tmp_path / "one"), rtol=1e-5
  )


@pytest.mark.slow
def test_two_processes_train_the_same_run(tmp_path, corpus):
  settings = runs.settings(corpus, "mesh.data=2", "mesh.fsdp=2")
  runs.run(tmp_path / "one", settings)
  workdir = tmp_path / "two"
  port = 20000 + hash(str(tmp_path)) % 20000
  flags = (f"--coordinator_address=localhost:{port}", "--num_processes=2")
  processes = [
    runs.start(workdir, settings, *flags, f"--process_id={i}", devices=2)
    for i in range(2)
  ]
  for process in processes:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
  np.testing.assert_allclose(
    losses(workdir), losses(tmp_path / "one"), rtol=1e-5
  )


@pytest.mark.slow
def test_eight_devices_divide_work_and_memory():
  def build(**mesh):
    mesh = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    config = configs.resolve(
      "smoke",
      # cost_analysis counts a scanned layer once, whatever their number.
      ["model.scan_layers=False", "training.seq_len=64"]
      + [f"mesh.{name}={size}" for name, size in mesh.items()],
    )
    return trainer.Trainer(
      config, config.model.build(256), sharding.make_mesh(mesh)
    )

  def flops(run):
    return run.compiled.cost_analysis()["flops"] * run.mesh.size

  one = build()
  for mesh in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    eight = build(**mesh)
    parts = mesh["fsdp"] * mesh.get("tensor", 1)
    assert flops(eight) < 1.1 * flops(one), mesh
    for kind in ("params", "state"):
      # Norms and counters are kept whole everywhere.
      whole, part = one.state_bytes()[kind], eight.state_bytes()[kind]
      assert part < 1.05 * whole / parts, (mesh, kind)
