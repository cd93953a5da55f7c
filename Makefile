# make test | make finetune | make bench need nothing but python3, make, a C++ compiler and a network for packages.
# PY=python3 uses an environment of your own in place of .venv: on a GPU machine with its own torch, say.
PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
OUT ?= results
ARGS ?=
RESTARTS ?=
TORCH ?=

# Both ends of what is supported.
OLDEST_TORCH := 2.8.0
NEWEST_TORCH := 2.14.1

ENVIRONMENT := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
BUILT := build/.built-$(subst /,_,$(PY))
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

EXPERIMENTS := least-squares digits stability sweep time

# What is written once for all backends.
CORE := tests --ignore=tests/triton --ignore=tests/cuda

.PHONY: help test test-all test-core test-triton test-cuda test-zoo test-torch lint format dist docs finetune
.PHONY: experiments $(EXPERIMENTS:%=experiment-%) bench
.PHONY: bench-host bench-step bench-neighbours bench-distributed host-time picture codegen codegen-triton codegen-cuda gpu mutants
.PHONY: sanitize clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

# torch first and alone, in the pinned version: no other package may choose it.
$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) "$$(grep '^torch==' $<)"
	$(VENV)/bin/python $(PIP_INSTALL) -r $<
	touch $@

# Without build isolation: the extension must be compiled against the torch that will load it. Without kernels there is
# nothing to test or to measure, so a build that is impossible is an error here.
$(BUILT): $(ENVIRONMENT) $(SOURCES)
	PATH="$(abspath $(dir $(PY))):$$PATH" MIXOUT_KERNELS_CPU=1 \
		$(PY) $(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	mkdir -p $(dir $@) && touch $@

test: test-core test-triton test-cuda  ## the test suite, without a GPU

test-all:  ## the same, with every parametrisation of the core suite for the emulated GPU backends: hours
	$(MAKE) test ARGS="--exhaustive $(ARGS)"

test-core: $(BUILT)  ## the package on this machine: mathematics, modules, whole models, the benchmarks' own parts
	$(PY) -m pytest $(CORE) $(ARGS)

test-triton: $(BUILT)  ## the Triton kernels: executed by the interpreter, and compiled for GPUs that need not be there
	TRITON_INTERPRET=1 $(PY) -m pytest tests/triton $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest $(CORE) --backend triton $(ARGS)
	$(PY) -m pytest tests/triton $(ARGS)

test-cuda: $(BUILT)  ## the CUDA kernels: executed on the host, and compiled for GPUs that need not be there
	$(PY) -m pytest tests/cuda $(ARGS)
	MIXOUT_KERNELS_CUDA_EMULATION=1 $(PY) -m pytest $(CORE) --backend cuda $(ARGS)

test-zoo: $(BUILT)  ## apply_mixout on every model class of transformers that a small config can be made for
	MIXOUT_KERNELS_ZOO=1 $(PY) -m pytest tests/test_convert_zoo.py $(ARGS)

test-torch:  ## the test suite beside another torch, in an environment of its own: make test-torch TORCH=2.8.0
	@test -n "$(TORCH)" || { echo "make test-torch: which torch? TORCH=$(OLDEST_TORCH) or TORCH=$(NEWEST_TORCH), say"; exit 1; }
	PYTHON=$(PYTHON) sh tools/test_torch.sh $(TORCH)

lint: $(ENVIRONMENT)  ## ruff, and mypy on the package
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ENVIRONMENT)  ## apply ruff's fixes and its format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The wheel is built out of the source distribution, not out of this tree: what it needs and the sdist lacks is found.
dist: $(ENVIRONMENT)  ## the source distribution and the wheel, in dist/: built, checked, installed and run
	rm -rf dist
	$(PY) -m build --no-isolation --sdist --outdir dist .
	$(PY) tools/check_dist.py dist
	$(PY) -m twine check --strict dist/*

docs: $(BUILT)  ## the documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

finetune: $(BUILT)  ## the main job: MiniLM fine-tuned with dropout and with mixout; ARGS=--help lists its options
	$(PY) -m examples.finetune --output $(OUT)/finetune $(if $(RESTARTS),--restarts $(RESTARTS)) $(ARGS)

# One after the other: those on MiniLM share a file of finished runs.
experiments: $(BUILT)  ## all of the paper: hours; finished runs are kept. make experiment-stability, say: one of them
	for name in $(EXPERIMENTS); do $(MAKE) experiment-$$name || exit 1; done

$(EXPERIMENTS:%=experiment-%): experiment-%: $(BUILT)
	$(PY) -m examples.experiments $* --output $(OUT)/experiments $(ARGS)

bench: $(BUILT)  ## the layers: pytest-benchmark, a table and a plot
	$(PY) -m benchmarks.layers --output $(OUT)/bench $(ARGS)

bench-host: $(BUILT)  ## what a layer costs the host: forward and backward of 2 x 4 x 4, over nn.Linear's
	$(PY) -m tools.small_layer $(ARGS)

bench-step: $(BUILT)  ## whole training steps: a table and a plot
	$(PY) -m benchmarks.step --output $(OUT)/step $(ARGS)

bench-neighbours: $(BUILT)  ## GradDrop, Child-Tuning, R3F and the Fisher information beside their published forms
	$(PY) -m benchmarks.neighbours --output $(OUT)/neighbours $(ARGS)

host-time:  ## what a step costs the host beside a CUDA build of torch, in an environment of its own; no GPU needed
	PYTHON=$(PYTHON) sh tools/host_time.sh $(NEWEST_TORCH) --output $(abspath $(OUT))/host-time $(ARGS)

bench-distributed: $(BUILT)  ## steps of two ranks over slow networks: DDP and FSDP2; needs root, for network namespaces
	$(PY) -m benchmarks.distributed --output $(OUT)/distributed $(ARGS)

picture: $(ENVIRONMENT)  ## the picture of the README, out of the committed results of bench-step
	$(PY) tools/readme_picture.py benchmarks/results/step/minilm.csv docs/step.png

codegen: codegen-triton codegen-cuda  ## what ptxas makes of every GPU kernel; an error if one spills

codegen-triton: $(BUILT)  ## registers, shared memory and spills of the Triton kernels
	$(PY) -m tools.codegen_triton $(ARGS)

codegen-cuda: $(BUILT)  ## the same of the CUDA kernels; needs nvcc
	$(PY) -m tools.codegen_cuda --check $(ARGS)

mutants: $(ENVIRONMENT)  ## takes barriers, waits and fences out of the CUDA kernels one by one: the tests must notice each
	$(PY) -m tools.mutants $(ARGS)

gpu: $(BUILT)  ## the whole test suite on the GPU of this machine
	$(PY) -c "import torch; torch.cuda.is_available() or exit('make gpu: torch finds no GPU here')"
	$(PY) -m pytest tests $(ARGS)

# What is tested on a GPU must have been built: without nvcc these two are an error.
gpu sanitize: export MIXOUT_KERNELS_CUDA = 1

sanitize: $(BUILT)  ## the CUDA tests under compute-sanitizer, on a GPU
	sh tests/cuda/sanitize.sh $(PY)

clean:  ## remove what was built; the environment and the cache of downloads stay
	rm -rf build dist results site *.egg-info mixout_kernels/*.so
