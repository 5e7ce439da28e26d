# `make pretrain` and `make test` are all a newcomer needs; both are safe to repeat and skip what is done.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
CONFIG ?= configs/demo.yaml

.PHONY: setup test lint pretrain bench inspect gpu-check clean
SOURCES = setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.hpp csrc/CMakeLists.txt)

setup: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: setup
	$(BIN)/python -m pytest

lint: setup
	@mkdir -p build/typing && ln -sfn ../../kernels build/typing/vito_kernels && ln -sfn ../../vito_fast build/typing/vito_fast
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info
