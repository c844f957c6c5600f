# Needs only a Python of at least 3.11 with venv; everything else goes into $(VENV).
#   make test PYTHON=python3.12        another interpreter
#   make retrain ARGS="--profile smoke"   arguments for the command behind a target

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Written when an installation is complete, so that the next target does not install again.
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup retrain test lint clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(READY) ## install Detent and its tools into .venv

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Detent needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo absent)." \
	       "Choose one with: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first: the release the figures were measured with; a Python without that build gets a near one.
	$(PIP) torch==2.13.0 || $(PIP) "torch>=2.9"
	$(PIP) --editable ".[test]"
	@touch $@

# 10 (gates kept the champion) and 11 (already done) are good ends; schedulers call `detent` and see the code itself.
retrain: $(READY) ## one nightly run in var/; ARGS are passed on
	$(BIN)/detent retrain --workdir var $(ARGS) || { code=$$?; [ $$code -eq 10 ] || [ $$code -eq 11 ] || exit $$code; }

test: $(READY) ## all tests, one file per core at a time; ARGS are passed to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## style, types, import layers, stripped notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@# Without a file nbstripout would wait for one on standard input.
	find notebooks -name '*.ipynb' -not -path '*/.*' -print0 | xargs -0 --no-run-if-empty $(BIN)/nbstripout --verify

clean: ## remove .venv, caches and builds; var/ with its runs stays
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
