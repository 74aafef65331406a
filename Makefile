# Everything a checkout needs, from a bare machine with make, git and Python 3.11 or newer.
# Each target makes the virtual environment first, if it is missing or older than the lock.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements/dev.txt
STAMP := $(VENV)/.installed
PYTEST_ARGS ?= -n auto

# No question is ever asked: what reads standard input finds it empty.
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test lint format demo demo-console bench vectors lock clean

help:
	@echo 'make test     ruff, mypy and the whole test suite'
	@echo 'make demo     a server and a few devices on this machine, without a network'
	@echo 'make demo-console   the same with the console, to watch in a browser'
	@echo 'make bench    the benchmarks'
	@echo 'make lint     ruff and mypy only'
	@echo 'make format   let ruff rewrite the code'
	@echo 'make vectors  write tests/vectors again'
	@echo 'make lock     resolve the dependencies again into $(LOCK)'
	@echo 'make clean    remove the environment and all caches'

install: $(STAMP)

$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'EntiDB needs Python 3.11 or newer, and $(PYTHON) is not one:' \
	       'name another with  make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo '$(PYTHON) has no venv module: install it' \
	       '(Debian and Ubuntu: apt install python3-venv), then run make again.' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	@echo 'the suites of db and sync again, on another store (sqlite3):'
	ENTIDB_TEST_STORE=sqlite $(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/db tests/sync --ignore tests/sync/http

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/house.py --calls

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	$(BIN)/entidb demo

demo-console: $(STAMP)
	$(BIN)/entidb demo --console

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

vectors: $(STAMP)
	$(BIN)/python scripts/make_vectors.py
	$(BIN)/python scripts/make_conversations.py
	$(BIN)/python scripts/make_reference.py

# No registry address may stand in the lock: it is the installing machine that knows its registry.
lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal \
	  --python-version 3.11 --upgrade --generate-hashes --no-header --no-emit-index-url \
	  --quiet --output-file $(LOCK)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* htmlcov
	rm -rf .demo .bench
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
