# Two commands on a fresh machine with Python 3.11+: `make demo` and `make test`. `make help` lists all.
# The first one to run installs everything into .venv.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PATH := $(abspath $(BIN)):$(PATH)

# The models are small: more threads only stand in one another's way.
export OMP_NUM_THREADS ?= 1

# Many of the tests' processes import torch, some for a word of help: Python compiles it for the first
# of them and keeps that, whatever the environment says. Otherwise each takes twice as long to start.
unexport PYTHONDONTWRITEBYTECODE

# Where torch comes from: a folder of wheels, where pip is set to search one; else uv picks the build
# that suits the machine (without a GPU the small one).
WHEELS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
ifneq ($(WHEELS),)
export UV_FIND_LINKS ?= $(WHEELS)
else
export UV_TORCH_BACKEND ?= auto
endif

# make demo DATA=folder LANGS=en,sw ARGS='--seeds 5'
# make demo DATA=hub LANGS=en,sw         streams 8 MB of Wikipedia a language
# make reproduce SCALE=mini DATA=folder EXHIBIT='table2 figure1' ARGS=--dry-run
# make reproduce SCALE=mini DATA=folder ARGS=--write-only     the pages of what has been run so far
DATA    ?=
LANGS   ?=
ARGS    ?=
SCALE   ?= toy
RESOLUTION ?= lowest-direct
EXTRAS  ?= dev
EXHIBIT ?= all

say := @printf '\n\033[1m%s\033[0m\n'

.PHONY: help demo causes reproduce bench gpu test test-versions mutants slow docs lab prepare clean
help:      ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

$(READY): settings.ini setup.py pyproject.toml
	$(say) "Installing into $(VENV), once: about a minute and a 1.5 GB folder"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer. Install one and name it: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@$(BIN)/uv pip install -q --python $(BIN)/python $(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)      ## the main job: 3 minutes on 2 idle cores; 15 with DATA=folder LANGS=en,sw
	$(say) "Pretraining and finetuning small models: about $(if $(DATA),15,3) minutes on 2 idle cores"
	interference demo $(if $(DATA),--data '$(DATA)') $(if $(LANGS),--langs '$(LANGS)') $(ARGS)

causes: $(READY)    ## gradients and gates over pairs and seeds: 15 minutes on 2 cores
	$(say) "Pretraining, probing and pruning small models"
	interference causes $(if $(DATA),--data '$(DATA)') $(ARGS)

reproduce: $(READY) ## the paper's tables and figures: 3 hours on 2 cores at SCALE=toy
	$(say) "Planning, running and writing: $(EXHIBIT) at scale $(SCALE)"
	interference reproduce $(EXHIBIT) --scale $(SCALE) $(if $(DATA),--data '$(DATA)') $(ARGS)

bench: $(READY)     ## times and memory beside other libraries: 15 minutes on 2 quiet cores
	$(say) "Measuring our steps and our peers' in turn: about 15 minutes on 2 cores"
	python benchmarks/bench.py $(ARGS)

gpu: $(READY)       ## on a machine with a card: 8 minutes with DATA=folder
	$(say) "Testing, training at scale mini and measuring on the GPU: at most 8 minutes"
	python tools/gpu.py --data '$(DATA)' $(ARGS)

test: $(READY)      ## every notebook's tests, then those in tests/: 11 minutes
	$(say) "Running the notebooks, then the tests: about 11 minutes on 2 cores"
	python tools/test_notebooks.py; notebooks=$$?; pytest -n 2 --dist loadgroup tests $(ARGS) && exit $$notebooks

# The lowest versions that settings.ini promises (RESOLUTION=lowest-direct), or the latest it allows.
test-versions:      ## the tests at the lowest versions of what we build on: 12 minutes
	$(say) "Testing at other versions ($(RESOLUTION)), in an environment of their own"
	@$(MAKE) --no-print-directory test VENV=.venv-$(RESOLUTION) INSTALL='--resolution $(RESOLUTION)' \
	  EXTRAS=test,transformers

mutants: $(READY)   ## faults put in on purpose: does a test notice? 12 minutes on 2 cores
	$(say) "Putting faults into copies of the project, one at a time: about 12 minutes on 2 cores"
	python tests/mutants.py $(ARGS)

slow: $(READY)      ## also the cells marked `#| slow`: an hour
	$(say) "Running the slow cells too: up to an hour"
	NBDEV_FLAGS=slow pytest nbs $(ARGS)

docs: $(READY)      ## the site, into _docs: 1 minute
	$(say) "Building the site into _docs: about a minute"
	python tools/build_docs.py $(ARGS)

lab: $(READY)       ## JupyterLab on the notebooks, until Ctrl-C
	$(say) "Starting JupyterLab on nbs/: a few seconds; Ctrl-C twice ends it"
	nbdev_trust && jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

prepare: $(READY)   ## before a commit: export, clean, README, lint, test: 12 minutes
	$(say) "Exporting, cleaning, making the README, checking and testing: about 12 minutes"
	nbdev_export && nbdev_clean && python tools/make_readme.py && ruff check && \
	  $(MAKE) --no-print-directory test ARGS='$(ARGS)'

clean:     ## remove what the commands above made: at once
	$(say) "Removing the environment and everything built"
	rm -rf $(VENV) .venv-* _proc _docs *.egg-info build dist .pytest_cache .ruff_cache
