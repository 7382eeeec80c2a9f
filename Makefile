# Two commands on a fresh machine with git, make and Python 3.11: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: demo test test-real models lint docs bench clean

demo: $(VENV)/.all ## Build examples/digits for a Galaxy S22 and print its table
	$(BIN)/deploy build -c examples/digits --target galaxy-s22

test: $(VENV)/.dev ## Everything that needs no data from elsewhere; at most 15 minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-real: $(VENV)/.dev ## Real trained models from EDGE_DEPLOY_DATA (default ../shared/data); at most 30 minutes
	$(BIN)/python -m pytest tests/real -m real

models: $(VENV)/.dev ## Builds the real models and writes docs/models.md; the builds stay in build/models
	$(BIN)/python tests/real/report.py docs/models.md build/models

lint: $(VENV)/.dev ## What pre-commit and CI check
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/.dev ## Writes the generated pages of docs/ again
	$(BIN)/python -m deploy.reference docs

bench: $(VENV)/.dev ## Measures everything in docs/performance.md and writes it; wants a quiet machine for an hour
	for name in start_up overhead gains quick_starts server soak sparse; do \
	  $(BIN)/python -m benchmarks.$$name -o benchmarks/results || exit 1; done
	$(BIN)/python -m benchmarks.render

clean:
	rm -rf $(VENV) build dist *.egg-info examples/*/build

# torch by its exact version first: a range would take a build with CUDA, several gigabytes.
$(VENV)/.all: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/.all
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@
