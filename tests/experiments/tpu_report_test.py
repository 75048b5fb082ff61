"""The report of the TPU kernels."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from experiments import tpu_report
from jaxlib_ext import topology


def test_floor_of_bytes():
  """The values worked out by hand for 128 x 128 and chunks of 64."""
  floor = lambda name, backward: tpu_report.floor_bytes(
    tpu_report.CASES[name], backward
  )
  assert floor("mdn-d128", False) == 2 * 4 * 128 + 16
  assert floor("kda-d128", False) == 2 * 4 * 128 + 4 * 129
  # q, k, v, do and what becomes of the first three; two states of 64 KiB.
  assert floor("mdn-d128", True) == 2 * 7 * 128 + 32 + 2 * 4 * 128 * 128 / 64


def run(*args):
  return subprocess.run(
    [sys.executable, "-m", "experiments.tpu_report", *args],
    capture_output=True,
    text=True,
  )


@pytest.mark.skipif(topology.available(), reason="libtpu is installed")
def test_without_libtpu():
  done = run()
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.splitlines() == [
    "tpu_report: libtpu is needed: pip install 'thriftax[tpu]'"
  ]


@pytest.mark.tpu
@pytest.mark.skipif(
  not topology.available(), reason="libtpu is not installed (thriftax[tpu])"
)
def test_one_case(tmp_path):
  record = tmp_path / "report.jsonl"
  done = run("--chips=v5e", "--cases=linear-d128", f"--record={record}")
  assert done.returncode == 0, done.stderr
  rows = json.loads(record.read_text())["rows"]
  assert [row["kernel"] for row in rows] == ["forward", "saving", "backward"]
  for row in rows:
    assert 0 < row["vmem_used"] <= row["vmem_planned"]
    assert row["flops"] >= row["floor_flops"]
    assert row["bytes"] >= row["floor_bytes"]
  assert done.stdout.count("linear-d128") == 3


@pytest.mark.tpu
@pytest.mark.skipif(
  not topology.available(), reason="libtpu is not installed (thriftax[tpu])"
)
def test_bad_flags():
  done = run("--chips=v9")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    "tpu_report: --chips: got ['v9'], allowed: ['v5e', 'v5p', 'v6e']"
  )
