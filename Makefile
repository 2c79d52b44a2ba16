# Every target sets itself up: a fresh clone and Python 3.11+ are enough for `make demo`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup dev tools demo check test coverage bench fuzz crash reliability docs clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; \
		do printf '  make %-11s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.installed ## create .venv and install qcow2bm as .venv/bin/qcow2bm

demo: setup ## merge five daily bitmaps of a sample image (needs no QEMU)
	@sh demo/demo.sh

check: dev ## lint, format and types: ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: tools dev ## the whole test suite, against the real QEMU
	$(BIN)/python -m pytest -n auto

coverage: tools dev ## the same with branch coverage, which takes half as long again
	$(BIN)/python -m pytest -n auto --cov --cov-report=term

bench: dev ## measure against qemu-img and rewrite docs/performance.md
	$(BIN)/python -m benchmarks

fuzz: tools dev $(VENV)/.fuzzer ## 100,000 hostile images, guided fuzzing, and every test with many more examples
	$(BIN)/python -m tests.fuzz --images 100000
	$(BIN)/python -m tests.fuzz.verdict --images 10000
	$(BIN)/python -m tests.fuzz.guided --seconds 600
	MONSTERS=all $(BIN)/python -m pytest -n auto tests/interop/test_hostile_images.py
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n auto tests/property
	MATRIX=all DAMAGE_ROUNDS=20 REPAIR_ROUNDS=20 QCOW2BM_ROUNDS=20 $(BIN)/python -m pytest -n auto tests/interop

crash: tools dev ## every command cut short, met by failing calls and killed; rewrites the figures in docs/reliability.md
	$(BIN)/python -m tests.crash

reliability: tools dev ## repair 600 damaged images beside qemu-img and rewrite docs/reliability.md
	$(BIN)/python -m tests.reliability

docs: dev ## regenerate the generated pages of docs/
	$(BIN)/python docs/generate.py

clean: ## remove everything that make made
	rm -rf $(VENV) .demo .bench build dist .coverage .coverage.* htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: one editable install, made again when pyproject.toml changes ----

dev: $(VENV)/.developer

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing qcow2bm into $(VENV)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.developer: $(VENV)/.installed
	@echo "Installing the developer tools into $(VENV)"
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.fuzzer: $(VENV)/.developer
	@echo "Installing the fuzzer into $(VENV)"
	@$(PIP) install --editable '.[dev,fuzz]'
	@touch $@

# Debian packs the module that makes environments apart from Python itself; a half-made .venv must not stay behind.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "qcow2bm needs Python 3.11 or newer as $(PYTHON) (or: make PYTHON=/path/to/python3.11)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "This Python cannot make virtual environments. On Debian and Ubuntu, install the missing part:" >&2; \
		echo "    sudo apt-get install -y python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

tools:
	@sh tests/install-tools.sh
