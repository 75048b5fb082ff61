"""Damage to each file of a run: one line, no traceback, no hang, no loss."""

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import configs, errors, loop, stored, workdirs
from experiments.diffusion import run as dit_run
from jaxlib_ext import checkpoint
from tests.experiments import runs

# What tensorstore drops when a read fails is an error of whatever test the
# garbage collector finds it in.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True, scope="module")
def _collected():
  yield
  gc.collect()


def _write(content):
  return lambda path: path.write_bytes(content)


def _flip(path):
  content = bytearray(path.read_bytes() or b" ")
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def _replaced(make):
  def damage(path):
    path.unlink()
    make(path)

  return damage


DAMAGES = {
  "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
  "empty": _write(b""),
  "zeroed": lambda p: p.write_bytes(bytes(p.stat().st_size)),
  "flipped": _flip,
  "deleted": lambda p: p.unlink(),
  "directory": _replaced(lambda p: p.mkdir()),
  "link": _replaced(lambda p: p.symlink_to("/etc/hostname")),
  "pipe": _replaced(os.mkfifo),
  "list": _write(b"[]"),
  "text": _write(b'{"step": "x", "config": 3, "checksums": []}'),
  "deep": _write(b"[" * 100_000),
  "latin": _write(b'{"a": "\xe9"}'),
  "huge": _write(b'{"step": ' + b"9" * 5000 + b"}"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A finished run with checkpoints of two steps, and its settings."""
  root = tmp_path_factory.mktemp("trained")
  settings = runs.settings(
    runs.write_corpus(root / "corpus"),
    "training.steps=4",
    "training.checkpoint_every=2",
  )
  runs.run(root / "run", settings)
  return root / "run", settings


@pytest.fixture
def copy(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / "run")
  return tmp_path / "run"


def _files(workdir):
  return sorted(
    str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.is_file()
  )


def _contents(workdir):
  return {
    p: p.read_bytes()
    for p in workdir.rglob("*")
    if p.is_file() and not p.is_symlink()
  }


def _plain(name):
  """The kind of a file of a checkpoint: names in `d` are random."""
  return name.rsplit("/d/", 1)[0]


def _one_line(error):
  assert "\n" not in str(error) and str(error).strip()


def test_each_file_of_the_newest_checkpoint(trained, tmp_path):
  """The next older one is read, or the same bits; nothing is written."""
  workdir, settings = trained
  run = loop.Run(configs.resolve("smoke", settings), workdir, read_only=True)
  whole = dict(
    (step, jax.tree.map(np.asarray, state))
    for step, state in checkpoint.Checkpointer(
      workdir / "checkpoints"
    ).restore_latest(run.trainer.target)
  )
  assert list(whole) == [4, 2]
  names = [n for n in _files(workdir) if n.startswith("checkpoints/step_4/")]
  # Every damage that needs the array library once for each kind of file.
  seen, found = set(), 0
  for name in names:
    kind = _plain(name)
    damages = list(DAMAGES)
    if kind in seen:
      damages = ["truncated"]
    elif "/d" in name or "process_0" in name:
      damages = ["flipped", "deleted", "pipe"]
    seen.add(kind)
    for damage in damages:
      target = tmp_path / str(found)
      shutil.copytree(workdir / "checkpoints", target / "checkpoints")
      DAMAGES[damage](target / name)
      before = _contents(target)
      step, state = stored.state(target, run.trainer.target, "--x")
      runs.assert_same_bits(jax.tree.map(np.asarray, state), whole[step])
      if damage in ("link", "pipe"):
        assert step == 2, (name, damage)
      assert _contents(target) == before
      found += 1
      shutil.rmtree(target)
  assert found > 40


@pytest.mark.parametrize("damage", ["file", "link", "pipe", "empty"])
def test_a_newest_checkpoint_that_is_no_directory(
  trained, copy, damage, capsys
):
  """The run takes the older one, says so, and loses neither."""
  step = copy / "checkpoints" / "step_4"
  step.rename(copy / "elsewhere")
  {
    "file": lambda p: p.write_text("x"),
    "link": lambda p: p.symlink_to(copy / "elsewhere"),
    "pipe": os.mkfifo,
    "empty": lambda p: p.mkdir(),
  }[damage](step)
  before = _contents(copy / "elsewhere")
  runs.run(copy, trained[1])
  assert "checkpoint of step 4 is damaged" in capsys.readouterr().err
  assert os.path.lexists(copy / "damaged_step_4")
  assert _contents(copy / "elsewhere") == before
  runs.assert_same_bits(
    runs.final_state(copy, trained[1]), runs.final_state(*trained)
  )


TOP = ("config.json", "metrics.jsonl", "summary.json", "loss.png", "run.lock")


@pytest.mark.parametrize("name", TOP)
def test_each_file_of_a_run(trained, tmp_path, name):
  """Resuming succeeds, or is refused in one line; others' files stay."""
  config = configs.resolve("smoke", trained[1])
  other = pathlib.Path("/etc/hostname").read_bytes()
  for damage in DAMAGES:
    workdir = tmp_path / damage
    shutil.copytree(trained[0], workdir)
    DAMAGES[damage](workdir / name)
    before = _contents(workdir)
    strange = damage in ("directory", "link", "pipe")
    try:
      run = loop.Run(config, workdir)
      with run._held:
        stored.history(run.metrics_path, config.training.steps)
    except errors.UserError as e:
      _one_line(e)
      assert name in str(e)
      assert _contents(workdir) == before, damage
    else:
      assert not strange
      assert name not in ("config.json", "metrics.jsonl") or damage == "flipped"
    # A reader of the same.
    try:
      assert stored.read(workdir, "--x").config == config
    except errors.UserError as e:
      _one_line(e)
      assert name == "config.json"
    with pytest.raises(errors.UserError) as e:
      dit_run.load(workdir)
    _one_line(e.value)
  assert pathlib.Path("/etc/hostname").read_bytes() == other


@pytest.mark.parametrize(
  "changes",
  [
    {"config": {"model": 3}},
    {"config": {"training": {"steps": "x"}}},
    {"config": {"training": {"init_from": "a\0b"}}},
    {"config": {"optimizer": {"learning_rate": 10**400}}},
    {"config": {"optimizer": {"name": "nothing"}}},
    {"model": {}},
    {"model": {"vocab_size": [[[1]]]}},
    {"model": {"mixers": {"a": 1}}},
    {"corpus": {"hash": 3}},
  ],
)
def test_a_config_with_other_values(trained, copy, changes):
  path = copy / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  before = _contents(copy)
  settings = [*trained[1], f"training.init_from={copy}"]
  with pytest.raises(errors.UserError) as e:
    runs.run(copy.parent / "next", settings)
  _one_line(e.value)
  assert _contents(copy) == before


OWN = (
  "metrics.jsonl",
  "summary.json",
  "loss.png",
  "tokenizer.json",
  "checkpoints",
  "tensorboard",
  "config.json.part",
)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_files_of_others(trained, tmp_path, name, kind):
  workdir = tmp_path / "theirs"
  workdir.mkdir()
  path = workdir / name
  if kind == "file":
    path.write_text("{}")
  elif kind == "directory":
    path.mkdir()
    (path / "step_1").write_text("{}")
  else:
    path.symlink_to(tmp_path / "nowhere")
  settings = trained[1]
  if name == "tokenizer.json":
    settings = [*settings, f"data.tokenizer={path}"]
  before = _contents(workdir), os.listdir(workdir)
  with pytest.raises(errors.UserError, match=name) as e:
    runs.run(workdir, settings)
  _one_line(e.value)
  assert "choose another --workdir" in str(e.value)
  assert (_contents(workdir), os.listdir(workdir)) == before


def test_other_files_and_a_linked_directory_are_welcome(trained, tmp_path):
  (tmp_path / "real").mkdir()
  (tmp_path / "real" / "notes.txt").write_text("mine")
  (tmp_path / "run").symlink_to(tmp_path / "real")
  runs.run(tmp_path / "run", trained[1])
  assert (tmp_path / "real" / "notes.txt").read_text() == "mine"
  assert (tmp_path / "real" / "summary.json").exists()


def test_a_start_that_was_killed_does_not_block_the_next(trained, tmp_path):
  """Before config.json is written, and between it and what follows it."""
  workdir = tmp_path / "run"
  start = workdir / workdirs.START
  start.mkdir(parents=True)
  (start / "tokenizer.json").write_text("{")
  (start / "tokenizer.json.part").write_text("{")
  (workdir / workdirs.LOCK).touch()
  config = configs.resolve("smoke", [*trained[1], "data.tokenizer=bpe:280"])
  del (run := [loop.Run(config, workdir)])[:]
  tokenizer = (workdir / "tokenizer.json").read_bytes()
  start.mkdir()
  (workdir / "tokenizer.json").rename(start / "tokenizer.json")
  run.append(loop.Run(config, workdir))
  assert (workdir / "tokenizer.json").read_bytes() == tokenizer
  assert not start.exists()
  # What no run makes is not deleted.
  run.clear()
  start.mkdir()
  (start / "thesis.txt").write_text("mine")
  with pytest.raises(errors.UserError, match=r"thesis\.txt"):
    loop.Run(config, workdir)
  assert (start / "thesis.txt").exists()


def test_two_runs_in_one_directory(trained, copy):
  config = configs.resolve("smoke", trained[1])
  first = loop.Run(config, copy)
  before = _contents(copy)
  for _ in range(2):
    with pytest.raises(errors.UserError, match="another process is running"):
      loop.Run(config, copy)
  assert _contents(copy) == before
  # Of a process of its own too, at once; and reading does not ask.
  process = runs.start(copy, trained[1])
  out, err = process.communicate(timeout=120)
  assert process.returncode == 2 and out == ""
  assert err.count("\n") == 1 and "another process is running" in err
  loop.Run(config, copy, read_only=True)
  assert _contents(copy) == before
  first.train()
  assert loop.Run(config, copy).stored


def test_a_lock_ends_with_its_process(tmp_path):
  code = (
    "import os, pathlib; from experiments import workdirs; "
    f"lock = workdirs.Lock(pathlib.Path({str(tmp_path)!r})); "
    "os.kill(os.getpid(), 9)"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT)
  assert done.returncode == -9
  with workdirs.Lock(tmp_path):
    with pytest.raises(errors.UserError, match=r"run\.lock"):
      workdirs.Lock(tmp_path)
  with workdirs.Lock(tmp_path):
    pass
  assert (tmp_path / workdirs.LOCK).read_bytes() == b""


def test_readers_leave_a_save_in_progress_alone(trained, copy, tmp_path):
  part = copy / "checkpoints" / "step_6.orbax-checkpoint-tmp"
  (part / "state").mkdir(parents=True)
  (part / "state" / "half").write_text("written")
  before = _contents(copy)
  settings = [*trained[1], f"training.init_from={copy}"]
  runs.run(tmp_path / "next", settings)
  assert _contents(copy) == before
