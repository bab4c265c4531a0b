# make run                         tokenizer -> pretraining -> instruct tuning -> benchmark -> charts on this CPU, offline
# make run RUN=mine TOKEN_BUDGET=1000000 RECIPE=stentor3-20m      any parameter of the notebooks
# make run-seeds SEEDS="42 43 44"  the same recipe with other seeds; make results then prints mean and range
# make test                        what CI runs
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NOTEBOOKS ?= 01_tokenizer 02_pretrain_t4 04_instruct_sft 05_benchmark 06_charts

.PHONY: run run-seeds demo test kaggle test-kaggle tpu-test tpu-aot litert bench speedrun soak gallery results lint clean
.DELETE_ON_ERROR:

# The environment is made once and again whenever the pinned requirements change.
$(VENV)/.installed: requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-cpu.txt
	touch $@

# Variables given on the command line are notebook parameters; a misspelt one is refused, not ignored. They go on as they were
# typed: $(value) leaves a $ alone, and a quote or a line break is quoted for the shell. Nor are they exported, which would
# expand them.
define NEWLINE


endef
TYPED := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
unexport $(TYPED)
MAKEOVERRIDES =
quoted = '$(subst $(NEWLINE),'$$'\n'',$(subst ','\'',$(1)))'
given = $(foreach name,$(filter-out PYTHON NOTEBOOKS $(1),$(TYPED)),$(call quoted,$(name)=$(value $(name))))

run: $(VENV)/.installed
	$(PY) -m stentor_utils run $(NOTEBOOKS) -p PROFILE=cpu $(call given)

# More draws of the recipe of RUN, by 02 alone with its tokenizer and its token store: mean, range, and each of them.
SEEDS ?= 42 43 44
run-seeds: $(VENV)/.installed
	$(PY) -m stentor_utils seeds $(call quoted,$(value SEEDS)) -p $(call given,SEEDS)

# The models of outputs/ in a browser, those of RUN first (by default the newest run): RUN=, PORT=, BASELINES=folder,folder,
# HUB=True for the published models, SHARE=True for a public address, MEMORY_GB=. Ctrl-C ends it.
demo: $(VENV)/.installed
	$(PY) -m stentor_utils demo -p $(call given)

test: $(VENV)/.installed lint
	$(PY) -m pytest tests --durations=10

# The XLA engine and 03 on eight virtual devices. An environment of its own: torch_xla 2.9 wants its own torch; about 7 GB.
.venv-tpu/.installed: tests/requirements/tpu.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements/tpu.txt
	touch $@

tpu-test: .venv-tpu/.installed
	.venv-tpu/bin/python -m pytest tests/tpu --durations=10

# dist/kaggle/NN_name.ipynb: each notebook with the helper inside. USER=name stages a dataset and kernels too.
kaggle:
	$(PYTHON) -m stentor.bundle dist/kaggle $(if $(filter USER,$(TYPED)),--user $(call quoted,$(value USER)))

# The suite with the versions of Kaggle's images (no GPU or TPU is needed): IMAGE=gpu or tpu, PYTHON=python3.12; about 7 GB.
# What the notebooks add comes after the image's own, and must change none of it.
IMAGE ?= gpu
KAGGLE := .venv-kaggle-$(IMAGE)
$(KAGGLE)/.installed: tests/requirements/kaggle-$(IMAGE).txt tests/requirements/on-kaggle.txt requirements-t4.txt requirements-tpu.txt
	$(PYTHON) -m venv --clear $(KAGGLE)
	$(KAGGLE)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements/kaggle-$(IMAGE).txt
	$(KAGGLE)/bin/python -m pip freeze | sort > $(KAGGLE)/image.txt
	$(KAGGLE)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-$(if $(filter tpu,$(IMAGE)),tpu,t4).txt
	$(KAGGLE)/bin/python -m pip freeze | sort > $(KAGGLE)/with-delta.txt
	@changed="$$(comm -23 $(KAGGLE)/image.txt $(KAGGLE)/with-delta.txt)"; if [ -n "$$changed" ]; then \
	  echo "the delta changed what the image has:"; echo "$$changed"; exit 1; fi
	@echo "added to the image, nothing of it changed:"; comm -13 $(KAGGLE)/image.txt $(KAGGLE)/with-delta.txt
	$(KAGGLE)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements/on-kaggle.txt
	touch $@

test-kaggle: $(KAGGLE)/.installed
	$(KAGGLE)/bin/python -m pytest $(if $(filter tpu,$(IMAGE)),tests/tpu,tests) --durations=10

# Optional: compiles the TPU training step for a real v5e 2x4 ahead of time, with no TPU.
.venv-aot/.installed: tests/requirements/aot.txt
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements/aot.txt
	touch $@

tpu-aot: .venv-tpu/.installed .venv-aot/.installed
	.venv-tpu/bin/python tests/benchmarks/aot_tpu.py export
	.venv-aot/bin/python tests/benchmarks/aot_tpu.py compile

# A phone's file of a run's final/, checked token for token before it is kept. An environment of its own: about 6.6 GB.
.venv-litert/.installed: tests/requirements/litert.txt
	$(PYTHON) -m venv .venv-litert
	.venv-litert/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements/litert.txt
	touch $@

LITERT_RUN ?= outputs/demo
litert: .venv-litert/.installed
	.venv-litert/bin/python -m stentor.export.litert $(call quoted,$(value LITERT_RUN))/final $(call quoted,$(value LITERT_RUN))/export/model.tflite

bench: $(VENV)/.installed
	for file in tests/benchmarks/bench_*.py; do $(PY) $$file || exit 1; done
	STENTOR_SLOW=1 $(PY) -m pytest -s tests -k "2000_steps or compile"

# Tokens and time to the card recipe's final loss, and what each ingredient of ours is worth: hours; a call goes on where the
# last one stopped. SPEEDRUN="--parts target --seeds 42 43" for a part of it; NANOCHAT=checkout runs that beside.
speedrun: $(VENV)/.installed
	$(PY) tests/benchmarks/speedrun.py $(SPEEDRUN) $(if $(NANOCHAT),--nanochat $(call quoted,$(value NANOCHAT)))

soak: $(VENV)/.installed
	$(PY) tests/soak.py --runs 50 --kills 4 --report outputs

# docs/gallery (charts of RUN, a sentence in tokens, the demo's screenshots) and outputs/html (its executed notebooks).
RUN ?= demo
gallery: $(VENV)/.installed
	$(PY) -m stentor_utils gallery $(call quoted,outputs/$(value RUN)) docs/gallery outputs/html

results: $(VENV)/.installed
	$(PY) -m stentor_utils results outputs/demo README.md docs/results.md

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m nbstripout --keep-id --verify notebooks/*.ipynb
	$(PY) tests/lint.py

clean:
	rm -rf $(VENV) .venv-kaggle* dist .venv-tpu .venv-aot .venv-litert .pytest_cache .ruff_cache __pycache__ tests/__pycache__
