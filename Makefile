# make demo    set up, then meta-train, evaluate, plot and film
# make test    set up, then the fast tests;  make slow: training to its thresholds
# make check   format, lint, types, import rules, and the wheel in a clean environment

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test slow check clean gl
.DELETE_ON_ERROR:

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

gl: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/install_gl.sh

demo: $(READY) gl
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

test: $(READY) gl
	$(BIN)/pytest --numprocesses auto --dist loadfile --durations=20

slow: $(READY) gl
	$(BIN)/pytest -m slow

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/wheel_smoke.sh

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
