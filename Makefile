# Everything a person runs by hand. Each target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Processes of pytest that take a file each at a time, the longest first (tests/conftest.py)
PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -q --dist loadfile --no-loadscope-reorder

# Nothing here needs the hub: the miniature study is generated on the spot.
export HF_HUB_OFFLINE := 1

.PHONY: help env demo demo-kinds architectures test test-unit test-guard test-ci test-all test-faults test-slurm test-gpu slurm bench docs lint audit clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(INSTALLED)  ## create .venv with the pinned dependencies

$(INSTALLED): envs/requirements.txt envs/requirements-dev.txt envs/constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Coppice needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c envs/constraints.txt -r envs/requirements.txt -r envs/requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: env  ## run the whole miniature study (some ten minutes on two cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake

test: env  ## what to run before a commit: all short tests, and one small study from end to end (some four minutes)
	$(PYTEST) tests contrib -n 2 -m "not guard and not slow"

test-unit: env  ## the unit tests alone (a minute and a half)
	$(PYTEST) tests/unit contrib -n 2 -m "not guard and not slow"

# Three processes on two cores: the tests on Slurm wait most of the time
test-guard: env slurm  ## the studies that guard the main job: miniature, candidates, reruns, kills, Slurm (at most thirty minutes)
	$(PYTEST) tests -n 3 -m guard

test-ci: env slurm  ## what .ci/run runs: `make test` and `make test-guard` at once, which share one small study
	$(PYTEST) tests contrib -n 3 -m "not slow"

test-all: env slurm docs  ## every test, real data beside the checkout too, and the site (35 minutes)
	COPPICE_TEST_ALL_MODELS=1 $(PYTEST) tests contrib -n 3

test-faults: env  ## the fault tests with ten kills a stage at random moments (COPPICE_FAULTS_SEED repeats them); an hour
	COPPICE_FAULTS_KILLS=10 $(PYTEST) tests/faults -n 2 -rP

test-slurm: env slurm  ## a small study on a real Slurm, which the test starts
	$(PYTEST) tests/slurm -n 0 -rs

slurm:  # installed where apt can; elsewhere its tests are skipped and say so
	command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -q slurmctld slurmd slurm-client munge || true

test-gpu: env  ## what computes on a GPU against a CPU; skipped where there is none
	COPPICE_TEST_GPU=1 $(BIN)/python -m pytest tests/unit/test_on_a_gpu.py -q -rs

demo-kinds: env  ## run the miniature study of captioner, image-text model, dual encoder and code model (some eight minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --configfile config/kinds.yaml

architectures: env  ## run tiny models of all architectures, and write what works to docs/reference/architectures.md
	PYTHONPATH=workflow/scripts $(BIN)/python -m tests.architectures

bench: $(VENV)/.bench  ## speed against the peers, and how jobs are planned
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/makespan.py

$(VENV)/.bench: $(INSTALLED) envs/requirements-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c envs/constraints.txt -r envs/requirements-bench.txt
	touch $@

# An environment of its own, because the site needs neither torch nor anything else of the study. The variable silences
# Material's notice about the end of its maintenance, which is not a warning about these pages.
docs: $(VENV)-docs/.installed  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet
	@echo site/index.html

$(VENV)-docs/.installed: envs/requirements-docs.txt envs/constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -c envs/constraints.txt -r envs/requirements-docs.txt
	touch $@

lint: env  ## ruff, snakefmt, snakemake --lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

audit: $(VENV)-audit/.installed  ## known vulnerabilities of the pinned versions; fails where a version cannot be looked up
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip -r envs/constraints.txt

$(VENV)-audit/.installed: envs/requirements-audit.txt
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check -r envs/requirements-audit.txt
	touch $@

clean:  ## remove what runs left behind, but no results
	rm -rf .snakemake logs .pytest_cache .ruff_cache
