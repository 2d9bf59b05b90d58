# Everything a person types. A fresh clone needs only Python 3.11 and make: each target makes what it stands on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?=
ARGS ?=
TESTS ?=
JOBS ?= 2
OUT := runs/bench-$(shell date +%Y%m%d-%H%M%S)
RECIPES ?= fp,rtn-w8a8,tr-dq-w8a8,rtn-w4a8,smoothquant-w4a8,vidit-q-w4a8,tr-dq-w4a8

.DEFAULT_GOAL := help
.PHONY: help studio test sanitize check style bench tables clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

studio: $(VENV)/.runtime ## Install what is missing and serve the studio on 127.0.0.1
	$(BIN)/python app.py --host $(HOST) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(VENV)/.test ## Run every test in JOBS processes (2); the browser ones too where Chromium is present
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS) $(ARGS)

sanitize: $(VENV)/.test ## The kernel tests again, in a library built with address and undefined-behaviour sanitizers
	TRDQ_SANITIZE=1 $(BIN)/python -m pytest tests/kernels/test_process.py $(ARGS)

check: $(VENV)/.test ## Lint, and tell what the formatter would change
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.test ## Fix what the linter can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.runtime ## Measure kernels and recipes on this machine, then rewrite the result tables
	$(BIN)/python -m benchmarks.kernels --add
	$(BIN)/python -m benchmarks.switching --add
	$(BIN)/python -m benchmarks.text_steps --add
	$(BIN)/python -m benchmarks.peers --add
	$(BIN)/python -m trdq_core compare --recipes $(RECIPES) --groups 4 --prompts 32 --out $(OUT)/compare $(ARGS)
	$(BIN)/python -m trdq_core profile --model random-dit --recipes fp,rtn-w8a8,rtn-w4a8 --out $(OUT)/profile
	$(BIN)/python -m benchmarks.tables --add $(OUT)/compare/report.json $(OUT)/profile/report.json

tables: $(VENV)/.runtime ## Rewrite the result tables from benchmarks/results.csv
	$(BIN)/python -m benchmarks.tables

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp files say what is installed; they are renewed when a requirements file changes.
$(VENV)/.runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is %s. Try make PYTHON=python3.11." % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.test: $(VENV)/.runtime requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	@touch $@
