"""Recorded episodes, for people to read: as text, which ones to show, what a simulator wrote.

A record is a line of episodes.jsonl or predictions.jsonl (train_rl.Episode)."""

from pathlib import Path
from typing import Any

from plumbing.files import read_jsonl
from plumbing.text import clean, exact_match

Record = dict[str, Any]


def readable(text: str) -> list[str]:
    """The lines of a text without control characters, escape sequences and Markdown's fences."""
    return [clean(line).replace("```", "'''") for line in text.splitlines() if line.strip()]


def numbered(documents: list[str]) -> list[str]:
    return [f"    {number}. {' '.join(readable(text))}" for number, text in enumerate(documents, 1)]


def episode_text(record: Record) -> str:
    """An episode as lines: question, what the policy wrote, documents indented, and the outcome."""
    lines = readable(f"Question: {record['question']}")
    for turn in record.get("turns", []):
        lines += readable(turn["text"])
        if turn.get("documents"):
            lines += ["  noisy documents:"] * (turn.get("quality") == "noisy")
            lines += numbered(turn["documents"])
        elif turn.get("query"):
            lines.append("  no documents")
    answer = record.get("answer")
    given = "no answer" if answer is None else f"answered {' '.join(readable(answer))!r}"
    verdict = "right" if is_right(record) else "wrong"
    golden = " or ".join(readable(" ".join(record["golden_answers"][:1])))
    return "\n".join([*lines, f"=> {given}: {verdict} (golden answer: {golden})"])


def read_episodes(path: Path) -> list[Record]:
    """Episodes of a training run, predictions of an evaluation, or a file of either (those of
    another program may lack the turns)."""
    files = [path / name for name in ("episodes.jsonl", "predictions.jsonl")]
    file = next((file for file in files if file.exists()), path)
    return read_jsonl(file, ("id", "question", "golden_answers"))


def is_right(record: Record) -> bool:
    return exact_match(record.get("answer"), record["golden_answers"]) == 1


def value(record: Record) -> float:
    """What an episode was worth: its reward in training, its F1 in an evaluation, else 0 or 1."""
    scores = record.get("scores") or {}
    return record.get("reward") or scores.get("f1", float(is_right(record)))


def select(records: list[Record], *, id: str | None = None, step: int | None = None,
           worst: bool = False) -> list[Record]:
    """The records of a question, of a step; in the file's order, or those of least value first."""
    found = [r for r in records if (id is None or str(r["id"]) == id)
             and (step is None or r.get("step") == step)]
    return sorted(found, key=value) if worst else found


def changed(before: list[Record], after: list[Record]) -> list[tuple[Record, Record]]:
    """The episodes of each question that both runs have and score differently: losses first."""
    later = {str(record["id"]): record for record in after}
    pairs = [(record, later[str(record["id"])]) for record in before if str(record["id"]) in later]
    pairs = [pair for pair in pairs if value(pair[0]) != value(pair[1])]
    return sorted(pairs, key=lambda pair: value(pair[1]) - value(pair[0]))


def telling_pairs(before: list[Record], after: list[Record]) -> dict[str, tuple[Record, Record]]:
    """Three questions for a page: one that turned right (of the most hops), one that stayed right
    and one that is wrong after all. The first of each kind; a kind without any is left out."""
    later = {str(record["id"]): record for record in after}
    pairs = [(record, later[str(record["id"])]) for record in before if str(record["id"]) in later]
    pairs.sort(key=lambda pair: -(pair[0].get("hops") or 0))
    kinds = {(False, True): "Turned right", (True, True): "Right before and after",
             (True, False): "Turned wrong", (False, False): "Wrong before and after"}
    first: dict[str, tuple[Record, Record]] = {}
    for pair in pairs:
        first.setdefault(kinds[is_right(pair[0]), is_right(pair[1])], pair)
    wanted = ["Turned right", "Right before and after",
              "Turned wrong" if "Turned wrong" in first else "Wrong before and after"]
    return {kind: first[kind] for kind in wanted if kind in first}


def simulated_samples(records: list[Record], each: int = 2) -> dict[str, list[str]]:
    """By quality, what a simulator wrote for the first queries, one of each question, as text."""
    samples: dict[str, list[str]] = {"useful": [], "noisy": []}
    seen: set[tuple[str, str]] = set()
    for record in records:
        for turn in record.get("turns", []):
            kind = turn.get("quality")
            if not turn.get("documents") or len(samples[kind]) == each or (
                    kind, record["id"]) in seen:
                continue
            seen.add((kind, record["id"]))
            head = readable(f"Query: {turn['query']} (question: {record['question']} "
                            f"answer: {record['golden_answers'][0]})")
            samples[kind].append("\n".join([*head, *numbered(turn["documents"])]))
    return samples
