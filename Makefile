# Commands of a clone:
#   make demo     build .venv if needed, then show Mask-JEPA end to end on generated data
#   make test     build .venv if needed, then run the tests
#   make lint     ruff, format check, mypy on jepa_plugins/core
#   make doctor   what is installed, and the line that repairs each thing that is missing
#   make clean    remove .venv and caches
# Choices: PYTHON=python3.11   TORCH="torch==2.8.0 torchvision==0.23.0"   TEST_WORKERS=2   JEPA_VENV=/folder

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint doctor clean

VENV := $(or $(JEPA_VENV),.venv)
PY := $(VENV)/bin/python
# The first interpreter that starts and is new enough; an executable of the name alone proves neither.
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.10 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$$name"; break; }; done)
TORCH ?= -r requirements/torch.txt
OPERATOR := torch-ms-deform-attn==0.1.1
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

# The stamp's name is the state that the environment was built for, contents and place rather than dates: a
# fresh clone that is pointed at an environment of another clone (JEPA_VENV) knows whether it may use it.
SETUP_INPUTS := setup.py jepa_plugins/__init__.py Makefile tools/install_detectron2.py $(sort $(wildcard requirements/*.txt))
SETUP_KEY := $(shell { cat $(SETUP_INPUTS); echo "$(TORCH) $(CURDIR)"; } | cksum | tr ' ' '-')
STAMP := $(VENV)/.jepa-setup-$(SETUP_KEY)

# Quiet unless a person watches the progress bars.
PIP = $(PY) -m pip install --disable-pip-version-check $$([ -t 1 ] || echo --quiet)

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.10 or newer was found: install Python 3.11 or name one with 'make setup PYTHON=/path/to/python'." >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "PYTHON=$(PYTHON) does not start or is older than 3.10: install Python 3.11 or name one with 'make setup PYTHON=/path/to/python'." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) lacks its venv module: install it (on Debian and Ubuntu the package python3-venv)." >&2; exit 1; }
	@rm -f "$(VENV)"/.jepa-setup-*
	@echo "[1/5] Environment $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PY)" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(if $(JEPA_VENV),,--clear) "$(VENV)"
	@echo "[2/5] PyTorch (the largest step: one or more minutes, about 5 GB with its CUDA libraries)"
	@$(PIP) setuptools wheel ninja packaging $(TORCH)
	@echo "[3/5] jepa_plugins with its dependencies for detectron2, mmengine and the tests"
	@$(PIP) --constraint requirements/constraints.txt --editable ".[d2,mm-onedl,dev]"
	@$(PIP) --no-deps --requirement requirements/panoptic.txt
	@echo "[4/5] detectron2"
	@$(PY) tools/install_detectron2.py
	@echo "[5/5] Compiled deformable attention (optional, one to two minutes)"
	@if $(PY) -c 'import torch_ms_deform_attn' 2>/dev/null; then :; \
	elif $(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation $(OPERATOR) >"$(VENV)/operator.log" 2>&1; then :; \
	else echo "It did not compile (see $(VENV)/operator.log; it needs a C++ compiler): the PyTorch version is used, with equal results."; fi
	@touch "$@"
	@echo "Ready: $(VENV)"

demo: setup
	$(PY) tools/demo.py $(DEMO_ARGS)

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

doctor: setup
	$(PY) tools/doctor.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
