# Everything happens in .venv; a stamp in it says what is installed, so a second call costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/sample
MINUTES ?= 30
SEED ?= 7
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install dev run test test-quick test-browser test-cluster test-gpu test-stores soak lint typecheck docs bench bench-gpu gpu-prepare gpu-day train \
  evaluate

help: ## this list
	@echo "latentmill: prompts in, a verified image dataset out"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## set up .venv with everything that a job needs

dev: $(VENV)/.dev ## the same .venv, with the tests' and checkers' packages

run: install ## make a small dataset with the model that ships, and a gallery of it
	$(BIN)/latentmill run configs/prompts/sample.txt --out $(OUT) --chunk-size 4 --batch-size 4
	$(BIN)/latentmill report $(OUT)
	@echo "open $(OUT)/report/index.html in a browser; the pictures are in $(OUT)/images, their rows in $(OUT)/dataset"

# Test processes side by side; a file's tests stay in one, for they share what they set up.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: dev ## run all tests that need no cluster, WORKERS=2 processes side by side
	$(PYTEST) -m 'not cluster and not long and not gpu and not stores and not browser'

test-quick: dev ## of these, what takes a minute: no S3 server, no model run over more than a few steps
	$(PYTEST) -m 'not cluster and not long and not s3 and not slow and not gpu and not stores and not browser'

test-browser: dev ## look at the gallery in a real Chromium, headless: apt-get install chromium
	@$(BIN)/python -m tests.harness.browser
	$(BIN)/python -m pytest -m browser tests/browser

# One after the other: each of them keeps both cores busy, and some look at the clock.
test-cluster: dev ## run the tests that start Ray clusters, storms and crash points, and all others that take long
	$(BIN)/python -m pytest -m 'cluster or long'

test-gpu: $(VENV)/source/latentmill $(if $(GPU_PYTHON),,dev) ## run the tests that need a CUDA device; GPU_PYTHON=python3 uses another torch
	$(GPU) -m pytest -m gpu tests/gpu

test-stores: $(VENV)/.stores $(VENV)/azurite/.installed ## run the job on emulators of Google's and Azure's stores; needs npm
	AZURITE=$(VENV)/azurite/node_modules/.bin/azurite-blob $(BIN)/python -m pytest -m stores tests/stores

soak: dev ## the commit protocol simulated, then real faults on a real cluster: MINUTES=30 SEED=7
	$(BIN)/python -m tests.simulator --schedules 10000 --seed $(SEED)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED) --report out/soak.txt

lint: dev ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: dev ## check types
	$(BIN)/mypy

docs: dev ## write the generated parts of README and docs/ again, after any change of modules, settings or columns
	$(BIN)/python docs/generate.py

# ONLY=name,name of the table in bench/table.py, ROUNDS=n, TINY=1 to see whether it works, AGAIN=1.
BENCH = -m bench $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(TINY),--tiny) $(if $(AGAIN),--again)

bench: dev ## measure against the peers, about 15 minutes; writes bench/RESULTS.md; ONLY=scale measures how far it scales
	$(BIN)/python $(BENCH)

# A machine with a GPU may have another torch, and nothing may be installed there: the package is found by a link.
GPU = PYTHONPATH=$(VENV)/source:.$(if $(PYTHONPATH),:$(PYTHONPATH)) $(or $(GPU_PYTHON),$(BIN)/python)

bench-gpu: $(VENV)/source/latentmill $(if $(GPU_PYTHON),,dev) ## the same on a CUDA device, in parts; GPU_PYTHON=python3 uses another torch
	$(GPU) $(BENCH) --target bench-gpu

gpu-prepare: $(VENV)/.train ## fetch and render the training's icons, for a GPU's machine without a network
	$(BIN)/python -m training --stage data

gpu-day: $(VENV)/source/latentmill $(if $(GPU_PYTHON),,dev) ## on a GPU, in pieces under 9 minutes: its tests, bench-gpu, training; SECONDS_LEFT=n
	$(GPU) -m bench.gpu_day $(if $(ONLY),--only $(ONLY)) $(if $(SECONDS_LEFT),--seconds $(SECONDS_LEFT)) $(if $(TINY),--tiny)

# Every stage goes on where a kill left it; with FROM_SCRATCH=1 in a folder of its own, from nothing to the written card.
train: $(VENV)/.train ## train the model that ships, from where the last run stopped; FROM_SCRATCH=1 begins with nothing; WORK=folder
	nice -n 19 $(BIN)/python -m training $(if $(FROM_SCRATCH),--from-scratch) \
	  --work $(or $(WORK),training/.cache$(if $(FROM_SCRATCH),/scratch))

evaluate: $(VENV)/.train ## measure what the model that ships can draw
	$(BIN)/python -m training.evaluate

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "latentmill needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make install PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

PIP_OPTIONS := --quiet --disable-pip-version-check

# OpenCV's usual build, which invisible-watermark asks for, needs the system's libGL; where that is missing, as in
# small containers, the headless build of the same version takes its place.
define install_packages
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -e '$(1)' -c constraints.txt
	@$(BIN)/python -c 'import cv2' 2>/dev/null || $(BIN)/python -m pip install $(PIP_OPTIONS) \
	  --force-reinstall --no-deps opencv-python-headless==$$($(BIN)/python -c \
	  'from importlib.metadata import version; print(version("opencv-python"))')
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV); the first time takes a few minutes"
	$(call install_packages,.)

# mypy follows paths, not the finder of an editable install: .venv/source holds the package under its name.
$(VENV)/source/latentmill:
	@mkdir -p $(VENV)/source && ln -sfn ../.. $@

$(VENV)/.dev: $(VENV)/.installed | $(VENV)/source/latentmill
	$(call install_packages,.[test])

$(VENV)/.train: $(VENV)/.installed
	$(call install_packages,.[train])

$(VENV)/.stores: $(VENV)/.dev
	$(call install_packages,.[stores])

$(VENV)/azurite/.installed:
	@npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3.35.0
	@touch $@
