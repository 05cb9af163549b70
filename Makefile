# Everything a person runs by hand. Each target does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two processes of pytest, a file each at a time, the longest first (tests/conftest.py)
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Nothing here needs the hub: the miniature study is generated on the spot.
export HF_HUB_OFFLINE := 1

.PHONY: help env demo test test-unit test-faults test-faults-bounded test-workflow test-slurm test-gpu bench lint audit clean

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

# All in one: studies of the workflow tests run beside short tests, and what all of them import is imported once
test: env  ## the tests, but for the long fault tests and Slurm
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/unit tests/faults tests/workflow $(TWO) -q -m "not (faults and slow)"

test-unit: env  ## unit tests: some two minutes
	$(BIN)/python -m pytest tests/unit $(TWO) -q -m "not slow"

test-faults-bounded: env  ## bad input, secrets, damaged files, a full disk, one kill a stage: some minutes
	$(BIN)/python -m pytest tests/faults $(TWO) -q -m "not slow"

test-faults: env  ## the same at length: ten kills a stage at random moments (COPPICE_FAULTS_SEED repeats them); an hour
	COPPICE_FAULTS_KILLS=10 $(BIN)/python -m pytest tests/faults $(TWO) -q -rP

test-workflow: env  ## workflow tests: the DAG for real, and the slow ones among the unit tests
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/unit tests/workflow $(TWO) -q -m "slow or workflow"

test-slurm: env  ## a small study on a real Slurm, which is installed where apt can and started by the test
	command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -q slurmctld slurmd slurm-client munge || true
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/slurm -q -rs

test-gpu: env  ## what computes on a GPU against a CPU; skipped where there is none
	COPPICE_TEST_GPU=1 $(BIN)/python -m pytest tests/unit/test_on_a_gpu.py -q -rs

bench: $(VENV)/.bench  ## speed against the peers, and how jobs are planned
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/makespan.py

$(VENV)/.bench: $(INSTALLED) envs/requirements-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c envs/constraints.txt -r envs/requirements-bench.txt
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
