"""Each mistake gets one line that says what was got and what is allowed."""

import dataclasses
import os
import resource
import subprocess
import sys
import textwrap
import time

import pytest

from experiments import configs, device_memory, errors, loop, stored
from experiments.diffusion import configs as dit_configs
from jaxlib_ext import config as config_lib
from tests.experiments import runs

REFUSED = {
  "training.stepz=3": ["training.stepz", "did you mean 'steps'"],
  "trainning.steps=3": ["trainning", "training"],
  "training.steps=ten": ["training.steps", "'ten'", "int"],
  "training.steps=0": ["training.steps", "at least 1"],
  "training.steps": ["path.to.field=value"],
  "optimizer.name=mun": ["'mun'", "did you mean 'muon'", "adamw"],
  "optimizer.momentm=0.9": ["optimizer.momentm", "adamw"],
  "optimizer.b1=big": ["optimizer.b1", "'big'", "float"],
  "optimizer.learning_rate=-1": ["optimizer.learning_rate", "-1"],
  "optimizer.schedule=cosin": ["cosin", "did you mean 'cosine'"],
  "quantization.format=int5:x": ["int5:x"],
  "model.preset=61M": ["preset", "61M", "60M", "mdn-400M"],
  "model=3": ["group of fields", "preset", "d_model"],
  "model.d_modle=3": ["model.d_modle", "did you mean 'd_model'"],
  "model.d_model=33": ["d_model", "33"],
  "model.remat=some": ["some", "full"],
  "mesh.data=0": ["mesh.data", "at least 1"],
  "data.source=web": ["web", "python", "files", "shards"],
  "data.source=files": ["data.path"],
  "data.held_out=2": ["data.held_out", "2"],
  "data.held_out=nan": ["data.held_out", "'nan'"],
  "training.steps=99999999999": ["training.steps", "2147483647"],
  "training.seed=4294967296": ["training.seed", "4294967295"],
  "training.seed=99999999999999999999": ["training.seed", "4294967295"],
  "training.seed=-1": ["training.seed", "-1", "0 to"],
  "optimizer.final_fraction=-3": ["optimizer.final_fraction", "-3"],
  "optimizer.final_fraction=1.5": ["optimizer.final_fraction", "1.5"],
  "optimizer.learning_rate=inf": ["optimizer.learning_rate", "'inf'"],
  "optimizer.b1=1.5": ["optimizer.name=adamw", "b1", "1.5"],
  "optimizer.name=sgd optimizer.momentum=-1": ["sgd", "momentum", "-1"],
  "optimizer.name=muon optimizer.momentum=1": ["muon", "momentum", "1"],
  "model.num_heads=5": ["num_heads", "d_model"],
  "model.mixers=full,,mdn": ["model.mixers", "'full,,mdn'", "empty"],
  "model.mixers=,": ["model.mixers", "','", "empty"],
  "model.mixers=full,": ["model.mixers", "'full,'", "empty"],
  "model.mixers=": ["mixers", "at least one name"],
  # Sizes that no memory and no compiler has room for.
  "model.d_model=1" + "0" * 400: ["model.d_model", "9223372036854775807"],
  "model.mixers=window model.window=99999999999": ["model.window"],
  "optimizer.name=muon optimizer.ns_steps=1000000000": ["ns_steps", "1000"],
  "optimizer.name=galore optimizer.update_interval=9999999999": ["32 bits"],
  "optimizer.name=spam optimizer.warmup=9999999999": ["warmup", "32 bits"],
  "model.mixers=in_context model.context=9999999999": ["0 to 2147483647"],
  # Without effect.
  "data.path=/x": ["data.path", "data.source=files"],
  "quantization.format=int4": ["quantization.format", "adamw", "eco"],
  "model.window=4": ["model.window", "window", "full"],
  "model.conv_width=3": ["model.conv_width", "gdn"],
  "model.mixers=mdn,full model.density=0.5": ["model.density", "sparse"],
  "training.warmup_steps=61": ["training.warmup_steps", "training.steps=60"],
  "optimizer.schedule=constant optimizer.final_fraction=0.5": ["schedule"],
  "optimizer.name=mezo optimizer.clip_norm=1": ["clip_norm", "mezo"],
}
ACCEPTED = (
  "training.steps=1",
  "training.seed=4294967295",
  "model.num_heads=8 model.num_kv_heads=2",
  "model.d_model=66 model.num_heads=3",
  "model.preset=60M model.num_kv_heads=2",
  "model.d_model=768 model.num_heads=12 model.num_layers=12 model.d_ff=3072",
  "model.window=4 model.mixers=window,full",
  "quantization.format=int4 optimizer.name=eco",
  "optimizer.final_fraction=0",
)


