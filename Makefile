# Every command installs what it needs first, once, into .venv. `make` alone lists the commands.
PYTHON ?= python3
OUT    ?= runs/lesson
ARGS   ?=

BIN := .venv/bin

# `make install SYSTEM_TORCH=1` makes a .venv that sees the packages of $(PYTHON), and leaves its PyTorch alone.
VENV_FLAGS := $(if $(SYSTEM_TORCH),--system-site-packages)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install lesson lab test test-slow evidence export readme clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## install wikidpo and its tools into .venv (SYSTEM_TORCH=1: keep the PyTorch of PYTHON=python3)
ifdef SYSTEM_TORCH
	@grep -q 'site-packages = true' .venv/pyvenv.cfg || \
	  { echo "error: .venv was made without SYSTEM_TORCH=1: remove it (rm -r .venv), then run this again" >&2; exit 1; }
endif

.venv/.installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed: PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) .venv
	@$(BIN)/python tools/pins.py use > .venv/constraints.txt || { test -e $@ || rm -r .venv; exit 1; }
	@echo "Installing wikidpo and its tools into .venv: minutes the first time, seconds later"
	@$(BIN)/python -m pip install -qq -c .venv/constraints.txt -e '.[dev]'
	@touch $@

lesson: install ## run the whole lesson: mine, train, judge, report (OUT=runs/lesson, ARGS=...)
	@$(BIN)/wikidpo lesson --out $(OUT) $(ARGS)

lab: install ## open JupyterLab on the lessons
	@PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --LabApp.default_url=/lab/tree/nbs/lessons \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test: install ## run every test: export, notebooks, README, pytest (ARGS="pytest -k loss": one stage, with its options)
	@$(BIN)/python tools/check.py $(ARGS)

test-slow: install ## run the tests that take longer
	@$(BIN)/python -m pytest -m slow $(ARGS)

evidence: install ## measure the default run again: five seeds, and ten times the learning rate (about 12 minutes)
	@$(BIN)/python tools/default_run.py

export: install ## write wikidpo/ and README.md from the notebooks, and clean the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python tools/readme.py

readme: install ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

clean: ## remove what tests and builds leave behind; runs/ and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
