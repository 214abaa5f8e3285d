# Every target first makes .venv and installs what it needs.
#   make demo                     the main job on embedded data: train, shrink, export, verify, report
#   make test                     all tests
#   make TORCH_INDEX=<url> demo   take torch from another package index, e.g. one with CPU-only builds

PYTHON ?= python3
BIN := .venv/bin
TORCH_INDEX ?=
WORKERS ?= 2

.PHONY: install demo test check bench docs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#//p' Makefile

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Galago needs Python 3.11 or newer; set PYTHON=python3.12 or the like"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -z "$(TORCH_INDEX)" || $(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) 'torch>=2.11,<2.16' 'torchvision>=0.26,<0.30'
	@echo "installing Galago and what it needs into .venv (about two minutes the first time)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/galago ship --config recipes/demo/student.yaml
	@echo "open runs/demo/student/report.html in a browser"

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q  # a thread a worker: more wait for each other

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/qat_step.py
	$(BIN)/python benchmarks/latency.py

docs: install
	$(BIN)/python docs/build.py

clean:
	rm -rf .venv build dist site src/*.egg-info
