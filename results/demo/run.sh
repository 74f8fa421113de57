#!/usr/bin/env bash
# The demo: every stage of the method on the embedded model, on a CPU. `make demo` and `make demo-quick` call it.
#   results/demo/run.sh         everything, into runs/demo; the report in runs/demo/report.md
#   results/demo/run.sh quick   the same stages on less, in minutes, into runs/demo-quick
#   results/demo/run.sh seeds   after the demo: RL and its test with seeds 1 and 2; the report anew
#   results/demo/run.sh starts  after the demo: warm starts with seeds 1 and 2, RL from each, tests (starts.md)
#   results/demo/run.sh more    after the demo: imitation of all trajectories instead of RL, and its test
set -euo pipefail
cd "$(dirname "$0")/../.."

PY=${PY:-.venv/bin/python}
SEED=${SEED:-0}
GENERATOR=${GENERATOR:-auto}
WORLD=data/world

# The budget. Three numbers: questions of one, two and three hops.
OUT=${DEMO:-runs/demo} TRAJECTORIES="240 240 120" PROBES=640 WARMUP="128 128 64"
STEPS=16 PROMPTS=16 ROLLOUTS=4 MINI_BATCH=32 HELD_OUT=128 QUESTIONS=300
if [ "${1:-}" = quick ]; then
    OUT=${DEMO:-runs/demo-quick} TRAJECTORIES="6 6 3" PROBES=32 WARMUP="16 14 2"
    STEPS=2 PROMPTS=2 ROLLOUTS=2 MINI_BATCH=4 HELD_OUT=8 QUESTIONS=16
fi
LIMITS="--top-k 3 --max-searches 3 --tokens-per-turn 64 --context-tokens 1024 --observation-tokens 200"
TEST="--benchmark world --corpus $WORLD/passages.jsonl --limit $QUESTIONS $LIMITS
      --generator $GENERATOR --overwrite"

# Waiting threads sleep: a second process on the same cores then costs its share, not a standstill.
# They first wait awake for some 30 us, a tenth faster (GOMP_SPINCOUNT=0 if other work runs beside).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1

stage() { # NAME FUNCTION ARGUMENTS: run it, print and keep its seconds
    echo; echo "== $1"; local start=$SECONDS
    "${@:2}"
    echo "$1: $((SECONDS - start)) s" | tee -a "$OUT/seconds.txt"
}

trajectories() { # scripted ones: this model is too small to be prompted into an agent
    $PY data/scripted.py --top-k 3 --hops $WARMUP --out "$OUT/trajectories-warmup" --overwrite
    $PY data/scripted.py --top-k 3 --hops $TRAJECTORIES --skip $WARMUP --out "$OUT/trajectories" --overwrite
    $PY data/scripted.py --top-k 3 --split dev --hops 96 96 48 --out "$OUT/trajectories-dev" --overwrite
    $PY sft_simulator.py label "$OUT"/trajectories/{predictions,hasty}.jsonl --top-k 3 \
        --out "$OUT/pairs.jsonl" --overwrite
    $PY sft_simulator.py label "$OUT"/trajectories-dev/{predictions,hasty}.jsonl --top-k 3 \
        --limit $PROBES --out "$OUT/pairs-dev.jsonl" --overwrite
}

simulator() {
    $PY sft_simulator.py train "$OUT/pairs.jsonl" --out "$OUT/simulator" --lr 3e-4 --batch-size 4 \
        --words 12 --temperature 0.5 --seed "$SEED" --overwrite
}

probe() {
    $PY sft_simulator.py probe "$OUT/pairs-dev.jsonl" --simulator "$OUT/simulator/model" \
        --simulator-max-tokens 160 --generator "$GENERATOR" --out "$OUT/simulator/probe.json"
}

warmup() { # TRAJECTORIES NAME [SEED]
    $PY train_rl.py warmup "$OUT/$1" --top-k 3 --max-searches 3 \
        --observation-tokens 200 --batch-tokens 1536 --out "$OUT/$2" --lr 1e-4 --batch-size 2 --seed "${3:-$SEED}" --overwrite
}

policy() { # NAME SEED [START]; on the questions that the simulator was tuned on: it knows no other facts
    $PY train_rl.py train --data "$OUT/trajectories/predictions.jsonl" --model "$OUT/${3:-warmup}/model" \
        --out "$OUT/$1" --simulator "$OUT/simulator/model" --simulator-max-tokens 160 \
        --algorithm grpo --lr 1e-5 --warmup-ratio 0.125 --kl-coef 0 --temperature 0.7 --p-end 0.2 \
        --steps $STEPS --prompts-per-step $PROMPTS --rollouts $ROLLOUTS --batch-tokens 1536 \
        --mini-batch-size $MINI_BATCH $LIMITS --generator "$GENERATOR" --eval-every 4 \
        --eval-data $WORLD/dev.jsonl --eval-engine bm25 --eval-limit $HELD_OUT --seed "$2" \
        --overwrite
}

test_set() { # looked at once
    $PY evaluate.py run --method direct --model smollm2 --engine none $TEST --out "$OUT/direct"
    $PY evaluate.py run --method rag --model smollm2 $TEST --out "$OUT/rag"
    $PY evaluate.py run --model "$OUT/warmup/model" $TEST --out "$OUT/before-rl"
    test_policy policy after-rl
}

test_policy() { # POLICY NAME [BEFORE]
    $PY evaluate.py run --model "$OUT/$1/model" $TEST --out "$OUT/$2"
    $PY evaluate.py compare "$OUT/${3:-before-rl}" "$OUT/$2"
}

test_start() { # SEED: before and after RL
    $PY evaluate.py run --model "$OUT/start-$1/model" $TEST --out "$OUT/start-$1-before"
    test_policy "start-$1-policy" "start-$1-after" "start-$1-before"
}

more_imitation() { # also of the questions that RL asks
    cat "$OUT"/trajectories-warmup/predictions.jsonl "$OUT"/trajectories/predictions.jsonl \
        > "$OUT/trajectories-all.jsonl"
    warmup trajectories-all.jsonl warmup-all
    test_policy warmup-all more-imitation
}

bill() {
    $PY costs.py paper
    $PY costs.py run "$OUT"/{simulator,warmup,policy}
}

report() { # of the other seeds, too, as far as they have been run
    $PY evaluate.py report "$OUT"/{simulator,warmup} $(ls -d "$OUT"/policy*) \
        "$OUT"/{direct,rag,before-rl} $(ls -d "$OUT"/after-rl*) --out "$OUT"
}

mkdir -p "$OUT"
if [ "${1:-}" = seeds ]; then
    for seed in 1 2; do
        stage "policy, seed $seed" policy "policy-$seed" "$seed"
        stage "test, seed $seed" test_policy "policy-$seed" "after-rl-$seed"
    done
    report
    exit
fi
if [ "${1:-}" = starts ]; then
    for seed in 1 2; do
        stage "warm-up, seed $seed" warmup trajectories-warmup/predictions.jsonl "start-$seed" "$seed"
        stage "policy from it" policy "start-$seed-policy" "$SEED" "start-$seed"
        stage "its test" test_start "$seed"
    done
    exit
fi
if [ "${1:-}" = more ]; then
    stage "more imitation" more_imitation
    exit
fi
rm -f "$OUT/seconds.txt"
stage trajectories trajectories
stage simulator simulator
stage probe probe
stage warm-up warmup trajectories-warmup/predictions.jsonl warmup
stage policy policy policy "$SEED"
stage test test_set
stage costs bill
stage report report
echo; echo "report: $OUT/report.md"
