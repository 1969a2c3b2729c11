# Two commands on a fresh machine with git, make and python3 (venv):
#   make demo    sets up a virtual environment and runs the demo; no root, no system package
#   make test    sets up what the tests need and runs them
# And one that takes as long as you like:
#   make fuzz SECONDS=600   so many seconds for each parser; findings go to build/fuzz
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?=
SECONDS ?= 60
TARGET ?= all

.PHONY: demo test fuzz lint check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/vmgraft demo

test: $(VENV)/.dev
	requirements/install-debian
	$(BIN)/python -m pytest $(PYTEST_ARGS)

fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz/fuzz.py $(TARGET) --seconds $(SECONDS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

clean:
	rm -rf $(VENV) build dist

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/.installed requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	touch $@
