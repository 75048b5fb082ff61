"""The notebooks run from the root of a clone, and are committed as run.

They are executed without Jupyter, which the tests do not install: the code
cells in order, in a fresh interpreter, warnings as errors.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
# Cells come from stdin as a JSON list; linecache and traceback show the line
# of the cell that failed.
RUNNER = """
import json, linecache, sys, traceback
names = {"__name__": "__main__"}
for i, source in enumerate(json.load(sys.stdin), start=1):
  where = f"<{sys.argv[1]}, code cell {i}>"
  linecache.cache[where] = (len(source), None, source.splitlines(True), where)
  try:
    exec(compile(source, where, "exec"), names)
  except BaseException:
    sys.exit(traceback.format_exc())
"""


def code_cells(text):
  cells = json.loads(text)["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def execute(name, cells):
  """Runs the cells; AssertionError with the cell and the line that failed."""
  sources = ["".join(cell["source"]) for cell in cells]
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", RUNNER, name],
    input=json.dumps(sources),
    env=os.environ | {"MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, f"{name} failed:\n{done.stderr}"
  return done.stdout


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
  cells = code_cells(path.read_text(encoding="utf-8"))
  assert execute(path.name, cells)


def test_an_error_names_its_cell():
  cells = [
    {"source": ["x = 1\n", "print(x)"]},
    {"source": ["y = 2\n", "assert x == y"]},
  ]
  assert execute("a.ipynb", cells[:1]) == "1\n"
  with pytest.raises(AssertionError) as error:
    execute("a.ipynb", cells)
  message = str(error.value)
  assert '"<a.ipynb, code cell 2>", line 2' in message
  assert "    assert x == y" in message


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_run(path):
  """With outputs, from one run from top to bottom, small."""
  text = path.read_text(encoding="utf-8")
  cells = code_cells(text)
  counts = [cell["execution_count"] for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  outputs = [out for cell in cells for out in cell["outputs"]]
  # Streams and figures: no errors, no warnings, no bare results.
  kinds = {out["output_type"] for out in outputs}
  assert kinds == {"stream", "display_data"}
  for out in outputs:
    assert out.get("name") != "stderr", out
    assert set(out.get("data", {"image/png": ""})) == {"image/png"}
  assert len(text) < 500_000
