# make test | make bench | make finetune need nothing but python3, make, a C++ compiler and a network for packages.
# PY=python3 uses an environment of your own instead of .venv (on a GPU machine with its own torch, say).
PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
OUT ?= results
ARGS ?=
RESTARTS ?=

ENVIRONMENT := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
BUILT := build/.built-$(subst /,_,$(PY))

.PHONY: help test test-core test-triton test-cuda lint format bench finetune codegen gpu sanitize clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' $(MAKEFILE_LIST) | expand -t 14

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $<)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Without build isolation: the extension must be compiled against the torch that will load it.
$(BUILT): $(ENVIRONMENT) $(SOURCES)
	PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	mkdir -p $(dir $@) && touch $@

test: test-core test-triton test-cuda  ## the whole test suite, without a GPU

test-core: $(BUILT)
	$(PY) -m pytest tests --ignore=tests/triton --ignore=tests/cuda $(ARGS)

test-triton: $(BUILT)
	TRITON_INTERPRET=1 $(PY) -m pytest tests/triton $(ARGS)

test-cuda: $(BUILT)
	$(PY) -m pytest tests/cuda $(ARGS)

lint: $(ENVIRONMENT)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ENVIRONMENT)  ## apply ruff's fixes and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove what was built (not the environment, not the cache)
	rm -rf build results *.egg-info mixout_kernels/*.so
