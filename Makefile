# Multigraft: the verbs of a checkout. Each makes .venv first where it is missing or stale.
#
#   make demo     attach, train and serve three adapters on the small model in the package
#   make test     format, lint, types, tests: what CI runs
#   make lint     the first three of these
#   make docs     the documentation's site, into build/site; a warning is an error
#   make format   let ruff rewrite what it can
#   make bench    every script in bench/, against PEFT and the frozen base; writes bench/results/
#   make bench-gpu  the same on one CUDA GPU
#   make clean    remove .venv and everything built
#
# JOBS=4 make test runs that many test processes; PYTHON=python3.12 picks the interpreter of a new .venv;
# QUANTIZE=nf4 make demo keeps the base in 4 bits.

PYTHON ?= python3
JOBS   ?= 2

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# -qq hides progress and warnings; errors still show.
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
TORCH  := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)

.PHONY: help demo test lint docs format bench bench-gpu clean fresh-venv
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

# Waiting threads sleep: on two cores that others use too, spinning ones made the demo ten times slower.
demo: export OMP_WAIT_POLICY = PASSIVE
demo: $(STAMP)
	@$(BIN)/multigraft quickstart $(if $(QUANTIZE),--quantize $(QUANTIZE))

# One thread for each test process: tiny models gain nothing from more, and processes would fight for cores.
test: export OMP_NUM_THREADS = 1
test: lint
	@$(BIN)/python -m pytest -n $(JOBS) -q

lint: $(STAMP)
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy --no-error-summary

# The theme's own news stay out of the output.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	@$(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

format: $(STAMP)
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format -q .

bench: $(STAMP)
	@set -e; for script in $(filter-out bench/gpu.py,$(wildcard bench/[!_]*.py)); do \
		echo "== $$script"; $(BIN)/python $$script; done

bench-gpu: $(STAMP)
	@$(BIN)/python bench/gpu.py

clean:
	rm -rf $(VENV) build dist quickstart-output .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests bench demo examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# An environment whose interpreter still runs is brought up to date in place; any other is made anew.
# torch goes first and alone, so that the build chosen for this machine (say, CPU only) is the one that stays.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c '' 2>/dev/null || $(MAKE) -s fresh-venv
	@echo "Installing into $(VENV): some minutes the first time"
	@$(PIP) '$(TORCH)'
	@$(PIP) -e '.[dev,docs,ecosystem,train,quant]'
	@touch $@

fresh-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Multigraft needs Python 3.10 or later, not " + sys.version.split()[0])'
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV)
