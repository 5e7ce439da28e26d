# `make pretrain` and `make test` are all a newcomer needs; both are safe to repeat and skip what is done.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
CONFIG ?= configs/demo.yaml
VIDEOS ?=

.PHONY: setup test test-timed lint pretrain curate-demo evaluate-demo bench bench-gate bench-counted readme-tables inspect rehearse study gpu-check gpu-report dist docs docs-reference clean
SOURCES = setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.hpp csrc/CMakeLists.txt)

setup: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

JOBS = 2
test: setup
	$(BIN)/python -m pytest -n $(JOBS)

# The tests that compare times: for a machine that does nothing else.
test-timed: setup
	$(BIN)/python -m pytest -m timed -s

# The demo's videos are made here; with VIDEOS=dir, and CONFIG=file, the same on your own. Store and run are named after the
# folder: NAME=other keeps apart those of two folders of one name.
ifeq ($(strip $(VIDEOS)),)
NAME   = demo
RUN    = $(notdir $(basename $(CONFIG)))
SOURCE = data/demo/videos
PACK   = --shot-cuts False --short-side 96
SHOWN  = data/demo/heldout-store
HOLDOUT = --data.holdout $(SHOWN)
else
NAME  := $(shell basename "$$(realpath -m "$(VIDEOS)")" | tr ' ' _)
RUN    = $(notdir $(basename $(CONFIG)))_$(NAME)
SOURCE = $(VIDEOS)
SHOWN  = $(STORE)
endif
STORE  = data/$(NAME)/store
SCORES = runs/$(RUN)/evaluation
OBJECTS = data/demo/evaluation/objects
BASELINES = random,pixels,imagenet

pretrain: setup
	$(if $(strip $(VIDEOS)),,$(BIN)/python -m vito_fast.data.demo data/demo)
	$(BIN)/vito-fast init "$(SOURCE)" --check "$(CONFIG)"
	$(BIN)/vito-fast pack "$(SOURCE)" "$(STORE)" $(PACK)
	$(if $(strip $(VIDEOS)),,$(BIN)/vito-fast pack data/demo/heldout $(SHOWN) $(PACK))
	$(BIN)/vito-fast train "$(CONFIG)" --name "$(RUN)" --data.store "$(STORE)" --resume $(HOLDOUT)
	$(BIN)/vito-fast attention "runs/$(RUN)" "$(SHOWN)" "runs/$(RUN)/attention.png"
	$(BIN)/vito-fast export "runs/$(RUN)" "runs/$(RUN)/encoder.safetensors"
ifeq ($(strip $(VIDEOS)),)
	@test ! -d data/demo/heldout || $(BIN)/python -m vito_fast.evaluate.demo data/demo data/demo/evaluation
	@test ! -d data/demo/heldout || $(BIN)/vito-fast evaluate "runs/$(RUN)" --tasks knn --preset demo \
	  --data.knn $(OBJECTS) --out "$(SCORES)" --baselines random,pixels
endif

# Scores the run of `make pretrain` on held-out clips beside random, pixels and an ImageNet encoder; three minutes on two cores.
evaluate-demo: setup
	$(BIN)/python -m vito_fast.evaluate.demo data/demo data/demo/evaluation
	$(BIN)/vito-fast evaluate "runs/$(RUN)" --out "$(SCORES)" --baselines $(BASELINES) \
	  --tasks davis,knn,pmk,corruptions,correspondence,attention --preset knn=demo,pmk=demo,corruptions=demo \
	  --data.knn $(OBJECTS) --data.pmk $(OBJECTS) --data.corruptions $(OBJECTS) \
	  --data.davis data/demo/evaluation/scenes --davis.subset true --davis.resize none \
	  --data.attention data/demo/evaluation/masks --attention.subset true --attention.size 96 \
	  --data.correspondence data/demo/evaluation/stereo

