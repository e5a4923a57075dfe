# Everything runs from .venv, which each target makes when it is missing; only gpu-check runs with
# $(PYTHON), in whose torch the GPU's driver is known.
PYTHON ?= python3
BIN := .venv/bin
DATA := data/synthetic
WORKERS := -n auto --maxprocesses 4

.PHONY: help setup train learning-table test coverage test-slow lint bench gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup:  ## make .venv and install the package with all extras and the developers' tools
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e '.[all,dev]' -c constraints.txt
	@touch .venv/ready

.venv/ready: setup.py constraints.txt
	@$(MAKE) --no-print-directory setup

train: .venv/ready  ## learn on synthetic videos and show the result (a few minutes on two CPU cores)
	$(BIN)/smtc data synthesize $(DATA)/train
	$(BIN)/smtc data synthesize $(DATA)/val --videos 30 --seed 2000
	$(BIN)/smtc train --preset tiny_encoder --output runs/tiny_encoder
	$(BIN)/smtc train --preset tiny --init runs/tiny_encoder --output runs/tiny
	$(BIN)/python -m smtc.benchmarks.learning report runs/tiny --held-out $(DATA)/val

learning-table: .venv/ready  ## the same over three seeds: the README's table
	$(BIN)/python -m smtc.benchmarks.learning table --seeds 0 1 2 --output runs/learning

test: lint  ## lint, types and the whole test suite but for what takes minutes
	$(BIN)/python -m pytest $(WORKERS) --dist loadfile

coverage: .venv/ready  ## the test suite again, and which lines it reaches (half as long again)
	$(BIN)/python -m pytest $(WORKERS) --dist loadfile --cov --cov-report=term --cov-fail-under=90

test-slow: .venv/ready  ## the tests that take minutes: deliberate faults in kernels, killed runs, memory
	$(BIN)/python -m pytest $(WORKERS) -m slow

lint: .venv/ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/check_types.py

bench: .venv/ready  ## errors and times of operations and whole steps on this machine, as one page
	$(BIN)/smtc bench parity --output build/bench
	$(BIN)/smtc bench kernels --output build/bench
	$(BIN)/smtc bench step --output build/bench
	$(BIN)/smtc bench report build/bench

gpu-check:  ## PART=tests|kernels|step|data on a machine with a GPU, at most 8 minutes; results in $$OUT or build/gpu-check
	@$(PYTHON) benchmarks/gpu_check.py $(PART)

clean:  ## remove what the targets made, except data/ and runs/
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
