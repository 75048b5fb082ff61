"""The README's Python runs, and the files it points at are there."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_snippets_run():
  train, quantized, linear, sparse = re.findall(
    r"```python\n(.*?)```", TEXT, re.DOTALL
  )
  names = {}
  exec(train, names)
  tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, 256)
  step, params, state = names["step"], names["params"], names["state"]
  params, state, first = step(params, state, tokens)
  params, state, second = step(params, state, tokens)
  assert second < first
  names["grads"] = jax.tree.map(lambda p: 0.01 * p, params)
  exec(quantized, names)
  assert jax.tree.structure(names["shipped"]) == jax.tree.structure(
    names["params"]
  )
  exec(linear, names)
  assert names["o"].shape == (2, 96, 4, 64)
  assert names["hybrid"].mixers == ("mdn", "mdn", "mdn", "full")
  exec(sparse, names)
  for name in ("near_dense", "o", "streaming"):
    assert names[name].shape == (1, 256, 4, 32)


def test_links_lead_somewhere():
  for target in re.findall(r"\]\(([^)]+)\)", TEXT):
    if "://" not in target:
      assert (ROOT / target).exists(), target


def test_mains_are_named():
  folder = ROOT / "experiments"
  mains = [
    p.stem for p in folder.glob("*.py") if "\nif __name__ ==" in p.read_text()
  ]
  for name in mains:
    if not name.endswith("_worker"):
      assert f"`{name}`" in TEXT or f"experiments.{name}" in TEXT, name
