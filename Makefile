# `make demo` and `make test` do all their own set-up, in .venv; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= cpu,demo,dev

.PHONY: demo demo-text compare test lint setup help clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(VENV)/.ready  ## install everything into .venv

$(VENV)/.ready: setup.cfg constraints.txt tools/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" EXTRAS="$(EXTRAS)" bash tools/setup.sh
	touch $@

demo: setup  ## the whole pipeline on the pictures in demo/shards
	$(BIN)/python demo/run.py $(DEMO_ARGS)

demo-text: setup  ## CLIP and LiT on the same pictures and their captions, after `make demo`
	$(BIN)/python demo/text.py $(DEMO_ARGS)

compare: setup  ## all systems on the same pictures: hours, resumable; writes docs/comparison.md
	$(BIN)/python demo/compare.py $(COMPARE_ARGS)

test: setup  ## all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup  ## style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and the demo's results
	rm -rf $(VENV) runs/demo runs/demo-text
