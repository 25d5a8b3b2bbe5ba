# Every target sets up what it needs; a second run starts at once.
VENV ?= .venv
EXTRAS ?= torch,flax,train,dev
WORKERS ?= 2
ARGS ?=
# The oldest releases of transformers 4 and 5 that work, beside the newest, which $(VENV) has.
VERSIONS ?= 4.57 5.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRAS)
OTHERS = $(VERSIONS:%=.venv-versions/%/.installed)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# A new environment holds no bytecode; were it never written, each process would spend more than
# twice as long on importing PyTorch and transformers.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-versions lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Settings: VENV=$(VENV)  EXTRAS=$(EXTRAS)  WORKERS=$(WORKERS)  ARGS="..."  PYTHON=python3.x'

setup: $(INSTALLED) ## create the virtual environment and install

$(INSTALLED): pyproject.toml constraints/cpu.txt constraints/install.sh
	sh constraints/install.sh $(VENV) $(EXTRAS)
	@touch $@

quickstart: $(INSTALLED) ## pre-train, fine-tune and evaluate a small model (ARGS="--help")
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(INSTALLED) .venv-versions/4.57/.installed .venv-flax/.installed ## the default tests (ARGS="-k NAME" for some)
	$(PYTEST) $(ARGS)

test-all: $(INSTALLED) $(OTHERS) .venv-flax/.installed ## all tests, the slow ones included
	$(PYTEST) -m "" $(ARGS)

test-versions: $(INSTALLED) $(OTHERS) ## the same files on older transformers (VERSIONS="...")
	$(PYTEST) tests/test_versions.py $(ARGS)

.venv-versions/%/.installed: pyproject.toml constraints/cpu.txt constraints/install.sh
	sh constraints/install.sh .venv-versions/$* torch "transformers==$*.*"
	@touch $@

.venv-flax/.installed: pyproject.toml constraints/cpu.txt constraints/install.sh
	sh constraints/install.sh .venv-flax flax
	@touch $@

# One thread a worker: more would only compete for the same cores.
test test-all test-versions: export OMP_NUM_THREADS ?= 1

lint: $(INSTALLED) ## what the pre-commit hook checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment, caches and build products
	@if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf .venv-versions .venv-flax build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
