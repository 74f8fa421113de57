"""Files to read: predictions, other frameworks' too; results of evaluations; the paper's rows;
counters of training runs."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plumbing.cli import UserError
from plumbing.files import (check_fields, check_golden, check_is_file, parse_json, parse_row,
                            read_jsonl, without)
from plumbing.text import ROOT

Row = dict[str, Any]

# ---------------------------------------------------------------- predictions


def read_predictions(path: Path, *fields: str) -> list[Row]:
    """Predictions as rows with `question, golden_answers, answer`, but for failed searches.

    path: JSONL of such rows (this kit's records are); FlashRAG's intermediate_data.json; or verl's
    JSONL of generations, which Search-R1's trainer is built on. A run folder of this kit or of
    FlashRAG stands for the file in it. Rows of one id are samples of one question if they differ in
    `sample`. Raises UserError; names rows without a golden answer, which are skipped."""
    if path.is_dir():
        names = ("predictions.jsonl", "intermediate_data.json")
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    raw = read_items(path) if path.suffix == ".json" else read_jsonl(path)
    rows, skipped = [], []
    for number, item in enumerate(raw, start=1):
        where = f"{path}:{number}"
        rows.append(row := as_prediction(item, where))
        check_fields(row, where, ("golden_answers", "answer", *fields), texts=("question",))
        check_golden(row, where)
        if not isinstance(row["answer"], str | None):
            raise UserError(f"{where}: answer must be a text or null")
        if not row["golden_answers"]:
            skipped.append((number, row))
    check_ids(rows, path)
    rows = without(path, rows, skipped, "no golden answer")
    if not (answered := [row for row in rows if row.get("end") != "failed"]):
        raise UserError(f"{path}: every search failed, nothing can be scored")
    return answered


def read_trajectories(path: Path, *fields: str) -> list[Row]:
    """Recorded episodes: question, golden_answers, turns with texts, queries and documents. Raises
    UserError."""
    rows = read_jsonl(path, ("golden_answers", "turns", *fields), texts=("question",))
    for number, row in enumerate(rows, start=1):
        check_golden(row, f"{path}:{number}")
        turns = row["turns"]
        if not (isinstance(turns, list) and all(map(is_turn, turns))):
            raise UserError(f"{path}:{number}: turns must be a list of objects with a text, and "
                            "maybe a query and its documents, a list of texts")
        for turn in turns:
            turn["documents"] = turn.get("documents") or []
    return rows


def is_turn(turn: Any) -> bool:
    """Whether a turn of a record has the fields of train_rl.Turn, as far as they are read again."""
    if not isinstance(turn, dict):
        return False
    documents, query = turn.get("documents") or [], turn.get("query")
    return (isinstance(turn.get("text"), str) and isinstance(query, str | None)
            and isinstance(documents, list) and all(isinstance(d, str) for d in documents))


def read_paired(a: Path, b: Path) -> tuple[list[Row], list[Row]]:
    """Two files of predictions that answer the same questions under the same ids. Raises UserError,
    with the first difference: row numbers are ids too, and those of two benchmarks look alike."""
    both = read_predictions(a, "id"), read_predictions(b, "id")
    of_a, of_b = ({str(row["id"]): row for row in rows} for rows in both)
    if alone := sorted(of_a.keys() ^ of_b.keys()):
        raise UserError(f"{a} and {b} answer different questions: {len(alone)} ids are in one "
                        f"only, such as {alone[0]}")
    for name, row in of_a.items():
        for field, form in (("question", str), ("golden_answers", set)):
            ours, theirs = row[field], of_b[name][field]
            if form(ours) != form(theirs):
                raise UserError(f"{a} and {b} answer different questions: {field} of id {name} is "
                                f"{ours!r} in one, {theirs!r} in the other")
    return both


def read_items(path: Path) -> list[Row]:
    """Objects of a file that holds one JSON list. Raises UserError."""
    check_is_file(path)
    items = parse_json(path.read_bytes(), str(path))
    if not (isinstance(items, list) and items and all(isinstance(item, dict) for item in items)):
        raise UserError(f"{path}: not a JSON list of objects (one object a line: .jsonl)")
    return items


def check_ids(rows: list[Row], path: Path) -> None:
    """Raises UserError if an id occurs twice, but for other samples of the same question."""
    questions, samples = {}, set()
    for number, row in enumerate(rows, start=1):
        if (name := row.get("id")) is None:
            continue
        asked = (row["question"], row["golden_answers"])
        sample = (str(name), str(row.get("sample")))
        if sample in samples or questions.setdefault(str(name), asked) != asked:
            raise UserError(f"{path}:{number}: id {name} occurs twice")
        samples.add(sample)


def as_prediction(item: Row, where: str) -> Row:
    """A row of another framework in this kit's schema; one of this kit's as it is."""
    output = item.get("output")
    if isinstance(output, dict) and "pred" in output:
        return item | {"answer": output["pred"], "turns": flashrag_turns(output)}
    if isinstance(output, str) and isinstance(item.get("input"), str) and "gts" in item:
        question = asked_question(item["input"])
        return {"id": item.get("id", question), "question": question,
                "golden_answers": golden_texts(item["gts"]), "answer": last_answer(output),
                "turns": [{"documents": INFORMATION.findall(output)}]}
    return item


INFORMATION = re.compile(r"<information>(.*?)</information>", re.DOTALL)  # Search-R1's template


def flashrag_turns(output: Row) -> list[Row]:
    """What was read: retrieved passages, or what stands in the response of a search agent."""
    found = output.get("retrieval_result")
    if not isinstance(found, list):
        response = output.get("final_response")
        return [{"documents": INFORMATION.findall(response if isinstance(response, str) else "")}]
    return [{"documents": [p.get("contents") for p in found if isinstance(p, dict)]}]


def asked_question(prompt: str) -> str:
    """The question at the end of Search-R1's prompt; without its cue the whole prompt."""
    asked = prompt.rpartition("Question:")[2].strip()
    return asked.partition("<|im_end|>")[0].partition("\n")[0].strip()


def golden_texts(gts: Any) -> Any:
    """Golden answers of verl's `gts`: {"target": [...]}, a list or one text."""
    golden = gts.get("target") if isinstance(gts, dict) else gts
    return [golden] if isinstance(golden, str) else golden


def last_answer(response: str) -> str | None:
    answers = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return answers[-1].strip() if answers else None


def documents_read(record: Row) -> list[str]:
    """The documents that a record's searches returned."""
    turns = record.get("turns")
    found = [turn.get("documents") for turn in turns if isinstance(turn, dict)] if isinstance(
        turns, list) else []
    return [text for documents in found if isinstance(documents, list)
            for text in documents if isinstance(text, str)]


# ---------------------------------------------------------------- results, the paper's rows

PROMPTED = {"direct": "Direct Answer", "cot": "CoT", "rag": "RAG", "ra-agent": "RA-Agent",
            "search-o1": "Search-o1"}  # rows of table 3


def read_results(run_dir: Path) -> Row:
    """results.json of an evaluation. Raises UserError where it isn't one."""
    path = run_dir / "results.json"
    text = path.read_bytes() if path.is_file() else b""
    results = parse_row(text, f"{path}: not the results of an evaluation")
    needed = {"benchmark": str, "method": str, "model": str, "engine": str, "n": int,
              "metrics": dict}
    for name, kind in needed.items():
        if not isinstance(results.get(name), kind):
            raise UserError(f"{path}: not the results of an evaluation: no valid {name}")
    for name, m in results["metrics"].items():
        if not (isinstance(m, dict) and {"mean", "low", "high"} <= m.keys()):
            raise UserError(f"{path}: metric {name} needs mean, low and high")
    return results


def paper_rows() -> dict[str, dict[str, float]]:
    """Rows of the paper's tables 3 to 7: "table3/Qwen-2.5-3B/RAG" -> EM in percent by benchmark."""
    published = json.loads((ROOT / "data" / "paper.json").read_text(encoding="utf-8"))
    rows = {f"table3/{model}/{row}": figures for model, rows in published["table3_main"].items()
            for row, figures in rows.items()}
    rows |= {f"table4/{row}": figures
             for row, figures in published["table4_simulators"]["rows"].items()}
    for name, averages in (("table5", published["table5_algorithms"]["avg"]),
                           ("table7", published["table7_loss_masking"]["avg"]),
                           *((f"table6/{model.removesuffix('-Base')}", found)
                             for model, found in published["table6_curriculum"]["avg"].items())):
        rows |= {f"{name}/{row}": {"avg": average} for row, average in averages.items()}
    return rows


def published_row(model: str | None, row: str | None, method: str) -> tuple[str, dict[str, float]]:
    """Name and figures of the row that is asked for, else of a prompted method; else none."""
    rows = paper_rows()
    if row is None and (model is None or method not in PROMPTED):
        return "", {}
    row = row or f"table3/{model}/{PROMPTED[method]}"
    if row not in rows:
        raise UserError(f"the paper has no row {row}; it has {', '.join(rows)}")
    return row, rows[row]


# ---------------------------------------------------------------- training runs


def is_amount(value: object) -> bool:
    """Whether a price, counter or duration is valid: a finite number that is not negative."""
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def read_hardware(run_dir: Path) -> tuple[str, Row]:
    """The engine and the hardware {device, name, count} of a run. A supervised stage has no engine:
    "". Raises UserError."""
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_bytes())
        settings, hardware = config["settings"], config["hardware"]
        supervised = "pairs" in settings or "trajectories" in settings
        engine = settings.get("engine", "") if supervised else settings["engine"]
        device, name, count = (hardware[key] for key in ("device", "name", "count"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: needs settings.engine and hardware: {error!r}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the config of a run: {error}") from None
    if not (isinstance(engine, str) and isinstance(name, str) and device in ("cpu", "cuda")
            and type(count) is int and count > 0):
        raise UserError(f"{path}: needs texts as engine and hardware name, device cpu or cuda, and "
                        f"a positive count, got engine {engine!r} and hardware {hardware}")
    return engine, hardware


def read_counters(run_dir: Path, counters: Iterable[str]) -> tuple[list[Row], list[str]]:
    """The steps of a run, whose counters must be amounts, and notes on a line that was skipped.
    Raises UserError."""
    path = run_dir / "metrics.jsonl"
    steps, lines = read_jsonl(path, whole_lines=True), {}
    if not steps:
        raise UserError(f"{path}: no finished step")
    for line, step in enumerate(steps, start=1):
        number = str(step.get("step", f"line {line}"))
        if lines.setdefault(number, line) < line:
            raise UserError(f"{path}:{line}: step {number} stands in line {lines[number]}, too")
        for key in counters:
            if step.get(key) is not None and not is_amount(step[key]):
                raise UserError(f"{path}:{line}: {key} must be a number >= 0, got {step[key]!r}")
    note = f"metrics.jsonl, line {len(steps) + 1}: cut off, as a killed process leaves it; skipped"
    return steps, [] if path.read_bytes().endswith(b"\n") else [note]
