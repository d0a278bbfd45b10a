# Everything from a fresh clone: `make demo`, `make test`. Needs make, Python 3.11 or newer, and a package index.

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PROTOS = $(shell find proto -name '*.proto')
SERVICES = $(shell grep -rl '^service ' proto)

# The first of these that runs and is new enough; `make PYTHON=...` overrides it.
NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: help demo test lint format proto install clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 10

demo: $(VENV)/.demo ## Serve, explain two photos over gRPC, write pictures to demo-output/, stop
	$(BIN)/camserve demo

test: $(VENV)/.dev ## Run all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Format the code, mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev ## Generate the protobuf code in src/ again
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=src --pyi_out=src $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -Iproto --grpc_python_out=src $(SERVICES)

install: $(VENV)/.dev ## Set up .venv with all that development needs

clean: ## Remove what was built; .venv stays
	rm -rf build dist demo-output .pytest_cache .hypothesis .mypy_cache .ruff_cache model_store/*.mar
	find src tests handlers benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: what is installed, renewed when the requirements change.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "camserve needs Python 3.11 or newer with its venv module; none found on PATH." \
		"Install one, or give it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.demo $@
