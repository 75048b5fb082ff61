"""The arrows between the packages, and flags only in the mains."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARROWS = {
  "jaxlib_ext": set(),
  "optim": {"jaxlib_ext"},
  "kernels_pallas": {"jaxlib_ext"},
  "models": {"jaxlib_ext", "kernels_pallas"},
  "experiments": {"jaxlib_ext", "optim", "kernels_pallas", "models"},
}


def imported(path: pathlib.Path) -> set[str]:
  """Full names of the modules that a file imports, wherever in the file."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


@pytest.mark.parametrize("package", ARROWS)
def test_imports_follow_the_arrows(package):
  files = sorted((ROOT / package).rglob("*.py"))
  assert files
  allowed = ARROWS[package] | {package}
  for path in files:
    for name in imported(path):
      top = name.split(".")[0]
      if top in ARROWS:
        assert top in allowed, f"{path} imports {name}"
      assert top != "tests", f"{path} imports {name}"
      if package != "experiments":
        assert name != "absl.flags", f"{path} imports {name}"
      if package != "kernels_pallas":
        assert not name.startswith("jax.experimental.pallas"), path
