# make demo | test | lint | types | format | clean; each makes .venv first where it is missing or older than pyproject.toml.

PYTHON ?= python3
# Where torch alone comes from, such as https://download.pytorch.org/whl/cpu; empty: pip's own index.
TORCH_INDEX ?=
# At most so many test processes, each with torch on one thread.
WORKERS ?= 4
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
TORCH = $(BIN)/python -c 'import tomllib; print(*(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")))'

.PHONY: demo test lint types format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/spir demo

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses $(WORKERS) --dist loadgroup -m 'not slow' $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis htmlcov .coverage
	find spir passes backends frontends tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "error: $(PYTHON) is not found; name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: SPIR needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install --index-url "$(TORCH_INDEX)" "$$($(TORCH))")
	$(BIN)/pip install -e '.[dev]'
	touch $@
