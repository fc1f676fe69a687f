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

.PHONY: demo test test-all test-versions lint setup clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/lntune demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

# The grids of sizes, dtypes and variants in full, of which `make test` takes a part.
test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --exhaustive

# The tests of what calls on GPUs rest on, with other releases than constraints.txt has, such as
# those of a machine with a GPU (PYTHON=python3.12).
RELEASES ?= torch==2.11.0 numpy==2.5.2
OTHER_VENV ?= .venv-versions
RELEASED := $(shell echo "$(RELEASES)" | sed 's/==[^ ]*//g; s/ /|/g')

test-versions:
	test -x $(OTHER_VENV)/bin/python || $(PYTHON) -m venv $(OTHER_VENV)
	grep -vE '^($(RELEASED)|setuptools)==' constraints.txt > $(OTHER_VENV)/constraints.txt
	$(OTHER_VENV)/bin/python -m pip install -c $(OTHER_VENV)/constraints.txt $(RELEASES) -e '.[test]'
	$(OTHER_VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile \
	  $(wildcard tests/test_on_gpu_*.py tests/test_launcher*.py tests/test_torch*.py) \
	  tests/test_graphs.py tests/test_capture.py tests/test_device_timing.py

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
