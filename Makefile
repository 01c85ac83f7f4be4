# make run    trains on real digits, judges and draws the model: see runs/digits/report.md
# make test   checks everything but what takes minutes
# make test-all   checks that too: a run killed twenty times, every experiment's smoke preset,
#                 published models beside their sources in torch, in .venv-peers
# They install what they need into .venv from PyPI, at the versions of .constraints.txt.
# make test-newest   the tests with the newest versions of everything, in .venv-newest

PYTHON  ?= python3
NEWEST  ?= python3.13
PRESET  ?= full
RUN_DIR ?= runs/digits$(if $(filter-out full,$(PRESET)),-$(PRESET))
BIN     := .venv/bin

.PHONY: run test test-all test-newest lint clean
.DELETE_ON_ERROR:

run: .venv/train
	$(BIN)/python -m experiments.digits train --preset $(PRESET) --run-dir $(RUN_DIR)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: test .venv-peers/made
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

test-newest: .venv-newest/dev
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/train: pyproject.toml .constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[train]'
	touch $@

.venv/dev: .venv/train
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[train,pretrained,stores,dev]'
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxdiff needs Python 3.11 or newer; $(PYTHON) is older. Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv-newest/dev: pyproject.toml
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[train,pretrained,stores,dev]'
	touch $@

.venv-peers/made: .constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint .constraints-peers.txt \
	  torch diffusers transformers accelerate
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-peers runs
