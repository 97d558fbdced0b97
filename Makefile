# `make demo` and `make test` need nothing but Python 3.11+ and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a process: reproducible, and two processes share two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-all test-gpu bench-gpu lint format docs build clean

demo: $(VENV)/.installed ## fine-tune the embedded model with AdamW and with LoRA-RITE, and compare
	$(BIN)/lora-rite demo

test: $(VENV)/.installed ## the fast tests
	$(PYTEST)

test-all: $(VENV)/.installed ## all tests, the slow ones too
	$(PYTEST) -m "slow or not slow"

ON_GPU := CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} PYTHONPATH=src python
test-gpu: ## what wants a GPU, on a machine that has one, in whatever environment `python` is
	$(ON_GPU) -m pytest -rs -m "slow or not slow" --deselect tests/test_kernels.py::test_kernels_compile_for_gpus_that_are_not_there \
	  tests/test_cuda.py tests/test_kernels.py tests/test_bench.py

bench-gpu: ## those, and the figures of docs/benchmarks.md, under the name of the card; under 8 minutes
	bash benchmarks/bench_gpu.sh

lint: $(VENV)/.installed ## what pre-commit and CI check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.installed ## wheel and source distribution in dist/
	$(BIN)/python -m build --installer pip

# The environment: pinned by constraints.txt, except for a torch and a triton that are there already (in the environment,
# or in the Python that makes it): these are kept, as they belong together.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  $$($(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" * bool(u.find_spec("torch")))')
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q torch -c constraints.txt
	$(BIN)/python -c 'import triton' 2>/dev/null && there='torch\|triton' || there=torch; \
	  grep -v "^\($$there\)==" constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -e '.[dev]' -c $(VENV)/constraints.txt
	touch $@

clean:
	rm -rf $(VENV) dist demo runs site
