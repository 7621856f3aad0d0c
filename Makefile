# Everything a contributor runs. A fresh clone needs Python 3.11 or newer, with pip, and nothing else.
#
#   make demo    train one small denoiser on 8x8 digits, sample it under five processes, write a report
#   make test    ruff, mypy and the test suite
#   make lint    ruff and mypy only
#   make docs    the documentation, into docs/_build/html
#   make bench   every benchmark in bench/, one after the other
#   make clean   remove caches, builds and install stamps; .venv and runs/ stay

PYTHON ?= python3
JOBS   ?= 2

VENV := .venv
BIN  := $(VENV)/bin
# --no-compile: Python compiles the few modules that are imported, when they are
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

export MPLBACKEND ?= Agg

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

# -- installation: once per set of extras, again when the requirements change -----------------------------------------

$(VENV)/.installed-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "undrift needs Python 3.11 or newer, and \
	$(PYTHON) is " + sys.version.split()[0] + "; name another one with  make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e '.[$*]'
	@touch $@

# -- what there is to run ---------------------------------------------------------------------------------------------

demo: $(VENV)/.installed
	$(BIN)/undrift demo

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(VENV)/.installed-bench
	@set -e; for script in bench/*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.installed*
	find src tests bench docs examples -name __pycache__ -type d -prune -exec rm -rf {} +
