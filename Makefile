# Everything lives in .venv; `make demo` and `make test` set it up by themselves.
#
#   make demo    train a family, cut it out, decode with its own draft (minutes, two cores)
#   make demo-pretrained MODEL=PATH    train a draft for a model that you have, which stays as it is (minutes)
#   make test    the test suite, a worker a core    make test PYTEST_ARGS="tests/models -x"
#   make test-portable    its core as on processors without AVX-512, and without a compiler
#   make gpu     the checks of a machine with a GPU; says so where there is none
#   make lint    style, types, floors
#   make bench   plain decoding against speculative decoding, on the demo's model
#   make setup   only the environment           make setup PYTHON=/path/to/python3.12
#   make clean   removes the environment and caches, never what you trained

SHELL := /bin/bash
BIN := .venv/bin
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=

.PHONY: demo demo-pretrained test test-portable gpu lint bench setup clean

demo: setup
	$(BIN)/nestling demo

demo-pretrained: setup
	@test -n "$(MODEL)" || { echo "error: name a model folder or GGUF file: make demo-pretrained MODEL=PATH" >&2; exit 1; }
	$(BIN)/nestling demo --model "$(MODEL)"

# A file stays with one worker, which runs on one thread: fixtures of a file are made once.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-portable: setup
	.ci/portable

gpu: setup
	$(BIN)/python docs/gpu.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/nestling bench checkpoints/demo/model

setup: .venv/.stamp

# The build backend comes first and build isolation is off, so that constraints.txt pins it too.
.venv/.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt pip hatchling
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || \
	    { echo "error: no Python 3.11 or newer on the PATH; install it, or: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: PYTHON=$(PYTHON) does not run Python 3.11 or newer; try: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find models train tests -type d -name __pycache__ -prune -exec rm -rf {} +
