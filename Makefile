# `make help` lists what there is. Everything happens in a virtual environment of its own, .venv.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: help install test mutants clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## create .venv and install what running and testing need

$(INSTALLED): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

test: $(INSTALLED)  ## the numerics suite, then the mutants: needs no GPU and no network
	$(VENV)/bin/python -m pytest --quiet tests
	$(VENV)/bin/python tests/mutants.py

mutants: $(INSTALLED)  ## only the mutants: break the core on purpose and see the suite notice
	$(VENV)/bin/python tests/mutants.py

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache __pycache__ tests/__pycache__
