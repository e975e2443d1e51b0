# Every target brings up what it needs in .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := .ci/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench interop lab clean

help: ## what can be made here
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.ready ## everything into .venv, once

.venv/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo 'Raceme needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@echo '== 1/3 creating .venv'
	$(PYTHON) -m venv .venv
	@echo '== 2/3 installing torch (the largest part: some minutes on a slow line)'
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) uv torch
	@echo '== 3/3 installing Raceme and the rest'
	$(BIN)/uv pip install --python $(BIN)/python -c $(CONSTRAINTS) --editable '.[dev]'
	@rm -rf .venv/lib/python*/site-packages/trio-stubs # libp2p brings outdated stubs that hide trio's own types
	@touch $@

demo: .venv/.ready ## a swarm on this machine: a relay, three nodes, a client
	$(BIN)/raceme demo

test: .venv/.ready ## the test suite
	$(BIN)/python -m pytest

check: .venv/.ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.ready ## every benchmark, and which goals are missed
	$(BIN)/python -m tests.bench

interop: .venv/.ready ## our hosts against go-libp2p and js-libp2p (fetches them once; needs npm)
	$(BIN)/python -m interop

lab: .venv/.ready ## our nodes behind every kind of NAT, on a simulated internet (needs root, nftables, iproute2)
	$(BIN)/python -m interop.lab

clean: ## remove what was installed
	rm -rf .venv interop/.cache
