# make demo    install into .venv and run the main job on the built-in network and data
# make test    install what the tests need and run them
# make coverage  the tests again, with the lines they reach (a third slower)
# make lint    style, types and the import contract
# make bench   the benchmark scripts, one after the other
# make docs    the documentation, warnings as errors (docs/_build/html)
# make clean   remove .venv, caches and what was built
#
# PYTHON=...    the interpreter to build .venv from (default: the first of several that is 3.11 or newer)
# PIP_ARGS=...  passed to pip, e.g. to name the index of a build of torch for your machine
# PYTEST_ARGS=... passed to pytest, e.g. PYTEST_ARGS="-m 'not slow' tests/core"
# DEMO_ARGS=...   passed to the demo, e.g. DEMO_ARGS="--html report.html"

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt
STAMPS := $(VENV)/.stamps

# Small tensors on two threads are slower than on one, by far when the machine is busy.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

# The tests start some twenty processes: kept bytecode spares each of them a second of compiling the package.
unexport PYTHONDONTWRITEBYTECODE

# Every recipe works in the same environment: one at a time, also under make -j.
.NOTPARALLEL:
.PHONY: help demo test coverage lint bench docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^# make/s/^# //p' Makefile

demo: $(STAMPS)/core
	$(BIN)/bolza diagnose --train $(DEMO_ARGS)

test: $(STAMPS)/dev
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

coverage: $(STAMPS)/dev
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term $(PYTEST_ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMPS)/dev
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

docs: $(STAMPS)/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) build dist docs/_build htmlcov .coverage .coverage.* \
		.mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than what it was made from, so a second make installs nothing.
$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "bolza needs Python 3.11 or newer, and none was found on PATH." \
		"Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "bolza needs Python 3.11 or newer, but PYTHON=$(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1). Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu," \
		"install python3-venv (apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/core: $(STAMPS)/venv pyproject.toml constraints.txt
	@echo "Installing bolza into $(VENV): a few minutes the first time (torch is large)."
	$(INSTALL) -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/core
	$(INSTALL) -e '.[dev]'
	@touch $@

$(STAMPS)/docs: $(STAMPS)/core
	$(INSTALL) -e '.[docs]'
	@touch $@
