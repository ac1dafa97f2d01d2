# make demo   train a small Kimi Linear on Python's own sources, then let it complete code
# make test   everything the tests need, and the tests
# make check  format, lint, types
# make docs   the documentation site, with the course, in site/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test check docs clean

demo: $(VENV)/run.stamp
	$(BIN)/palimpsest train recipes/demo.py --resume
	$(BIN)/palimpsest generate runs/demo --prompt "def read_lines(path):" --prompt "class Stack:" \
		--max-new-tokens 160 --temperature 0.8 --top-p 0.95

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) -e ".[train,cli,explain,lab]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev]"
	touch $@ $(VENV)/run.stamp

clean:
	rm -rf $(VENV) build dist runs site *.egg-info
