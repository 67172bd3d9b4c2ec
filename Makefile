# `make help` lists what there is. Everything happens in a virtual environment of its own, .venv.
PYTHON ?= python3
VENV := .venv
RUNTIME := $(VENV)/.runtime
INSTALLED := $(VENV)/.installed

.PHONY: help demo install test mutants train-demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(RUNTIME)  ## install, then talk to the small model in demo/
	$(VENV)/bin/python generate.py --interactive

install: $(INSTALLED)  ## create .venv and install what running and testing need

$(RUNTIME): requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

$(INSTALLED): $(RUNTIME) requirements-dev.txt
	$(VENV)/bin/pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

test: $(INSTALLED)  ## the numerics suite, then the mutants: needs no GPU, and no network but to install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --quiet --numprocesses 2 --dist worksteal tests
	$(VENV)/bin/python tests/mutants.py

mutants: $(INSTALLED)  ## only the mutants: break the core on purpose and see the suite notice
	$(VENV)/bin/python tests/mutants.py

train-demo: $(INSTALLED)  ## make demo/ from nothing, about an hour on 2 cores; goes on where it stopped
	$(VENV)/bin/torchrun --nproc-per-node 2 tools/train_demo.py

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache __pycache__ */__pycache__
