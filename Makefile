# make help lists what there is to do.
PROFILE ?= atlas
MODEL ?=
DPO_MODEL ?=
DATA ?=
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# Threads that wait give their core away soon: spinning, they slow a busy machine down several times.
export GOMP_SPINCOUNT := 1000
# Memory that one operation of torch gives back, the next takes again, rather than both asking the system (glibc's malloc).
# Before its version 2.35 glibc takes no threshold above 32 MiB.
export MALLOC_MMAP_THRESHOLD_ := $(if $(shell getconf GNU_LIBC_VERSION 2>/dev/null | awk '$$2 >= 2.35'),1073741824,33554432)
export MALLOC_TRIM_THRESHOLD_ := 1073741824
# Compiled modules are kept, whatever the shell asks for: otherwise each process compiles torch again, in ten seconds.
unexport PYTHONDONTWRITEBYTECODE

$(if $(word 2,$(PROFILE)),$(error PROFILE=$(PROFILE) has a space in it, which make cannot pass on: rename the file or its folder))
# Variables of the shell of these names are none of make's business.
$(foreach name,profile model dpo_model data dask ray,$(if $(filter command,$(origin $(name))),$(error $(name)= is not known: write it in capitals)))
NAME := $(patsubst %.toml,%,$(notdir $(PROFILE)))
BUILD := build/$(NAME)
FIGURES := $(or $(DSTEER_FIGURES),figures)
# What every notebook is run by: code, profiles and predictions.
HOUSE := $(shell find helpers -name '*.py') $(wildcard profiles/*.toml) predictions.toml
ALL := $(sort $(basename $(notdir $(wildcard notebooks/[0-9]*.ipynb))))
WORLDS := $(filter %_worlds,$(ALL))
LONGEST := $(WORLDS) $(filter %_ladder,$(ALL))  # begun first where two run at once
# One page about a pair: another one by a profile that takes minutes; the organism's where it has been trained here, else
# that of a smaller one. Beside a ready partner, prompts do.
PAIR := $(PROFILE)
ifeq ($(origin PROFILE),file)
PAIR := $(if $(MODEL),report,$(if $(wildcard $(BUILD)/02_*.ipynb),$(PROFILE),quick))
endif
PROMPTS := $(if $(DPO_MODEL),$(if $(filter prompts:%,$(DATA)),,prompts:)$(or $(DATA),profiles/prompts.jsonl),$(DATA))
NOTEBOOKS := $(filter-out $(WORLDS),$(ALL))
EXECUTED := $(NOTEBOOKS:%=$(BUILD)/%.ipynb)
RUN := $(BIN)/python -m tools.headless
# What passes between notebooks is the ledger alone: some enter claims into it, some read what others entered.
calling = $(basename $(notdir $(shell grep -lE '$(1)' notebooks/[0-9]*.ipynb)))
RECORDING := $(call calling,claims[.]record)
READING := $(call calling,claims[.]load|claims[.]add_controls)
# What else decides figures: the judges of open text (never a key).
JUDGES = $(JUDGE_BASE_URL) $(JUDGE_MODEL) $(TOXICITY_MODEL) $(TRUTHFULQA)
CHOICE = --profile "$(PROFILE)" --model "$(MODEL)" --dpo-model "$(DPO_MODEL)" --data "$(DATA)"

# One notebook at a time: they share the processor's cores, and later ones read what earlier ones computed.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "PROFILE=<name or path.toml>, MODEL= and DPO_MODEL=<hub id or folder> and DATA=<data> choose what to study."
	@echo "DASK=<scheduler> or RAY=<address> has a cluster compute it (docs/cluster.md)."

.PHONY: figures
figures: $(EXECUTED) ## run the notebooks and draw every figure into figures/<profile>/
	@echo "Every figure is in figures/$(NAME)/, every executed notebook in $(BUILD)/."

# On a profile of its own, small enough that every notebook runs, those that read the ledger last and one by one.
.PHONY: test
test: export OMP_NUM_THREADS := 1
test: export DSTEER_ARTIFACTS := $(CURDIR)/build/test/artifacts
test: export DSTEER_FIGURES := $(CURDIR)/build/test/figures
test: $(VENV)/installed ## run the unit tests, and every notebook through nbmake
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/browser tests
	rm -rf build/test && $(RUN) --prepare build/test/notebooks --profile test $(ALL) one_page
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -n 2 --dist loadfile $(patsubst %,build/test/notebooks/%.ipynb,$(LONGEST) $(filter-out $(READING) $(LONGEST),$(ALL)) one_page)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 $(READING:%=build/test/notebooks/%.ipynb)

.PHONY: test-browser
test-browser: chromium $(VENV)/browser ## run notebooks with sliders in a JupyterLab of their own, in headless Chromium, and move them
	$(BIN)/python -m pytest tests/browser

.PHONY: chromium
chromium: ## look for a Chromium for test-browser, and install Debian's where there is none
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	for as in "" "sudo -n"; do $$as apt-get update -q && $$as apt-get install -q -y chromium && exit; done; \
	echo "There is no Chromium here, and apt-get cannot install it."; exit 1

.PHONY: worlds
worlds: ## pretrain eight organisms, train DPO and its controls on each, and measure the claims over them
	$(MAKE) $(WORLDS:%=build/worlds/%.ipynb) PROFILE=worlds

.PHONY: report
report: ## write one page about a base and its partner: MODEL=, DPO_MODEL= and DATA=<prompts>, or the organism's
	$(MAKE) $(FIGURES)/$(patsubst %.toml,%,$(notdir $(PAIR)))/report.html PROFILE="$(PAIR)" DATA="$(PROMPTS)"

.PHONY: lab
lab: $(VENV)/installed ## open JupyterLab in the project's environment
	$(BIN)/jupyter lab --notebook-dir=notebooks

.PHONY: bench
bench: $(VENV)/installed ## measure extraction, steering and dose sweeps as ratios, against other libraries too
	$(BIN)/python -m benchmarks

.PHONY: chaos
chaos: $(VENV)/installed ## kill, damage, fill and lock what runs need, and say what was lost and what was said
	$(BIN)/python -m tools.chaos

.PHONY: publish
publish: figures ## put the executed notebooks' outputs into notebooks/, and renew the README (for committing)
	$(RUN) --publish $(NOTEBOOKS) $(notdir $(basename $(wildcard $(BUILD)/one_page.ipynb))) $(CHOICE)
	$(if $(wildcard build/worlds/$(WORLDS).ipynb),$(RUN) --publish $(WORLDS) --profile worlds)
	$(BIN)/python -m tools.readme

.PHONY: readme
readme: $(VENV)/installed ## write the README's scorecard and each profile's gallery from figures/
	$(BIN)/python -m tools.readme

.PHONY: lint
lint: $(VENV)/installed ## check the code's style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --line-length 110 notebooks/*.ipynb
	$(BIN)/ruff format --check --line-length 110 notebooks/*.ipynb

.PHONY: clean
clean: ## remove executed notebooks and logs; what was trained stays cached
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove the cache and the environment too
	rm -rf artifacts $(VENV)

# The environment, made once and again when the list of dependencies changes. What is imported of it is compiled then,
# and the many times more that is not, never.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=<one>.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable .
	touch $@

# What only RAY= needs besides.
$(VENV)/ray: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]'
	touch $@

# What only test-browser needs besides.
$(VENV)/browser: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	touch $@

# A notebook runs again when it, the code, a profile, MODEL=, DPO_MODEL= or DATA=, or a judge has changed.
$(BUILD)/%.ipynb: notebooks/%.ipynb $(HOUSE) $(VENV)/installed $(BUILD)/choice $(wildcard $(filter %.toml,$(PROFILE)))
	@$(RUN) $* $(CHOICE)

$(FIGURES)/$(NAME)/report.html: $(BUILD)/one_page.ipynb tools/page.py
	$(BIN)/python -m tools.page $< $@
	@echo "The page is $@."

# What is refused changes nothing: what was computed for another choice stays as it is.
$(BUILD)/choice: always $(VENV)/installed
	@mkdir -p $(@D)
	@echo '$(CHOICE) $(JUDGES)' | cmp -s - $@ || { $(RUN) $(CHOICE) && echo '$(CHOICE) $(JUDGES)' > $@; }
.PHONY: always

# A notebook that reads the ledger runs after those before it that enter claims.
built = $(patsubst %,$(BUILD)/%.ipynb,$(filter $(NOTEBOOKS),$(1)))
before = $(shell printf '%s\n' $(RECORDING) | awk '$$0 < "$(1)"')
$(foreach reader,$(READING),$(eval $(call built,$(reader)): $(call built,$(call before,$(reader)))))
