# make run                         tokenizer -> pretraining -> charts on this CPU, offline (RUN=demo)
# make run RUN=mine TOKEN_BUDGET=1000000 RECIPE=stentor3-20m      any parameter of the notebooks
# make test                        what CI runs
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NOTEBOOKS ?= 01_tokenizer 02_pretrain_t4 06_charts

.PHONY: run test bench soak results lint clean
.DELETE_ON_ERROR:

# The environment is made once and again whenever the pinned requirements change.
$(VENV)/.installed: requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-cpu.txt
	touch $@

# Variables given on the command line are notebook parameters; a misspelt one is refused, not ignored.
GIVEN := $(filter-out PYTHON=% NOTEBOOKS=%,$(MAKEOVERRIDES))

run: $(VENV)/.installed
	$(PY) run_notebooks.py run $(NOTEBOOKS) -p PROFILE=cpu $(GIVEN)

test: $(VENV)/.installed lint
	$(PY) -m pytest tests --durations=10

bench: $(VENV)/.installed
	for file in tests/benchmarks/bench_*.py; do $(PY) $$file || exit 1; done
	STENTOR_SLOW=1 $(PY) -m pytest -s tests -k "2000_steps or compile"

soak: $(VENV)/.installed
	$(PY) tests/soak.py --runs 50 --kills 4 --report outputs

results: $(VENV)/.installed
	$(PY) run_notebooks.py results outputs/demo README.md

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m nbstripout --keep-id --verify notebooks/*.ipynb
	$(PY) tests/lint.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache __pycache__ tests/__pycache__