# A small heap of rendered photographs and real clips, curated: data/curate-demo/out/report.html.
curate-demo: setup
	$(BIN)/python -m vito_fast.curate.demo data/curate-demo
	$(BIN)/vito-fast curate data/curate-demo/heap.csv data/curate-demo/out --preset strict --total 6

lint: setup
	@mkdir -p build/typing && ln -sfn ../../kernels build/typing/vito_kernels && ln -sfn ../../vito_fast build/typing/vito_fast
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

# Races against the peers: bench/results/<machine>.json and bench/report.html. QUICK=1: under three minutes. See docs/benchmarks.md.
bench: $(VENV)/.bench
	$(BIN)/python -m bench $(if $(QUICK),--quick) $(BENCH)

# Has anything become slower than the committed results of this kind of machine? Non-zero exit, naming the case.
bench-gate: $(VENV)/.bench
	$(BIN)/python -m bench --quick --results build/bench/gate.json --report build/bench/gate.html
	$(BIN)/python -m bench.compare $(or $(BASELINE),"$$($(BIN)/python -m bench.machine)") build/bench/gate.json --confirm 2

# The same without a clock, for CI: flops, peak memory, instructions, packets a frame, kernels as compiled. Needs no peers.
COUNTED ?= bench/results/counted.json
bench-counted: setup
	$(BIN)/python -m bench --quick --counted --results build/bench/counted.json
	$(BIN)/python -m bench.compare $(COUNTED) build/bench/counted.json --all

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

# The tables and the chart of README.md and docs/ from the committed results; a test fails when they differ.
readme-tables: setup
	$(BIN)/python -m bench.tables

# Which of the paper's choices help on the demo: bench/results/<machine>-study.json and docs/study.md. STUDY='--seeds 5'
study: setup
	$(BIN)/python -m bench.study $(STUDY)
	$(BIN)/python -m bench.tables

# The site, in build/site; warnings are errors.
docs: docs-reference
	@mkdir -p build/typing && ln -sfn ../../kernels build/typing/vito_kernels && ln -sfn ../../vito_fast build/typing/vito_fast
	$(BIN)/mkdocs build --strict

# docs/config.md and docs/cli.md from the code; a test fails when they differ.
docs-reference: setup
	$(BIN)/python docs/generate.py

# sdist and wheel in an isolated environment, as for a release.
dist: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf build dist *.egg-info

# What every shipped kernel compiles to on sm_80, sm_89, sm_90 and sm_100; needs no GPU. INSPECT='--only attention --arch 120'
inspect: setup
	@mkdir -p build
	$(BIN)/python -m vito_kernels.inspect --json build/inspect.json $(INSPECT)

# What the kernel tests launch, compiled for a GPU that is not there (80, 89, 90, 100 or 120): some seven minutes.
ARCH = 90
rehearse: setup
	ARCH=$(ARCH) PYTHONPATH=tests/kernels PYTHONOPTIMIZE=1 $(BIN)/python -W ignore -m pytest --assert=plain -p rehearsal -n 2 $(wildcard tests/kernels/test_*_kernel.py) \
	  --deselect tests/kernels/test_contrastive_kernel.py::test_columns_that_no_launch_would_bring_are_an_error

# Tests and times the kernels on this machine's GPU. Needs PYTHON with torch, triton, numpy and pytest, and nothing installed.
ifneq ($(wildcard $(BIN)/python),)
GPU_PYTHON = $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),$(BIN)/python)
else
GPU_PYTHON = $(PYTHON)
endif
gpu-check:
	@mkdir -p build/typing && ln -sfn ../../kernels build/typing/vito_kernels
	PYTHONPATH=build/typing$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m bench.gpu_check

# Ten minutes on a borrowed GPU, the most valuable first: tests, races eager and graphed, step, loader, training. REPORT='--dry-run'
gpu-report:
	@mkdir -p build/typing && ln -sfn ../../kernels build/typing/vito_kernels && ln -sfn ../../vito_fast build/typing/vito_fast
	PYTHONPATH=build/typing$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m bench.gpu_report $(REPORT)