@pytest.mark.parametrize("override", REFUSED)
def test_overrides(override):
  with pytest.raises(errors.UserError) as e:
    configs.resolve("smoke", override.split())
  for word in REFUSED[override]:
    assert word in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_valid_models_whatever_the_default_is(overrides):
  for order in (1, -1):
    configs.resolve("smoke", overrides.split()[::order])


def test_data_without_effect(tmp_path):
  (tmp_path / "meta.json").write_text("{}")
  given = ["data.source=shards", f"data.path={tmp_path}"]
  configs.resolve("smoke", given)
  for override in ("data.tokenizer=bpe:300", "data.held_out=0.1"):
    with pytest.raises(errors.UserError, match="has no effect with"):
      configs.resolve("smoke", [*given, override])


def test_config_name():
  with pytest.raises(errors.UserError, match="did you mean 'tiny'"):
    configs.resolve("tinny")


@pytest.fixture
def corpus(tmp_path):
  return runs.write_corpus(tmp_path / "corpus")


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("mesh.data=16", ["16", "8"]),
    ("training.batch_size=7 mesh.data=2", ["training.batch_size", "7", "2"]),
    ("mesh.tensor=3", ["3"]),
    ("model.vocab_size=100", ["model.vocab_size", "100", "256"]),
    ("model.mixers=in_context", ["model.context", "256", "training.seq_len"]),
    ("data.path=/nowhere", ["/nowhere"]),
    ("data.tokenizer=bpe:many", ["bpe:many"]),
    ("data.tokenizer=bites", ["bites", "bytes"]),
    ("training.seq_len=10000000", ["10000001"]),
    (
      "optimizer.name=muon optimizer.coefficients=kellar",
      ["optimizer.name=muon", "'kellar'", "'keller'"],
    ),
  ],
)
def test_runs(tmp_path, corpus, override, words):
  settings = runs.settings(corpus, *override.split())
  with pytest.raises(errors.UserError) as e:
    runs.run(tmp_path / "run", settings)
  for word in words:
    assert word in str(e.value), e.value
  assert "\n" not in str(e.value)


NINE = "1000000000"


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    # Two layers, three matrices of 32 x 10^12 float32 each.
    (f"model.d_ff={NINE}000", ["698.5 TiB", "layers/down", NINE + "000"]),
    # 10,080 parameters a layer.
    (f"model.num_layers={NINE}", ["parameters 37.5 TiB"]),
    (f"model.num_layers={NINE} model.scan_layers=False", ["model.num_layers"]),
    ("model.num_layers=1025 model.scan_layers=False", ["1025", "scan_layers"]),
    # The embedding and the head.
    (f"model.vocab_size={NINE}", ["parameters 238.4 GiB", "embed"]),
    ("model.d_model=1" + "0" * 18, ["10^37 B"]),
    (f"model.num_heads={NINE} model.head_dim=2", ["parameters 1.9 TiB"]),
    (
      f"model.num_heads={NINE} model.head_dim=2 model.mixers=window,full",
      ["parameters 1.9 TiB"],
    ),
    (f"model.linear_heads={NINE} model.mixers=mdn", ["parameters 21.0 TiB"]),
    (f"training.batch_size={NINE}", ["parameters 80.9 KiB", "activations"]),
    ("training.seq_len=2147483647", ["activations 4.1 TiB"]),
    (
      f"model.num_layers={NINE} optimizer.name=eco",
      ["parameters 4.7 TiB"],  # Codes of 4 bits.
    ),
    (f"model.mixers=window model.block_size={NINE}", ["block_size", "64"]),
    (f"optimizer.name=galore optimizer.rank={NINE}", ["rank", NINE]),
  ],
)
def test_sizes_are_compared_with_memory(
  tmp_path, corpus, monkeypatch, overrides, words
):
  monkeypatch.setattr(device_memory, "host_bytes", lambda: 16 << 30)
  before = time.monotonic()
  with pytest.raises(errors.UserError) as e:
    runs.run(tmp_path / "run", runs.settings(corpus, *overrides.split()))
  assert time.monotonic() - before < 10  # Not compiled, not allocated.
  for word in words:
    assert word in str(e.value), e.value
  assert "\n" not in str(e.value)
  assert len(str(e.value)) < 400


