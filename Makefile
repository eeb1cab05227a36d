# Every target sets up what it needs: a virtual environment in .venv, filled from pyproject.toml.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
WORKERS ?= auto

.PHONY: demo test test-slow lint types wheel figures clean

demo: $(VENV)/.demo
	$(BIN)/python -m sims demo --out $(OUT)
	$(BIN)/python -m paper_figs phase_diagram --run $(OUT) --out $(OUT)/figures
	$(BIN)/python -m sims show $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

figures: $(VENV)/.demo
	$(BIN)/python -m paper_figs all --out runs/figures

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

wheel: $(VENV)/.dev
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet dist/*.whl
	cd / && $(abspath $(VENV)-wheel)/bin/python -c "import dae_theory, sims, scaling, paper_figs"
	cd / && ! $(abspath $(VENV)-wheel)/bin/python -c "import tests" 2>/dev/null
	rm -rf $(VENV)-wheel

clean:
	rm -rf .venv .venv-wheel .cache .pytest_cache .ruff_cache dist build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[test,dev]"
	@touch $@
