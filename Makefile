# `make pretrain` and `make test` set everything up in .venv, then run.
#   make pretrain ARGS="--set=optimizer.name=scale"
#   make test ARGS="tests/optim -k muon"
#   make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# Two workers suit two cores; each test process simulates eight devices.
WORKERS ?= 2

.PHONY: pretrain test lint setup clean

pretrain: $(VENV)/.ready
	$(BIN)/python -m experiments.pretrain --config=tiny $(ARGS)

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "thriftax needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11" % v)'
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
