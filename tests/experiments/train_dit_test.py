"""Runs resume to the bit, learn, and refuse mistakes in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import device_memory, errors, signals
from experiments.diffusion import configs, data
from experiments.diffusion import run as run_lib
from experiments.diffusion import trainer as trainer_lib
from jaxlib_ext import records
from tests.experiments import runs

pytestmark = pytest.mark.slow

SMALL = (
  "model.input_shape=8,8,3",
  "model.tile=2,2",
  "model.d_model=16",
  "training.steps=8",
  "training.batch_size=4",
  "training.warmup_steps=2",
  "training.checkpoint_every=3",
  "training.eval_every=4",
  "training.log_every=1",
  "samples.every=4",
  "samples.count=3",
  "samples.steps=2",
  "data.limit=80",
  "optimizer.schedule=constant",
  "optimizer.learning_rate=1e-2",
)


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
  """Compilation is most of the time here: done once."""
  whole, known = trainer_lib.Trainer, {}

  def trainer(config, cfg):
    return known.setdefault(repr((config, cfg)), whole(config, cfg))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer_lib, "Trainer", trainer)
    yield


def run(workdir, *more):
  config = configs.resolve("smoke", [*SMALL, *more])
  return run_lib.Run(config, workdir).train()


def final_state(workdir, *more):
  run_ = run_lib.Run(configs.resolve("smoke", [*SMALL, *more]), workdir)
  state = run_.restore()
  run_.checkpoints.close()
  return jax.tree.map(np.asarray, state)


def losses(workdir):
  return [
    (m["step"], m["loss"], m.get("eval_loss"))
    for m in records.read(workdir / "metrics.jsonl")
  ]


def test_a_run_and_its_resumption(tmp_path, monkeypatch):
  """What it leaves; stopped twice, the same bits; and what `load` gives."""
  whole = tmp_path / "whole"
  summary = run(whole)
  assert {p.name for p in whole.iterdir()} >= {
    "config.json", "metrics.jsonl", "checkpoints", "summary.json",
    "loss.png", "samples", "tensorboard",
  }  # fmt: skip
  drawn = {p.name for p in (whole / "samples").iterdir()}
  assert drawn == {"step_000004.png", "step_000008.png", "final.png"}
  assert [m[0] for m in losses(whole)] == list(range(1, 9))
  assert [m[0] for m in losses(whole) if m[2]] == [4, 8]
  assert summary["step"] == 8 and summary["versions"]["jax"]
  assert summary["eval_loss_other_context"] != summary["final_eval_loss"]

  stopped = tmp_path / "stopped"
  for stop in (2, 5):
    with monkeypatch.context() as patch:
      calls = iter(range(100))
      first = 0 if stop == 2 else 2
      patch.setattr(
        signals.Interrupt,
        "seen",
        lambda self, n=stop - first, c=calls: next(c) + 1 == n and "SIGTERM",
      )
      assert run(stopped) == {}
  assert run(stopped)["final_eval_loss"] == summary["final_eval_loss"]
  runs.assert_same_bits(final_state(whole), final_state(stopped))
  assert losses(whole) == losses(stopped)
  for name in drawn:
    picture = pathlib.Path("samples") / name
    assert (whole / picture).read_bytes() == (stopped / picture).read_bytes()

  trained = run_lib.load(whole)
  state = final_state(whole)
  runs.assert_same_bits(jax.tree.map(np.asarray, trained.params), state.ema)
  assert trained.step == 8 and trained.cfg.context
  assert trained.cfg.num_classes == 2 and trained.cfg.tile == (2, 2)
  trainer = trainer_lib.Trainer(trained.config, trained.cfg)
  batches = trained.corpus.eval_batches(4, 2)
  assert trainer.evaluate(trained.params, batches) == losses(whole)[-1][2]
  with pytest.raises(errors.UserError, match="another config .*ema"):
    run(whole, "training.ema=0.5")


def test_killed_and_resumed_is_bit_identical(tmp_path):
  more = ("training.steps=40",)
  killed = tmp_path / "killed"
  command = [
    sys.executable, "-m", "experiments.train_dit", f"--workdir={killed}",
    *(f"--set={o}" for o in (*SMALL, *more)),
  ]  # fmt: skip
  # As this process, compiler options included.
  environment = {
    **os.environ,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_PLATFORMS": "cpu",
  }
  for step in (5, 20):
    process = subprocess.Popen(
      command,
      cwd=runs.ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    runs.wait_for_step(process, killed, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  run(killed, *more)
  run(tmp_path / "whole", *more)
  runs.assert_same_bits(
    final_state(tmp_path / "whole", *more), final_state(killed, *more)
  )
  assert losses(tmp_path / "whole") == losses(killed)


def test_training_learns_to_look_at_the_context():
  """The true context is worth more than another."""
  config = configs.resolve("smoke", SMALL)
  corpus = data.load(config.data, (8, 8, 3))
  trainer = trainer_lib.Trainer(config, config.build(2))
  state, batch_of = trainer.init(), corpus.batches(4, 0)
  evaluate = lambda shift=0: trainer.evaluate(
    state.ema, corpus.eval_batches(4, 2), shift
  )
  first = evaluate()
  for step in range(100):
    state, _ = trainer.step(state, batch_of(step))
  last, other = evaluate(), evaluate(1)
  assert last < 0.7 * first
  assert last < other


def test_ema_of_the_first_steps():
  config = configs.resolve("smoke", SMALL)
  trainer = trainer_lib.Trainer(config, config.build(2))
  batch_of = data.load(config.data, (8, 8, 3)).batches(4, 0)
  state, ema = trainer.init(), None
  for step in range(3):
    state, _ = trainer.step(state, batch_of(step))
    params = jax.tree.map(np.asarray, state.params)
    decay = (1 + step) / (10 + step)
    if ema is None:
      ema = jax.tree.map(np.asarray, trainer.init().params)
    ema = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, ema, params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    state.ema,
    ema,
  )


def test_pixels_and_grey():
  x = np.arange(256, dtype=np.uint8)
  model = trainer_lib.to_model(x)
  assert model[0] == -1 and model[-1] == 1
  np.testing.assert_array_equal(trainer_lib.to_pixels(model), x)
  colour = trainer_lib.to_model(np.array([[255, 0, 0], [9, 9, 9]], np.uint8))
  grey = trainer_lib.to_pixels(trainer_lib.grey(colour))
  np.testing.assert_array_equal(grey, [[76] * 3, [9] * 3])


REFUSED = {
  "training.stepz=3": ["training.stepz", "did you mean 'steps'"],
  "training.steps=0": ["training.steps", "at least 1"],
  "training.steps": ["path.to.field=value"],
  "training.ema=1": ["training.ema", "0 to below 1"],
  "training.times=cosine": ["training.times", "logit_normal"],
  "training.seq_len=3": ["training.seq_len", "128"],
  "samples.guidance=2 data.labels=false": ["samples.guidance", "data.labels"],
  "model.d_modle=3": ["model.d_modle", "did you mean 'd_model'"],
  "model.num_classes=3": ["model.num_classes", "allowed"],
  "model.tile=3,3": ["model: tile", "(3, 3)"],
  "data.source=web": ["web", "images", "video"],
  "data.source=images": ["--data", "needs a path"],
  "data.held_out=1": ["data.held_out"],
  "optimizer.name=mun": ["did you mean 'muon'"],
}


NINE = "1000000000"


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (f"model.d_model={NINE}0", ["memory", "layers/modulation"]),
    # 4,704 parameters a layer, and their running mean.
    (f"model.num_layers={NINE}", ["memory", "parameters 34.2 TiB"]),
    (f"model.num_layers={NINE} model.scan_layers=False", ["scan_layers=True"]),
    (f"training.batch_size={NINE}", ["memory", "activations"]),
    (f"model.input_shape={NINE},{NINE},3 model.tile=1,1", ["memory"]),
    (f"samples.count={NINE}", ["memory", "activations"]),
    ("model.mlp_ratio=1e30", ["memory", "layers/"]),
    (f"data.limit={NINE}", ["model.input_shape", "data.limit"]),
    (f"model.d_model={NINE * 40}", ["model.d_model", "9223372036854775807"]),
  ],
)
def test_sizes_are_compared_with_memory(
  tmp_path, monkeypatch, overrides, words
):
  monkeypatch.setattr(device_memory, "host_bytes", lambda: 16 << 30)
  with pytest.raises(errors.UserError) as e:
    run_lib.Run(
      configs.resolve("smoke", [*SMALL, *overrides.split()]), tmp_path
    )
  for word in words:
    assert word in str(e.value), e.value
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("overrides", REFUSED)
def test_overrides(overrides):
  with pytest.raises(errors.UserError) as e:
    configs.resolve("smoke", overrides.split())
  for word in REFUSED[overrides]:
    assert word in str(e.value)
  assert "\n" not in str(e.value)


def test_the_configs_fit_their_data():
  for name in configs.CONFIGS:
    config = configs.resolve(name, path="somewhere")
    assert config.training.seq_len == config.build(1).num_tokens * (
      1 + config.build(1).context
    )
    stored = json.loads(json.dumps(config.model))
    assert configs.dit.Config(**stored).grid == config.build(1).grid
  with pytest.raises(errors.UserError, match="did you mean 'smoke'"):
    configs.resolve("smok")


def test_a_directory_that_is_no_run(tmp_path):
  with pytest.raises(errors.UserError, match="is no run's"):
    run_lib.load(tmp_path)


def test_bad_flags_get_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.train_dit", f"--workdir={tmp_path}",
     "--config=image"],
    cwd=runs.ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert len(done.stderr.strip().splitlines()) == 1
  assert "train_dit: --config: no config 'image'; did you mean" in done.stderr


def test_flops_know_the_attention():
  def flops(*more):
    config = configs.resolve("smoke", [*SMALL, *more])
    return trainer_lib.Trainer(config, config.build(3)).flops_per_token()

  full = flops("model.attention=full")
  config = configs.resolve("smoke", SMALL)
  layers, length = config.build(3).num_layers, config.training.seq_len
  dense = flops("model.attention=piecewise", "model.density=1.0")
  assert dense == full
  half = flops(
    "model.attention=piecewise", "model.density=0.25", "model.dense_layers=1"
  )
  # Tiles of four: a quarter of the blocks, and the mean of each.
  fewer = 12.0 * 16 * (layers - 1) * length * 0.5
  assert full - half == pytest.approx(fewer)
