# Two commands for a newcomer: `make run` and `make test`. Needs python3 (3.11 or newer) and make.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: run test coverage soak check bench docs format clean

run: .venv/.run
	$(BIN)/codomyrmex-streaming serve --port $(PORT)

# Two halves side by side, for two cores; with ARGS, only what it names: make test ARGS=tests/streams
HALF := tests/streams tests/conformance tests/hub tests/server
PYTEST := PYTHONASYNCIODEBUG=1 $(BIN)/python -m $(if $(COVERAGE),coverage run --parallel-mode -m) pytest -q

test: .venv/.test
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	$(PYTEST) $(HALF) & half=$$!; $(PYTEST) $(HALF:%=--ignore=%); rest=$$?; \
	  wait $$half && exit $$rest
endif
ifdef COVERAGE
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
endif

coverage:
	$(MAKE) test COVERAGE=1

# Kill a process that appends, 200 times, and count what was acknowledged and what is found.
soak: .venv/.test
	SOAK=200 $(BIN)/python -m pytest -q -s --timeout 1200 tests/log/test_sqlite.py -k killed

check: .venv/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

bench: .venv/.bench
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/.docs
	$(BIN)/mkdocs build --strict

format: .venv/.check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .coverage* site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "codomyrmex-streaming needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 run"; exit 1; }
	@# Without Debian's python3-venv it says so and leaves half of one, on which pip would be missed.
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# Each stamp is one set of extras, installed once and again when what is pinned changes.
.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[server,fast]'
	@touch $@

.venv/.test .venv/.check .venv/.bench .venv/.docs: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[$(patsubst .%,%,$(notdir $@))]'
	@touch $@
