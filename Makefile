# Each target makes .venv itself when it is missing or its pins changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# pip would compile every file of every package, which takes longer than all else in `make study`'s installation.
COMPILED := PYTHONDONTWRITEBYTECODE= $(BIN)/python

.PHONY: study install test check test-all test-gpu bench tables docs docs-serve notebooks

study: .venv/runtime
	$(BIN)/normfree study quick workers=$$(nproc | awk '{ print ($$1 > 1) ? 2 : 1 }')

install: .venv/runtime

test: .venv/development
	$(BIN)/python -m pytest -n 2

test-all: .venv/development
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: .venv/development
	$(BIN)/python -m pytest -m gpu tests/gpu -n 4 --dist loadfile

check: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# The tables of README.md and docs/, from the records in results/.
tables: .venv/runtime
	$(BIN)/python -m docs.tables

# The pages of docs/ as a site in site/; every warning is an error.
docs: .venv/development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: .venv/development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# Execute the notebooks of docs/ and store their outputs.
notebooks: .venv/development
	$(BIN)/python docs/execute.py

bench: .venv/development
	$(BIN)/python benchmarks/data.py $(if $(FULL),,quick=true)
	$(BIN)/python benchmarks/entropy.py $(if $(FULL),,quick=true)
	$(BIN)/python benchmarks/training.py $(if $(FULL),full=true whole=true,turns=2)

.venv/runtime: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --no-compile -r requirements.lock
	$(PIP) --no-compile --no-deps --editable .
	$(COMPILED) -c "import normfree.training, normfree.report"
	touch $@

.venv/development: .venv/runtime requirements-dev.lock
	$(PIP) --no-compile -r requirements-dev.lock -c requirements.lock
	$(COMPILED) -m compileall -qq -j 0 .venv/lib || true
	touch $@
