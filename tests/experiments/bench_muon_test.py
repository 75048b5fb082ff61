"""The benchmark runs and reports every contender, on a toy model."""

from __future__ import annotations

import pytest

from experiments import bench_muon
from models import transformer


@pytest.mark.slow
def test_compare():
  cfg = transformer.llama(
    "9M", vocab_size=32, d_model=16, d_ff=24, num_layers=2, num_heads=2
  )
  result = bench_muon.compare(cfg, repeats=2)
  names = set(bench_muon.contenders())
  for field in ("temp_bytes", "seconds", "median", "spread", "ratio"):
    assert set(result[field]) == names
  assert all(len(v) == 2 for v in result["seconds"].values())
  assert result["ratio"]["optax.contrib.muon/unstacked"] == 1
  for name, ends in result["ranges"].items():
    low, high = ends["0.01"]
    # Keller's schedule reaches 0.68 and 1.2, ours more.
    assert 0.6 < low < high < 1.25, name
