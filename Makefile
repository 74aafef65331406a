# Everything a checkout needs, from a bare machine with make, git and Python 3.11 or newer.
# Each target makes the virtual environment first, if it is missing or older than the lock.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements/dev.txt
FAILOVER_LOCK := requirements/failover.txt
# Patroni runs as PostgreSQL's user, who cannot read what lies in a home directory.
FAILOVER_PYTHON ?= $(firstword $(wildcard /usr/bin/python3) $(PYTHON))
STAMP := $(VENV)/.installed
PYTEST_ARGS ?= -n auto
POSTGRES_TESTS ?= $(addprefix tests/db/test_,collections.py transactions.py processes.py unique.py \
  feed.py moments.py) $(addprefix tests/sync/test_,pull_rules.py durable_commits.py several_engines.py)

# No question is ever asked: what reads standard input finds it empty.
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-postgres lint format demo demo-console demo-failover failover-tools \
  bench vectors lock clean

help:
	@echo 'make test     ruff, mypy and the whole test suite'
	@echo 'make demo     a server and a few devices on this machine, without a network'
	@echo 'make demo-console   the same with the console, to watch in a browser'
	@echo 'make demo-failover  the primary of a PostgreSQL cluster is killed under two nodes'
	@echo 'make failover-tools Patroni, for that and for scripts/failover'
	@echo 'make bench    the benchmarks'
	@echo 'make test-postgres   a part of it again with databases in PostgreSQL'
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
	@if ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1; then $(MAKE) --no-print-directory test-postgres; \
	else echo 'not run: some suites again on PostgreSQL, because postgresql is not installed'; fi

# A part by subject, for a minute or so: what assumes most of a store. All of it takes half an hour:
#   make test-postgres POSTGRES_TESTS='tests/db tests/sync tests/scenarios --ignore tests/sync/http'
test-postgres: $(STAMP)
	@echo 'some suites again, on another store (PostgreSQL):'
	ENTIDB_TEST_STORE=postgres $(BIN)/python -m pytest -q $(PYTEST_ARGS) $(POSTGRES_TESTS)

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

demo-failover: $(STAMP)
	@$(BIN)/python -m scripts.patroni_rig --demo

failover-tools: .failover/.installed

.failover/.installed: $(FAILOVER_LOCK)
	$(FAILOVER_PYTHON) -m venv .failover
	.failover/bin/pip install --quiet --require-hashes -r $(FAILOVER_LOCK)
	@touch $@

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
	$(BIN)/uv pip compile --group failover --universal \
	  --python-version 3.11 --upgrade --generate-hashes --no-header --no-emit-index-url \
	  --quiet --output-file $(FAILOVER_LOCK)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* htmlcov
	rm -rf .demo .bench .failover
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
