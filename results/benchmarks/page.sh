#!/usr/bin/env bash
# The page of a finished run.sh: page.sh OUT [QUESTIONS] > results/benchmarks/README.md
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${1:?usage: results/benchmarks/page.sh OUT [QUESTIONS]} QUESTIONS=${2:-30} PY=${PY:-.venv/bin/python}
NAMES="nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle"
METHODS=${METHODS:-direct cot rag ra-agent search-o1 agent}

runs() { # scored anew, from the predictions
    for method in $1; do for name in $NAMES; do
        echo "$method/$name=$OUT/$method/$name/predictions.jsonl"
    done; done
}

commits=$(sed -n 's/.*"commit": "\(.\{7\}\).*/\1/p' "$OUT"/*/*/config.json | sort -u | paste -sd,)
cat <<END
# Six methods on the seven benchmarks

Made by \`results/benchmarks/run.sh FOLDER\` at commit $commits: the same $QUESTIONS questions of each benchmark for every method, drawn with one seed from
FOLDER's 500 (Bamboogle: 125), BM25 over FOLDER's 74,002 Wikipedia paragraphs, greedy, one model for all: the embedded SmolLM2-135M-Instruct. Nothing is
trained here: \`agent\` is this model under the policy's template, which a model of this size follows badly. Budgets are small (2 searches of 2 documents, 128
tokens read of each search, 32 tokens a turn), so that it fits a CPU. The paper has no model of this size, and searches all of Wikipedia: its rows, of its
smallest Qwen, stand here for the shape of the table. ra-agent is ReAct; search-o1 condenses what it reads; recall leaves out
yes-no questions.

END
$PY evaluate.py table $(runs "$METHODS") --paper-model Qwen-2.5-3B --markdown
printf '\n## Substring match (cover_em)\n\n'
$PY evaluate.py table $(runs "$METHODS") --paper-model Qwen-2.5-3B --metric cover_em --markdown | grep '^|'
if [[ $METHODS == *rag* ]]; then
    printf '\n## Recall: a document that was returned holds an answer\n\n'
    $PY evaluate.py table $(runs rag) --metric recall --markdown | grep '^|'
    for method in direct rag; do # ids are unique within a benchmark alone: its name goes before each
        for name in $NAMES; do
            sed "s/^{\"id\": \"/&$name-/" "$OUT/$method/$name/predictions.jsonl"
        done > "$OUT/$method.jsonl"
    done
    printf '\n## RAG beside direct answering, question by question\n\n```\n'
    $PY evaluate.py compare "$OUT/direct.jsonl" "$OUT/rag.jsonl" | sed "s#$OUT/##; s/ *$//"
    printf '```\n'
fi
