"""A scripted searcher for the demo's world: it knows each question's decomposition and asks a real engine.

The embedded model is too small to be prompted into an agent, so the demo's first trajectories are written by this
script; for larger models `evaluate.py run --method agent` takes its place. The file has the same format: each
line is a question with its turns. Documents from deeper ranks are kept too: `sft_simulator.py label` finds the noisy
twin of a query among them.

hasty.jsonl holds searches that skip a hop ("calling code of Bangkok"), to which a real engine answers with the hop
("Bangkok is the capital of Thailand"). A simulator that has not seen them gives the final answer away, for it knows it,
and the policy learns to skip.

    python data/scripted.py --split train --hops 320 320 160 --out runs/demo/trajectories
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sft_simulator import (  # noqa: E402
    ROOT,
    BM25Engine,
    Overwrite,
    SearchRequest,
    UserError,
    console,
    contains_answer,
    open_run,
    read_jsonl,
    read_questions,
    run_cli,
    write_jsonl,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEPTH = 20  # ranks kept: enough to find documents on the topic that lack the answer
HASTY = 3  # one in so many questions of several hops is also asked in haste


def search_turn(query: str, target: list[str], documents: list[str], found: str | None) -> dict[str, Any]:
    """One turn that searches. `found` is what the turn before brought."""
    thought = f"It is {found}." if found else "I need to search."
    text = f"<think> {thought} </think>\n<search> {query} </search>"
    return {"text": text, "action": "search", "query": query, "target": target, "documents": documents}


def answer_turn(answer: str) -> dict[str, Any]:
    return {"text": f"<think> It is {answer}. </think>\n<answer> {answer} </answer>", "action": "answer"}


def play(question: dict[str, Any], steps: list[dict[str, Any]], engine: BM25Engine, top_k: int) -> dict[str, Any] | None:
    """The trajectory of one question, or None where the engine's first `top_k` documents lack a step's answer."""
    results = engine.search([SearchRequest(step["query"]) for step in steps])
    turns, found = [], None
    for step, result in zip(steps, results, strict=True):
        if not contains_answer("\n".join(result.documents[:top_k]), step["golden_answers"]):
            return None
        turns.append(search_turn(step["query"], step["golden_answers"], result.documents, found))
        found = step["golden_answers"][0]
    return question | {"answer": found, "turns": [*turns, answer_turn(found)]}


def ask_hastily(question: dict[str, Any], decomposition: dict[str, Any], engine: BM25Engine) -> dict[str, Any]:
    """A trajectory of one search, for the question's end, that skips the hop before it. Its target is that hop."""
    *before, skipped, last = decomposition["steps"]
    known = before[-1]["golden_answers"][0] if before else decomposition["subject"]
    query = last["query"].replace(skipped["golden_answers"][0], known)
    (result,) = engine.search([SearchRequest(query)])
    return question | {"answer": None, "turns": [search_turn(query, skipped["golden_answers"], result.documents, None)]}


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Run folder; trajectories go to OUT/predictions.jsonl, OUT/hasty.jsonl.")],
    split: Annotated[Literal["train", "dev"], typer.Option(help="Which questions.")] = "train",
    hops: Annotated[tuple[int, int, int], typer.Option(help="Questions of one, two and three hops.")] = (320, 320, 160),
    top_k: Annotated[int, typer.Option(help="Documents that the searcher reads.")] = 3,
    overwrite: Overwrite = False,
) -> None:
    """Write trajectories that search, read and answer rightly."""
    if min(hops) < 0:
        raise UserError(f"--hops takes three numbers of questions, none below 0: not {' '.join(map(str, hops))}")
    world = ROOT / "data" / "world"
    open_run(out, locals(), overwrite)
    decomposed = {row["id"]: row for row in read_jsonl(world / "decompositions.jsonl", ("id", "subject", "steps"))}
    engine = BM25Engine(world / "passages.jsonl", DEPTH)
    rows, questions = read_questions(world / f"{split}.jsonl"), []
    for number, count in enumerate(hops, start=1):
        questions += [row for row in rows if row["hops"] == number][:count]
    records = [record for q in questions if (record := play(q, decomposed[q["id"]]["steps"], engine, top_k))]
    if not records:
        raise UserError(f"no question of {split} could be answered with {top_k} documents a search")
    write_jsonl(out / "predictions.jsonl", records)
    multi_hop = [q for q in questions if q["hops"] > 1]
    write_jsonl(out / "hasty.jsonl", [ask_hastily(q, decomposed[q["id"]], engine) for q in multi_hop[::HASTY]])
    console.print(f"{out / 'predictions.jsonl'}: {len(records)} trajectories of {len(questions)} questions")


if __name__ == "__main__":
    run_cli(app)
