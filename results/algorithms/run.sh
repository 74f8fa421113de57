#!/usr/bin/env bash
# The four algorithms on one budget, from the demo's simulator and warm start (`make demo` first).
# Prints the table of README.md beside this script.
set -euo pipefail
cd "$(dirname "$0")/../.."

PY=${PY:-.venv/bin/python} DEMO=${DEMO:-runs/demo} OUT=${OUT:-runs/algorithms} SEED=${SEED:-0}
ALGORITHMS="reinforce grpo ppo reinforce++" STEPS=4 PROMPTS=4 ROLLOUTS=8 QUESTIONS=100
LIMITS="--top-k 3 --max-searches 3 --tokens-per-turn 64 --context-tokens 1024 --observation-tokens 200
        --seed $SEED --overwrite"

try() { # MODEL FOLDER: dev questions with the real engine
    $PY evaluate.py run --model "$1" --data data/world/dev.jsonl --limit $QUESTIONS $LIMITS --out "$2"
}

try "$DEMO/warmup/model" "$OUT/start/dev"
for algorithm in $ALGORITHMS; do
    $PY train_rl.py train --algorithm "$algorithm" --data data/world/train.jsonl \
        --model "$DEMO/warmup/model" --simulator "$DEMO/simulator/model" --simulator-max-tokens 160 \
        --lr 1e-5 --p-end 0.15 --steps $STEPS --prompts-per-step $PROMPTS --rollouts $ROLLOUTS \
        --batch-tokens 1536 $LIMITS --out "$OUT/$algorithm/train"
    try "$OUT/$algorithm/train/model" "$OUT/$algorithm/dev"
done
printf "$OUT/%s " start $ALGORITHMS | xargs $PY results/algorithms/table.py