def test_memory_is_compared_with_what_each_device_holds(
  tmp_path, corpus, monkeypatch
):
  def refused(room, *overrides):
    monkeypatch.setattr(device_memory, "host_bytes", lambda: room)
    config = configs.resolve("smoke", runs.settings(corpus, *overrides))
    try:
      loop.Run(config, tmp_path / "-".join([str(room), *overrides]))
    except errors.UserError as e:
      return str(e)
    return None

  params = loop.Run(
    configs.resolve("smoke", runs.settings(corpus)), tmp_path / "run"
  ).trainer.state_bytes()
  state = int(params["params"] + params["state"])
  # As much again, and two counters, for AdamW's moments.
  assert state == 3 * 4 * 37_024 + 8
  wanted = "has 433.9 KiB, the run needs at least 433.9 KiB"
  assert wanted in refused(state - 1)
  assert refused(state) is None
  assert refused(0) is None  # Unknown.
  # Two simulated devices share the host's memory, and half of the matrices.
  assert "has 216.9 KiB" in refused(state, "mesh.fsdp=2")
  assert refused(2 * state, "mesh.fsdp=2") is None


@pytest.mark.parametrize("kind", ["empty", "binary", "small"])
def test_corpora(tmp_path, kind):
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  if kind == "binary":
    (corpus / "a.bin").write_bytes(bytes(1000))
  elif kind == "small":
    (corpus / "a.txt").write_text("too short")
  with pytest.raises(errors.UserError) as e:
    runs.run(tmp_path / "run", runs.settings(corpus))
  assert "\n" not in str(e.value)


@pytest.mark.slow
def test_another_configs_workdir_is_left_alone(tmp_path, corpus):
  runs.run(tmp_path / "run", runs.settings(corpus))
  files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
  before = {p: p.read_bytes() for p in files}
  with pytest.raises(errors.UserError, match="training.seed: 0 → 1"):
    runs.run(tmp_path / "run", runs.settings(corpus, "training.seed=1"))
  assert {p: p.read_bytes() for p in files} == before


@pytest.mark.parametrize("main", [configs, dit_configs])
def test_a_config_from_before_a_field_was_added(main):
  config = main.resolve("smoke")
  before = config_lib.to_dict(config)
  del before["training"]["init_from"]
  stored.check_config(before, config, "DIR")
  other = dataclasses.replace(
    config, training=dataclasses.replace(config.training, init_from="x")
  )
  with pytest.raises(errors.UserError, match="init_from: '' → 'x'"):
    stored.check_config(before, other, "DIR")
  # One that is gone is not passed over.
  before["training"]["gone"] = 1
  with pytest.raises(errors.UserError, match="training.gone: 1 → None"):
    stored.check_config(before, config, "DIR")


@pytest.mark.slow
def test_a_changed_corpus_is_refused(tmp_path, corpus):
  runs.run(tmp_path / "run", runs.settings(corpus))
  (corpus / "00.txt").write_text("other words " * 400)
  with pytest.raises(errors.UserError, match="corpus has changed"):
    runs.run(tmp_path / "run", runs.settings(corpus))


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags", [["--config=nothing"], ["--set=mesh.data=99"], ["--stes=3"]]
)
def test_the_main_exits_with_two_and_one_line(tmp_path, flags):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.pretrain",
      "--config=smoke",
      f"--workdir={tmp_path / 'run'}",
      *flags,
    ],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2, done
  assert done.stdout == ""
  assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("where", ["imports", "main"])
def test_an_interrupt_before_the_loop_gets_one_line(tmp_path, where):
  """What Python raises for Ctrl-C is raised where it may come."""
  command = ["-m", "experiments.pretrain"]
  if where == "imports":  # Of a package that is found before the right one.
    (tmp_path / "absl.py").write_text("raise KeyboardInterrupt")
  else:
    code = """
    from experiments import errors
    def main(): raise KeyboardInterrupt
    errors.run_main("pretrain", main, lambda: None)
    """
    command = ["-c", textwrap.dedent(code)]
  done = subprocess.run(
    [sys.executable, *command],
    cwd=runs.ROOT,
    env={**os.environ, "PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 130, done
  assert (done.stdout, done.stderr) == ("", "pretrain: interrupted\n")


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, corpus):
  """A file-size limit stands in for a disk without room."""
  settings = runs.settings(corpus)
  workdir = tmp_path / "run"
  process = runs.start(workdir, settings)
  runs.wait_for_step(process, workdir, 5)
  process.kill()
  process.communicate()
  limit = (4096, resource.RLIM_INFINITY)
  process = runs.start(workdir, settings)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 2, err
  last = err.strip().splitlines()[-1]
  assert last.startswith("pretrain: cannot write the checkpoint"), err
  runs.run(workdir, settings)
  whole = tmp_path / "whole"
  runs.run(whole, settings)
  runs.assert_same_bits(
    runs.final_state(whole, settings), runs.final_state(workdir, settings)
  )
