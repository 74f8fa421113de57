#!/usr/bin/env bash
# The demo: every stage of the method on the embedded model, on a CPU. `make demo` and `make demo-quick` call it.
#   results/demo/run.sh         everything, into runs/demo; the report in runs/demo/report.md
#   results/demo/run.sh quick   the same stages on less, in minutes, into runs/demo-quick
set -euo pipefail
cd "$(dirname "$0")/../.."

PY=${PY:-.venv/bin/python}
SEED=${SEED:-0}
GENERATOR=${GENERATOR:-auto}
WORLD=data/world

# The budget. Three numbers: questions of one, two and three hops. The warm start sees few long
# searches: it is to teach the template, and RL when to search again.
OUT=${DEMO:-runs/demo} TRAJECTORIES="480 480 240" PAIRS=840 PROBES=160 WARMUP="64 56 8"
STEPS=6 PROMPTS=8 ROLLOUTS=5 HELD_OUT=64 QUESTIONS=300
if [ "${1:-}" = quick ]; then
    OUT=${DEMO:-runs/demo-quick} TRAJECTORIES="48 48 24" PAIRS=48 PROBES=32 WARMUP="16 14 2"
    STEPS=2 PROMPTS=2 ROLLOUTS=2 HELD_OUT=8 QUESTIONS=16
fi
LIMITS="--top-k 3 --max-searches 3 --tokens-per-turn 64 --context-tokens 1024 --observation-tokens 200"
TEST="--benchmark world --corpus $WORLD/passages.jsonl --limit $QUESTIONS $LIMITS
      --generator $GENERATOR --overwrite"

# Waiting threads sleep: a second process on the same cores then costs its share, not a standstill.
# They first wait awake for some 30 us, a tenth faster (GOMP_SPINCOUNT=0 if other work runs beside).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1

stage() { # NAME FUNCTION: run it, print and keep its seconds
    echo; echo "== $1"; local start=$SECONDS
    "$2"
    echo "$1: $((SECONDS - start)) s" | tee -a "$OUT/seconds.txt"
}

trajectories() { # scripted ones: this model is too small to be prompted into an agent
    $PY data/scripted.py --top-k 3 --hops $TRAJECTORIES --out "$OUT/trajectories" --overwrite
    $PY data/scripted.py --top-k 3 --hops $WARMUP --out "$OUT/trajectories-warmup" --overwrite
    $PY data/scripted.py --top-k 3 --split dev --hops 96 96 48 --out "$OUT/trajectories-dev" --overwrite
    $PY sft_simulator.py label "$OUT"/trajectories/{predictions,hasty}.jsonl --top-k 3 \
        --limit $PAIRS --out "$OUT/pairs.jsonl" --overwrite
    $PY sft_simulator.py label "$OUT"/trajectories-dev/{predictions,hasty}.jsonl --top-k 3 \
        --limit $PROBES --out "$OUT/pairs-dev.jsonl" --overwrite
}

simulator() {
    $PY sft_simulator.py train "$OUT/pairs.jsonl" --out "$OUT/simulator" --lr 4e-4 --batch-size 8 \
        --words 20 --temperature 0.5 --seed "$SEED" --overwrite
}

probe() {
    $PY sft_simulator.py probe "$OUT/pairs-dev.jsonl" --simulator "$OUT/simulator/model" \
        --simulator-max-tokens 160 --generator "$GENERATOR" --out "$OUT/simulator/probe.json"
}

warmup() {
    $PY train_rl.py warmup "$OUT/trajectories-warmup/predictions.jsonl" --top-k 3 --max-searches 3 \
        --batch-tokens 1536 --out "$OUT/warmup" --lr 2e-4 --batch-size 4 --seed "$SEED" --overwrite
}

policy() {
    $PY train_rl.py train --data $WORLD/train.jsonl --model "$OUT/warmup/model" --out "$OUT/policy" \
        --simulator "$OUT/simulator/model" --simulator-max-tokens 160 --algorithm grpo --lr 1e-5 \
        --kl-coef 0.001 --p-end 0.15 --steps $STEPS --prompts-per-step $PROMPTS \
        --rollouts $ROLLOUTS --batch-tokens 1536 $LIMITS --generator "$GENERATOR" \
        --eval-every 2 --eval-data $WORLD/dev.jsonl --eval-engine bm25 --eval-limit $HELD_OUT \
        --seed "$SEED" --overwrite
}

test_set() { # looked at once
    $PY evaluate.py run --method direct --model smollm2 --engine none $TEST --out "$OUT/direct"
    $PY evaluate.py run --method rag --model smollm2 $TEST --out "$OUT/rag"
    $PY evaluate.py run --model "$OUT/warmup/model" $TEST --out "$OUT/before-rl"
    $PY evaluate.py run --model "$OUT/policy/model" $TEST --out "$OUT/after-rl"
    $PY evaluate.py compare "$OUT/before-rl" "$OUT/after-rl"
}

bill() {
    $PY costs.py paper
    $PY costs.py run "$OUT"/{simulator,warmup,policy}
}

report() {
    $PY evaluate.py report "$OUT"/{simulator,warmup,policy} "$OUT"/{direct,rag,before-rl,after-rl} --out "$OUT"
}

mkdir -p "$OUT"
rm -f "$OUT/seconds.txt"
stage trajectories trajectories
stage simulator simulator
stage probe probe
stage warm-up warmup
stage policy policy
stage test test_set
stage costs bill
stage report report
echo; echo "report: $OUT/report.md"
