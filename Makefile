# The pipeline for people. Every target only starts a tutor command or a tool; no logic lives here.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
RECIPE ?= data/demo.toml
BIN := .venv/bin
TUTOR := $(BIN)/tutor

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo llamacpp ## the whole pipeline on this CPU: a real 135M Llama, minutes
	@$(TUTOR) run --recipe data/demo.toml
	@$(TUTOR) publish --recipe data/demo.toml --if-there --wait 0

run: .venv/demo llamacpp ## run what is not up to date of RECIPE
	@$(TUTOR) run --recipe $(RECIPE)

chat: ## talk with the tutor of RECIPE
	@$(TUTOR) chat --recipe $(RECIPE)

eval: ## answer the held-out prompts again and judge
	@$(TUTOR) eval --recipe $(RECIPE)

status: ## what is up to date
	@$(TUTOR) status --recipe $(RECIPE)

install: .venv/demo ## the environment alone: .venv

# One marker a set of pins: the environment is made once, and again when the pins change.
.venv/base: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.venv/demo: .venv/base requirements/demo.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/demo.txt
	@touch $@

llamacpp: .venv/base ## build the pinned llama.cpp, once, into the user's cache
	@$(BIN)/python scripts/build_llamacpp.py >/dev/null

test: .venv/demo llamacpp ## every test that needs neither GPU nor Docker
	$(BIN)/pytest

test-quick: .venv/base ## the unit tests alone: seconds
	$(BIN)/pytest -m "not pipeline and not llamacpp"

check: .venv/base ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

lock: ## pin again what pyproject.toml asks for (needs uv)
	scripts/lock

clean: ## remove what RECIPE made
	@$(TUTOR) clean --recipe $(RECIPE)

.PHONY: help demo run chat eval status install llamacpp test test-quick check lock clean
