# Every target sets up what it needs: a virtual environment in .venv, filled from pyproject.toml.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
WORKERS ?= auto
# A worker runs whole files, so that module fixtures and compiled functions are made once.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow parity figures lint types wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.demo ## sweep the embedded digits, draw the phase diagram, print the summary (minutes)
	$(BIN)/python -m sims demo --out $(OUT)
	$(BIN)/python -m paper_figs phase_diagram --run $(OUT) --out $(OUT)/figures
	$(BIN)/python -m sims show $(OUT)

test: $(VENV)/.test ## the test suite
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(VENV)/.test ## the tests marked slow
	FULL_OPTIMIZATION=1 $(BIN)/python $(PYTEST) -m slow

parity: $(VENV)-parity/.parity ## the tests that compare with PyTorch, in an environment of their own
	$(VENV)-parity/bin/python $(PYTEST) $(wildcard tests/test_*_parity.py)

figures: $(VENV)/.demo ## every figure, into runs/figures
	$(BIN)/python -m paper_figs all --out runs/figures

lint: $(VENV)/.dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## static types
	$(BIN)/pyright

wheel: $(VENV)/.dev ## build the wheel and import it in a fresh environment
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet dist/*.whl
	cd / && $(abspath $(VENV)-wheel)/bin/python -c "import dae_theory, sims, scaling, paper_figs; sims.sweep, scaling.zoo.load"
	cd / && ! $(abspath $(VENV)-wheel)/bin/python -c "import tests" 2>/dev/null
	rm -rf $(VENV)-wheel

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-parity .venv-wheel .cache .pytest_cache .ruff_cache dist build

$(VENV)/bin/python $(VENV)-parity/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[test,dev]"
	@touch $@

$(VENV)-parity/.parity: pyproject.toml | $(VENV)-parity/bin/python
	$(VENV)-parity/bin/python -m pip install --quiet --editable ".[test,parity]"
	@touch $@
