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

NAME := $(patsubst %.toml,%,$(notdir $(PROFILE)))
BUILD := build/$(NAME)
HELPERS := $(filter-out helpers/headless.py helpers/launch.py helpers/readme.py,$(wildcard helpers/*.py))
SCALING := 10_scaling
NOTEBOOKS := $(filter-out $(SCALING),$(sort $(basename $(notdir $(wildcard notebooks/[0-9]*.ipynb)))))
EXECUTED := $(NOTEBOOKS:%=$(BUILD)/%.ipynb)
RUN := $(BIN)/python -m helpers.headless
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

.PHONY: figures
figures: $(EXECUTED) ## run the notebooks and draw every figure into figures/<profile>/
	@echo "Every figure is in figures/$(NAME)/, every executed notebook in $(BUILD)/."

.PHONY: test
test: $(VENV)/installed ## run the unit tests, and every notebook through nbmake
	DSTEER_FIGURES=$(CURDIR)/build/test/figures $(BIN)/python -m pytest --nbmake --nbmake-timeout=1800 --ignore=tests/browser tests $(NOTEBOOKS:%=notebooks/%.ipynb)

.PHONY: test-browser
test-browser: chromium $(VENV)/browser ## run notebooks 03 and 09 in a JupyterLab of their own, in headless Chromium, and move their sliders
	$(BIN)/python -m pytest tests/browser

.PHONY: chromium
chromium: ## look for a Chromium for test-browser, and install Debian's where there is none
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	for as in "" "sudo -n"; do $$as apt-get update -q && $$as apt-get install -q -y chromium && exit; done; \
	echo "There is no Chromium here, and apt-get cannot install it."; exit 1

.PHONY: scaling
scaling: $(BUILD)/$(SCALING).ipynb ## train organisms of six sizes and repeat notebook 07's comparison on them

.PHONY: lab
lab: $(VENV)/installed ## open JupyterLab in the project's environment
	$(BIN)/jupyter lab --notebook-dir=notebooks

.PHONY: bench
bench: $(VENV)/installed ## measure extraction, steering and dose sweeps as ratios, against other libraries too
	$(BIN)/python -m benchmarks

.PHONY: publish
publish: figures ## copy the executed notebooks over notebooks/, and renew the README (for committing)
	$(RUN) --publish $(NOTEBOOKS) $(if $(wildcard $(BUILD)/$(SCALING).ipynb),$(SCALING)) $(CHOICE)
	$(BIN)/python -m helpers.readme

.PHONY: readme
readme: $(VENV)/installed ## write the README's figures and claims from figures/
	$(BIN)/python -m helpers.readme

.PHONY: lint
lint: $(VENV)/installed ## check the code's style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: clean
clean: ## remove executed notebooks and logs; what was trained stays cached
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove the cache and the environment too
	rm -rf artifacts $(VENV)

# The environment, made once and again when the list of dependencies changes.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=<one>.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# What only test-browser needs besides.
$(VENV)/browser: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	touch $@

# A notebook runs again when it, a helper that it imports, the profile's file MODEL=, DPO_MODEL= or DATA=, or a judge has changed.
$(BUILD)/%.ipynb: notebooks/%.ipynb $(HELPERS) $(VENV)/installed $(BUILD)/choice $(wildcard $(filter %.toml,$(PROFILE)))
	@$(RUN) $* $(CHOICE)

$(BUILD)/choice: always
	@mkdir -p $(@D)
	@echo '$(CHOICE) $(JUDGES)' | cmp -s - $@ || echo '$(CHOICE) $(JUDGES)' > $@
.PHONY: always

# Which notebooks read what others show or enter into the ledger (tests/test_makefile.py compares this with the notebooks' code).
$(BUILD)/01_derivation_check.ipynb: $(BUILD)/00_model_organism.ipynb
$(BUILD)/02_dpo_lora.ipynb: $(BUILD)/00_model_organism.ipynb
$(BUILD)/03_steering_vector.ipynb: $(BUILD)/00_model_organism.ipynb $(BUILD)/02_dpo_lora.ipynb
$(BUILD)/04_add_subtract.ipynb: $(BUILD)/00_model_organism.ipynb $(BUILD)/02_dpo_lora.ipynb $(BUILD)/03_steering_vector.ipynb
$(BUILD)/05_spectral_signatures.ipynb: $(BUILD)/00_model_organism.ipynb $(BUILD)/02_dpo_lora.ipynb $(BUILD)/03_steering_vector.ipynb
$(BUILD)/06_controls.ipynb: $(BUILD)/00_model_organism.ipynb $(BUILD)/01_derivation_check.ipynb $(BUILD)/02_dpo_lora.ipynb \
  $(BUILD)/03_steering_vector.ipynb $(BUILD)/04_add_subtract.ipynb $(BUILD)/05_spectral_signatures.ipynb
$(BUILD)/07_when_is_dpo_steering.ipynb: $(BUILD)/00_model_organism.ipynb $(BUILD)/02_dpo_lora.ipynb $(BUILD)/03_steering_vector.ipynb
$(BUILD)/09_explorer.ipynb: $(BUILD)/00_model_organism.ipynb $(BUILD)/02_dpo_lora.ipynb $(BUILD)/03_steering_vector.ipynb \
  $(BUILD)/07_when_is_dpo_steering.ipynb
$(BUILD)/08_scorecard.ipynb: $(BUILD)/01_derivation_check.ipynb $(BUILD)/02_dpo_lora.ipynb $(BUILD)/03_steering_vector.ipynb \
  $(BUILD)/04_add_subtract.ipynb $(BUILD)/05_spectral_signatures.ipynb $(BUILD)/06_controls.ipynb \
  $(BUILD)/07_when_is_dpo_steering.ipynb
$(BUILD)/$(SCALING).ipynb: $(BUILD)/00_model_organism.ipynb $(BUILD)/02_dpo_lora.ipynb
