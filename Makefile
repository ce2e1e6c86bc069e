# Needs git, make, Python 3.11 to 3.13 and PyPI; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export DAGSTER_DISABLE_TELEMETRY := yes

.PHONY: demo test test-all test-long coverage test-postgres dev check style types imports definitions audit lock docs bench fuzz screenshots clean-venv help

help: ## The commands of this Makefile
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml requirements.lock requirements-torch.lock
	@$(PYTHON) deploy/environment.py $(VENV)
	@touch $@

demo: $(READY) ## Run the whole graph on the example report, in the workspace demo/
	@$(BIN)/ft-dagster demo demo

PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: $(READY) ## Check that everything works on this machine, in ten minutes: all tests but tests/system
	$(PYTEST) --ignore tests/system

test-all: $(READY) ## Run all tests: those of `test`, and real daemons, browsers, databases, clusters, kills
	$(PYTEST)

coverage: $(READY) ## Run the tests of `test`, and list the lines that they do not reach; tracing takes a quarter more time
	$(PYTEST) --ignore tests/system --cov --cov-report term-missing:skip-covered

test-long: $(READY) ## Run tests that take minutes each: random kills, many edits, secrets planted everywhere (FT_KILLS, FT_SOAK_EDITS: how many)
	FT_LONG_TESTS=yes CI_POSTGRES=required \
	  $(BIN)/pytest tests/system/test_canaries.py tests/system/test_kills.py tests/system/test_soak.py

test-postgres: $(READY) ## Test the main job and retraining with Dagster's history in a PostgreSQL server of their own
	CI_POSTGRES=required FT_TEST_STORAGE=postgres \
	  $(BIN)/pytest tests/test_main_job.py tests/test_daemon.py tests/system/test_retraining.py \
	    tests/system/test_postgres.py

dev: $(READY) ## Start the Dagster UI on the workspace FT_WORKSPACE (default: this folder), daemon included
	@DAGSTER_HOME="$$($(BIN)/python -m ft_dagster.defs.instance)" && export DAGSTER_HOME && \
	  exec $(BIN)/dagster dev --workspace workspace.yaml --host 127.0.0.1

check: style types imports definitions audit ## Check style, types, import rules, definitions, known vulnerabilities

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

definitions: $(READY)
	$(BIN)/dagster definitions validate --workspace workspace.yaml

# PyPI tells known vulnerabilities with the description of each release; a mirror of its files may not have that.
ADVISORIES := https://pypi.org/pypi/pip/25.0/json
audit: $(READY) ## Look up known vulnerabilities of the packages in requirements.lock, if PyPI answers
	@if $(BIN)/python -c 'from urllib.request import urlopen; urlopen("$(ADVISORIES)", timeout=20)' 2>/dev/null; \
	  then $(BIN)/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r requirements.lock -r requirements-torch.lock; \
	  else echo 'Not audited: $(ADVISORIES) does not answer here, and it is where known vulnerabilities are looked up.'; fi

# Torch is PyPI's, or the build for CPUs that the tests ran on, which PyTorch serves itself.
CPU_TORCH := sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
UV := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header
lock: $(READY) ## Regenerate the locks from pyproject.toml; versions stay unless UPGRADE=--upgrade
	without=$$(echo 'torch<2.14' | $(UV) - | grep -oE '^(torch|cuda|nvidia|triton)[a-z0-9-]*' | sed 's/^/--no-emit-package=/') && \
	$(UV) pyproject.toml --all-extras --group dev --group embedded-base --generate-hashes $$without $(UPGRADE) \
	  --output-file requirements.lock
	sed -i '/--hash=$(CPU_TORCH)/d' requirements-torch.lock
	echo 'torch<2.14' | $(UV) - --no-deps --generate-hashes $(UPGRADE) --output-file requirements-torch.lock
	sed -i '/^torch==/a\    --hash=$(CPU_TORCH) \\' requirements-torch.lock

docs: $(READY) ## Regenerate the tables in docs/ from the models that read the fields
	PYTHONPATH=. $(BIN)/python docs/tables.py

REPORTS ?= ft_dagster/examples/chapter_markdowns
SIZES ?= 100 1000 10000 100000
bench: $(READY) ## Run the benchmarks, with results as tables in benchmarks/results/ (about an hour; SIZES and REPORTS choose)
	PYTHONPATH=. $(BIN)/python benchmarks/memory.py
	PYTHONPATH=. $(BIN)/python benchmarks/tokenizing.py --reports $(REPORTS)
	PYTHONPATH=. $(BIN)/python benchmarks/incremental.py --reports $(REPORTS) $(SIZES)
	PYTHONPATH=. $(BIN)/python benchmarks/training.py --chapters $(REPORTS)
	PYTHONPATH=. $(BIN)/python benchmarks/sqlite_limit.py

RUNS ?= 300000
FUZZ := $(VENV)/fuzz
fuzz: $(READY) ## Fuzz the readers of chapters with atheris: RUNS inputs for each of four targets
	$(BIN)/python -m venv $(FUZZ) && $(FUZZ)/bin/pip install --quiet 'atheris>=3.0,<3.1'
	for target in markdown json tokens secrets; do PYTHONPATH=.:$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])') \
	  TOKENIZERS_PARALLELISM=false $(FUZZ)/bin/python -m fuzz.targets $$target -runs=$(RUNS) -max_len=64 -timeout=20 || exit; done

screenshots: $(READY) ## Take the pictures in docs/images/ with the tests of the UI (needs Chromium; 5 to 11 minutes on 2 cores)
	CI_BROWSER=required FT_SCREENSHOTS=docs/images $(BIN)/pytest tests/system/test_browser.py

clean-venv: ## Remove .venv
	rm -rf $(VENV)
