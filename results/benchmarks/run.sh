#!/usr/bin/env bash
# Six methods on real rows of the seven benchmarks: run.sh FOLDER, which holds NAME.jsonl of each and
# passages.jsonl.gz (title, text). What is there is not run again. The policy of `agent` is the
# demo's warm-started one (`make demo` first). Prints the tables of README.md beside this script.
set -euo pipefail
cd "$(dirname "$0")/../.."

QA_DATA=${1:?usage: results/benchmarks/run.sh FOLDER}
PY=${PY:-.venv/bin/python} DEMO=${DEMO:-runs/demo} OUT=${OUT:-runs/benchmarks} SEED=${SEED:-0}
NAMES="nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle"
METHODS="direct cot rag ra-agent search-o1 agent"
EACH=8 EACH_CHEAP=50 # questions of a benchmark; the second for direct and rag
LIMITS="--top-k 3 --max-searches 2 --tokens-per-turn 64 --context-tokens 1280 --observation-tokens 400"

mkdir -p "$OUT"
[ -f "$OUT/passages.jsonl" ] || gzip -dc "$QA_DATA/passages.jsonl.gz" > "$OUT/passages.jsonl"
for method in $METHODS; do
    model=smollm2 each=$EACH
    [ "$method" = agent ] && model=$DEMO/warmup/model
    case $method in direct | rag) each=$EACH_CHEAP ;; esac
    for name in $NAMES; do
        [ -f "$OUT/$method/$name/results.json" ] ||
            $PY evaluate.py run --method "$method" --data "$QA_DATA/$name.jsonl" --limit $each \
                --corpus "$OUT/passages.jsonl" --model "$model" $LIMITS --seed "$SEED" --overwrite \
                --out "$OUT/$method/$name"
    done
done

folders=()
for method in $METHODS; do for name in $NAMES; do folders+=("$OUT/$method/$name"); done; done
$PY evaluate.py table "${folders[@]}" --paper-model Qwen-2.5-3B --markdown
for method in direct rag; do # ids are unique within a benchmark alone: its name goes before each
    for name in $NAMES; do
        sed "s/^{\"id\": \"/&$name-/" "$OUT/$method/$name/predictions.jsonl"
    done > "$OUT/$method.jsonl"
done
$PY evaluate.py compare "$OUT/direct.jsonl" "$OUT/rag.jsonl"
