# make demo   the main job: a photo and a spoken sentence become LLM ids and come back, as an HTML report
# make test   every check that CI runs
# Both work alone from a fresh clone: the first use creates .venv and installs the pinned set.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint data clean

help:
	@sed -n '1,3s/^# //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/mmtok demo --out mmtok-demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/mmtok doctor
	$(BIN)/python -m pytest

data: $(STAMP)
	$(BIN)/python recipes/fetch_data.py --out data

clean:
	rm -rf $(VENV) mmtok-demo
