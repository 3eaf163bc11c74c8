# Every target builds .venv first if it is missing or the lock file changed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types format docs bench bench-cluster flags lock clean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## Build .venv from requirements.lock (6.4 GB; a minute or two with uv)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^uv==' requirements.lock)" \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python --link-mode copy -r requirements.lock \
	  || $(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@$(BIN)/python -c 'import cv2' || { echo "OpenCV lacks a system library: install libgl1 and libglib2.0-0 (Debian, Ubuntu)"; exit 1; }
	@touch $@

demo: $(STAMP)  ## Make three small slides, extract, score and draw them, in ./demo
	$(BIN)/wsi-idc demo demo

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## Run the tests that take minutes too
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(STAMP)  ## Check style, the Dockerfile, and that imports go downwards only
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache && $(BIN)/hadolint Dockerfile

types: $(STAMP)  ## Check types
	$(BIN)/mypy

format: $(STAMP)  ## Put the code in style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(STAMP)  ## Build the documentation site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(STAMP)  ## Time wsi-idc against tiatoolbox's PatchPredictor on one slide
	$(BIN)/python tests/bench.py

bench-cluster: $(STAMP)  ## Time workers and scheduling on a Dask cluster on this machine
	$(BIN)/python tests/bench_cluster.py

flags: $(STAMP)  ## Measure on the IDC patches what flags hold slides and maps against, and write wsi_idc/flags.json
	$(BIN)/python tests/calibrate_flags.py $(or $(WSI_IDC_DATA),../shared/data)/idc

lock: $(STAMP)  ## Write requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --universal --no-header \
	  --no-emit-index-url --no-emit-find-links -o requirements.lock

clean:  ## Remove what was built, the environment too
	rm -rf .venv demo build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
