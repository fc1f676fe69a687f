# make demo: set up, tune a small grid for this machine, use it, report.   make test: the checks.
# PYTHON names the interpreter that makes the environment (3.10 or newer), VENV the folder it goes
# to, WORKERS the processes that test: one more than there are cores, since a test often waits for a
# process that it started.

PYTHON ?= python3
VENV ?= .venv
CORES := len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(1 + ($(CORES)))')
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint setup clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/lntune demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

# The grids of sizes, dtypes and variants in full, of which `make test` takes a part.
test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --exhaustive

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# Installed again when what is to be installed changes; the package itself is editable.
$(READY): pyproject.toml constraints.txt tools/bundle.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is too old or missing; lntune needs Python 3.10 or newer:" \
	    "make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
