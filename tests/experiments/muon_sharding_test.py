"""The comparison of sharded Newton-Schulz, on simulated devices."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from experiments import muon_sharding
from jaxlib_ext import topology

pytestmark = pytest.mark.usefixtures("full_optimization")


def test_flops_of_one_matrix():
  # Per step: two products with the long side, one of the short side alone.
  assert muon_sharding.flops([(1, 3, 5)]) == 5 * (
    2 * (2 * 3 * 3 * 5) + 2 * 3 * 3 * 3
  )
  assert muon_sharding.flops([(2, 5, 3)]) == 2 * muon_sharding.flops(
    [(1, 3, 5)]
  )


def test_experts_are_matrices_of_their_own():
  case = muon_sharding.CASES["60M-8-moe"]
  shapes = {x.shape for x in muon_sharding.matrices(case).values()}
  assert shapes == {(8, 512, 512), (8, 16, 512, 256), (8, 16, 256, 512)}
  assert muon_sharding.flops([(8, 16, 5, 3)]) == muon_sharding.flops(
    [(128, 5, 3)]
  )
  counts = [x["matrices"] for batch in muon_sharding.plan(case) for x in batch]
  assert sorted(counts) == [8 * 4, 8 * 16 * 3]


def test_plans_hold_all_matrices():
  case = muon_sharding.CASES["5B-v5e"]
  (batch,) = muon_sharding.plan(case)
  assert sum(span["matrices"] for span in batch) == 24 * 7
  assert {span["strips"] for span in batch} == {1, 2}


@pytest.mark.slow
def test_ours_beside_the_compilers():
  case = muon_sharding.Case(
    "9M", {"data": 2, "fsdp": 2, "tensor": 2}, None, {"num_layers": 4}
  )
  ours, naive = (muon_sharding.measure(case, naive) for naive in (False, True))
  assert ours["ideal_flops"] == naive["ideal_flops"]
  assert ours["flops"] <= 1.1 * ours["ideal_flops"]
  assert ours["total_collective_bytes"] <= ours["momentum_bytes"]
  assert naive["total_collective_bytes"] > 4 * ours["total_collective_bytes"]


def run(*args):
  return subprocess.run(
    [sys.executable, "-m", "experiments.muon_sharding", *args],
    capture_output=True,
    text=True,
  )


def test_bad_cases():
  done = run("--cases=60M-9")
  assert done.returncode == 2 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("muon_sharding: --cases: got ['60M-9'], allowed:")


@pytest.mark.skipif(topology.available(), reason="libtpu is installed")
def test_pods_need_libtpu():
  done = run("--cases=5B-v5e")
  assert done.returncode == 2 and not done.stdout
  assert "needs libtpu" not in done.stderr or "thriftax[tpu]" in done.stderr


def test_the_record_is_of_these_cases():
  with open("experiments/records/muon_sharding.jsonl", encoding="utf-8") as f:
    for line in f:
      record = json.loads(line)
      assert set(record["cases"]) <= set(muon_sharding.CASES)
      assert {row["case"] for row in record["rows"]} == set(record["cases"])
