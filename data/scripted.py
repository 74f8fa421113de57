"""A scripted searcher for the demo's world: it knows each question's decomposition and asks BM25.

The embedded model is too small to be prompted into an agent, so the demo's first trajectories are
written by this script; for larger models `evaluate.py run --method agent` takes its place. The file
has the same format: each line is a question with its turns. Documents from deeper ranks are kept
too: `sft_simulator.py label` finds the noisy twin of a query among them.

hasty.jsonl holds searches that skip a hop ("calling code of Bangkok"), to which a real engine
answers with the hop ("Bangkok is the capital of Thailand"). A simulator that has not seen them
gives the final answer away, for it knows it, and the policy learns to skip.

    python data/scripted.py --split train --hops 320 320 160 --out runs/demo/trajectories
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.append(str(Path(__file__).resolve().parents[1]))
from plumbing.cli import UserError, command, console, make_app, option, run_cli
from plumbing.engines import BM25Engine, SearchRequest
from plumbing.files import read_jsonl, read_questions, write_jsonl
from plumbing.runfolder import FolderSettings, RunFolder
from plumbing.text import ROOT, contains_answer

app = make_app(__doc__)
DEPTH = 20  # ranks kept: enough to find documents on the topic that lack the answer
HASTY = 3  # one in so many questions of several hops is also asked in haste


def think(found: str | None, left: int) -> str:
    """What the last search brought, and how many are left. The count makes the plan a word that
    RL can change; without it, "It is Lima." would stand before a search and before an answer."""
    need = {0: "no more", 1: "1 search"}.get(left, f"{left} searches")
    return f"<think> {f'It is {found}. ' if found else ''}I need {need}. </think>"


def search_turn(query: str, target: list[str], documents: list[str],
                found: str | None, left: int) -> dict[str, Any]:
    """One turn that searches; `left` counts this search and those after it."""
    text = f"{think(found, left)}\n<search> {query} </search>"
    return {"text": text, "action": "search", "query": query, "target": target,
            "documents": documents}


def answer_turn(answer: str) -> dict[str, Any]:
    return {"text": f"{think(answer, 0)}\n<answer> {answer} </answer>", "action": "answer"}


def play(question: dict[str, Any], steps: list[dict[str, Any]], engine: BM25Engine,
         top_k: int) -> dict[str, Any] | None:
    """A question's trajectory; None where the first `top_k` documents lack a step's answer."""
    results = engine.search([SearchRequest(step["query"]) for step in steps])
    turns, found = [], None
    for number, (step, result) in enumerate(zip(steps, results, strict=True)):
        target = step["golden_answers"]
        if not contains_answer("\n".join(result.documents[:top_k]), target):
            return None
        left = len(steps) - number
        turns.append(search_turn(step["query"], target, result.documents, found, left))
        found = target[0]
    return question | {"answer": found, "turns": [*turns, answer_turn(found)]}


def ask_hastily(question: dict[str, Any], decomposition: dict[str, Any],
                engine: BM25Engine) -> dict[str, Any]:
    """One search for the question's end that skips the hop before it. Its target is that hop."""
    *before, skipped, last = decomposition["steps"]
    target = skipped["golden_answers"]
    known = before[-1]["golden_answers"][0] if before else decomposition["subject"]
    query = last["query"].replace(target[0], known)
    (result,) = engine.search([SearchRequest(query)])
    turn = search_turn(query, target, result.documents, None, 1)
    return question | {"answer": None, "turns": [turn]}


@dataclass(frozen=True, kw_only=True)
class ScriptSettings(FolderSettings):
    resume: ClassVar[bool] = False  # it takes seconds

    out: Path = option(help="Run folder; the files are predictions.jsonl and hasty.jsonl.")
    split: str = option("train", "Which questions.", choices=("train", "dev"))
    hops: tuple[int, int, int] = option((320, 320, 160), "Questions of one, two and three hops.")
    skip: tuple[int, int, int] = option((0, 0, 0), "How many of each kind come before them.")
    top_k: int = option(3, "Documents that the searcher reads.", low=1)

    def check(self) -> None:
        super().check()
        for name, counts in (("hops", self.hops), ("skip", self.skip)):
            if min(counts) < 0:
                raise UserError(f"--{name} takes three numbers of questions, none below 0: "
                                f"not {' '.join(map(str, counts))}")


@command(app, ScriptSettings)
def main(s: ScriptSettings) -> None:
    """Write trajectories that search, read and answer rightly."""
    world = ROOT / "data" / "world"
    with RunFolder(s, {}) as folder:
        folder.open()
        write_trajectories(s, world)


def write_trajectories(s: ScriptSettings, world: Path) -> None:
    fields = ("id", "subject", "steps")
    decomposed = {row["id"]: row for row in read_jsonl(world / "decompositions.jsonl", fields)}
    engine = BM25Engine(world / "passages.jsonl", DEPTH)
    rows, questions = read_questions(world / f"{s.split}.jsonl"), []
    for number, (count, skip) in enumerate(zip(s.hops, s.skip), start=1):
        questions += [row for row in rows if row["hops"] == number][skip : skip + count]
    played = [play(q, decomposed[q["id"]]["steps"], engine, s.top_k) for q in questions]
    if not (records := [record for record in played if record]):
        raise UserError(f"no question of {s.split} could be answered with {s.top_k} documents "
                        "a search")
    write_jsonl(s.out / "predictions.jsonl", records)
    multi_hop = [q for q in questions if q["hops"] > 1]
    write_jsonl(s.out / "hasty.jsonl",
                [ask_hastily(q, decomposed[q["id"]], engine) for q in multi_hop[::HASTY]])
    console.print(f"{s.out / 'predictions.jsonl'}: {len(records)} trajectories of "
                  f"{len(questions)} questions")


if __name__ == "__main__":
    run_cli(app)
