# A fresh machine needs Python >= 3.11 and make, nothing else.  `make gpu-check PYTHON=python3` (any target) skips the
# set-up and uses that interpreter with the packages it has.
.DEFAULT_GOAL := help
.PHONY: help train plan test quick setup lint docs bench gpu-check clean constraints

# Many short processes: what they import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
STAMP := $(VENV)/.jepa-setup
TRAIN_STAMP := $(VENV)/.jepa-train
PYTHON := $(VENV)/bin/python
SETUP := $(if $(filter file,$(origin PYTHON)),$(STAMP))
TRAIN_SETUP := $(if $(SETUP),$(TRAIN_STAMP))
RUN := PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
ARGS ?=

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is handed on to train, plan, test, quick, bench and gpu-check'

train: $(TRAIN_SETUP) ## Install what a training needs, then train the quickstart: a few minutes, ends with a table and a report
	$(PYTHON) -m jepa.cli.train experiment=quickstart $(ARGS)

plan: $(SETUP) ## Set up, then train a small world model and plan with it: some ten minutes, ends with a table and a video
	$(PYTHON) -m jepa.cli.plan experiment=two_rooms name=two_rooms_plan $(ARGS)

test: $(SETUP) ## Set up, then run all tests
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

quick: $(SETUP) ## The tests that are not marked slow: under two minutes on two cores
	$(PYTHON) -m pytest -m 'not slow and not gpu' -n 2 --dist loadfile $(ARGS)

setup: $(SETUP) ## Make .venv and install everything; does nothing when it is current
	@echo "$(VENV) is current"

$(TRAIN_STAMP): pyproject.toml constraints.txt
	@sh scripts/setup.sh $(VENV)
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@sh scripts/setup.sh $(VENV) dev
	@touch $@ $(TRAIN_STAMP)

lint: $(SETUP) ## ruff (lint, format) and pyright
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PYTHON) -m pyright

docs: $(SETUP) ## The documentation as pages in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

bench: $(SETUP) ## Samples/s, milliseconds per part, peak memory of one experiment
	$(RUN) scripts/bench.py $(ARGS)

gpu-check: $(SETUP) ## The tests that need a GPU, then the benchmark on it; fails where there is none
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-check: torch sees no CUDA device here")'
	$(RUN) -m pytest -m gpu -p no:cacheprovider tests/test_gpu.py
	$(RUN) scripts/bench.py $(ARGS)

constraints: $(SETUP) ## Pin the newest versions that fit together
	$(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
		--no-annotate --no-header --quiet -o constraints.txt

clean: ## Remove caches and builds; keeps .venv and outputs
	rm -rf dist build .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +
