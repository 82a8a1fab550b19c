# make demo: the main experiment on this machine's CPU, with the shipped model.
# make test: lint, types and the test suite, in a fresh environment.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
  { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.long_context \
	  --config=configs/long_context/demo.py --workdir=out/demo

# Most tests are many programs that run for moments: their time goes into the
# compiler, into XLA's newer code generator above all and into cutting programs
# for threads, of which no core is free. Where it matters what the compiler makes
# of a program (`optimised`), all stays as users have it. JAX 0.12 has no other
# generator and ignores the first option: of two test files the CPU seconds went
# from 27 under 0.11.2 to 45-47. No gain there from XLA's preset FAST_COMPILE,
# loops hoisted at any size, or the new lowering of tiles switched off; without
# the passes that fuse, the attention patterns took 71 in place of 27.
QUICK := --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters \
  --xla_cpu_parallel_codegen_split_count=1
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.dev lint
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(PYTEST) -m "not gpu and not optimised"
	$(PYTEST) -m "not gpu and optimised"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.venv:
	@test -n "$(PYTHON)" || \
	  { echo "make needs Python 3.11 or newer; name one: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install -q -e ".[experiments]"
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
