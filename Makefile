# Shortcuts for people. Each target only starts a tutor command or a tool; it contains no logic.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
# What installs into .venv: uv, or pip.
INSTALLER ?= uv
# The recipes of the stack and of the targets without a container; RECIPE=... sets both. The commands read them from the
# environment, because Make cannot quote: a path may contain blanks, quotes and dollar signs.
override RECIPE := $(value RECIPE)
STACK := $(or $(value RECIPE),data/tutor.toml)
override RECIPE := $(or $(value RECIPE),data/demo.toml)
export RECIPE STACK
# Workers of make test and make test-quick, one a core; PYTEST adds options of pytest.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal
PYTEST :=
BIN := .venv/bin
TUTOR := $(BIN)/tutor
TOOLS := .venv/llamacpp/BUILD.json .venv/typescript/INSTALL.json

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo ## run the whole pipeline on this CPU: a real 135M Llama, minutes
	@$(TUTOR) run --publish --recipe data/demo.toml

all: .venv/light ## run the whole stack in containers, on the GPU: ends with `ollama run tutor`
	@$(TUTOR) stack run --recipe "$$STACK"

up: .venv/light ## start Ollama's container
	@$(TUTOR) stack call up --recipe "$$STACK"

down: .venv/light ## stop and remove the stack's containers; models and the hub's cache stay
	@$(TUTOR) stack call down --recipe "$$STACK"

logs: .venv/light ## follow Ollama's log
	@$(TUTOR) stack call logs --recipe "$$STACK"

shell: .venv/light ## open a shell in the trainer's image
	@$(TUTOR) stack call shell --recipe "$$STACK"

run: .venv/demo ## run the stages of RECIPE that are not up to date
	@$(TUTOR) run --recipe "$$RECIPE"

chat: .venv/light ## chat with the tutor of RECIPE
	@$(TUTOR) chat --recipe "$$RECIPE"

eval: .venv/light ## answer the held-out prompts again and grade the answers
	@$(TUTOR) eval --recipe "$$RECIPE"

report: .venv/light ## open the report of RECIPE in the browser
	@$(TUTOR) report --open --recipe "$$RECIPE"

doctor: .venv/light ## print what this machine has and lacks, and what RECIPE needs
	@$(TUTOR) doctor --recipe "$$RECIPE"

status: .venv/light ## print which stages are up to date
	@$(TUTOR) status --recipe "$$RECIPE"

bench: .venv/demo ## compare training, merging and converting with the plain way; options: BENCH=, BENCH_MERGE=
	@$(BIN)/python scripts/bench_help.py
	@$(BIN)/python scripts/bench_train.py $(BENCH)
	@$(BIN)/python scripts/bench_merge.py $(BENCH_MERGE)

matrix: .venv/demo ## run the whole chain on a tiny model of every family with every prompt: build/matrix/matrix.txt
	@$(TUTOR) matrix

install: .venv/demo ## make the environment of the demo only: .venv, llama.cpp, TypeScript; INSTALLER=pip for pip

# One marker file for each set of packages. The script compares the hash of the pins, Make only the times of files.
.venv/light .venv/build .venv/demo .venv/dev .venv/lock: pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) scripts/install.py $(@F) --installer $(INSTALLER)

# The demo's set contains two tools of the user's cache: links in .venv. A removed tool is brought again.
.venv/demo: $(TOOLS) $(wildcard $(addprefix tutor/,engines/llamacpp/*build*.py engines/llamacpp/src/* \
  graders/typescript/install.py graders/typescript/src/*))

$(TOOLS): ;

llamacpp: .venv/build ## build the pinned llama.cpp, once, into the user's cache
	@$(BIN)/python scripts/build_llamacpp.py >/dev/null

typescript: .venv/build ## install the pinned TypeScript compiler, once, into the user's cache
	@$(BIN)/python scripts/install_typescript.py >/dev/null

test: .venv/demo .venv/dev ## run every test that needs neither GPU nor Docker
	$(BIN)/pytest $(PARALLEL) -m "not docker" $(PYTEST)

test-docker: .venv/demo .venv/dev ## run the container tests; each prints why where it cannot run
	$(BIN)/pytest -m docker tests/end_to_end $(PYTEST)

# pytest does not import the files that use torch: its libraries alone take ten seconds.
test-quick: .venv/dev ## run the unit tests that need no torch: a minute
	$(BIN)/pytest $(PARALLEL) -m "not slow and not pipeline and not llamacpp and not typescript and not docker" \
	  $(addprefix --ignore=,$(shell grep -rlE '^(torch = |from support.models.(tiny_models|training))' tests --include='test_*.py')) $(PYTEST)

check: .venv/dev ## check format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

audit: .venv/dev ## look the pinned packages up in the database of known vulnerabilities
	$(BIN)/pip-audit --strict --disable-pip --require-hashes $(addprefix --requirement=,$(wildcard requirements/*.txt))

lock: .venv/lock ## pin the dependencies of pyproject.toml again
	PATH="$$PWD/$(BIN):$$PATH" scripts/lock

clean: .venv/light ## remove the outputs of RECIPE
	@$(TUTOR) clean --recipe "$$RECIPE"

.PHONY: help demo all audit up down logs shell test-docker run chat eval report doctor status matrix install llamacpp typescript test test-quick bench check lock clean
