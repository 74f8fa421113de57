#!/usr/bin/env bash
# Six methods on the same real questions of the seven benchmarks, with the embedded model:
#   run.sh FOLDER [QUESTIONS]     FOLDER holds NAME.jsonl of each and passages.jsonl.gz (title, text)
# A killed run goes on where it was. README.md beside this script is what page.sh prints at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."

QA_DATA=${1:?usage: results/benchmarks/run.sh FOLDER [QUESTIONS]} QUESTIONS=${2:-30}
PY=${PY:-.venv/bin/python} OUT=${OUT:-runs/benchmarks} SEED=${SEED:-0}
NAMES="nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle"
METHODS="direct cot rag ra-agent search-o1 agent"

for method in $METHODS; do
    begun=$([ -f "$OUT/$method/nq/config.json" ] && echo --resume || echo --overwrite)
    $PY evaluate.py run --method "$method" --model smollm2 --benchmark all --data "$QA_DATA" \
        --limit "$QUESTIONS" --engine bm25 --corpus "$QA_DATA/passages.jsonl.gz" --top-k 2 \
        --max-searches 2 --tokens-per-turn 32 --context-tokens 1024 --observation-tokens 128 \
        --generator hf --batch-size 30 --seed "$SEED" --out "$OUT/$method" $begun
done

results/benchmarks/page.sh "$OUT" "$QUESTIONS"
