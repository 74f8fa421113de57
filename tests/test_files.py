"""plumbing/files.py: what can't be read is refused in one line, what can't be used is skipped."""

import gzip
import json

import pytest
from helpers import command, one_line, question, read_lines

import costs
import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing.cli import UserError
from plumbing.files import append_jsonl, read_jsonl, read_questions, write_jsonl

GOOD = json.dumps(question(answer="é")) + "\n"
PACKED = gzip.compress((GOOD * 500).encode())
DEEP = "[" * 100_000 + "]" * 100_000
RESULTS = {"benchmark": "nq", "method": "rag", "model": "m", "engine": "bm25", "n": 1,
           "metrics": {"em": {"mean": 1, "low": 0, "high": 2}}}

# kind of bad input: command, file, its contents, what is said
BAD = {
    "Latin-1": ("run", "q.jsonl", '{"id": "é", "question": "q"}\n'.encode("latin-1"),
                "q.jsonl:1: not JSON in UTF-8"),
    "UTF-16": ("score", "q.jsonl", (GOOD * 2).encode("utf-16"), "q.jsonl:1: not JSON in UTF-8"),
    "deep": ("score", "q.jsonl", DEEP, "q.jsonl:1: JSON nested too deeply"),
    "deep list": ("score", "q.json", DEEP, "q.json: JSON nested too deeply"),
    "cut .gz": ("run", "q.jsonl.gz", PACKED[: len(PACKED) // 2], "not a whole .gz file"),
    "damaged .gz": ("run", "q.jsonl.gz", PACKED[:30] + b"\0\0\0" + PACKED[33:], "not a whole .gz"),
    "no .gz": ("run", "q.jsonl.gz", GOOD, "not a whole .gz file"),
    "question a number": ("run", "q.jsonl", question() | {"question": 7},
                          "q.jsonl:1: question must be a text, not 7"),
    "question null": ("score", "q.jsonl", question(answer="x") | {"question": None},
                      "question must be a text, not null"),
    "id a list": ("run", "q.jsonl", question() | {"id": [1]}, "id must be a text or a whole"),
    "hops a text": ("run", "q.jsonl", question(hops="two"), "hops must be a whole number"),
    "golden answers a text": ("run", "q.jsonl", question() | {"golden_answers": "Lima"},
                              "golden_answers must be a list of texts"),
    "golden answers numbers": ("score", "q.jsonl", question(answers=[7], answer="x"),
                               "golden_answers must be a list of texts"),
    "no usable golden answer": ("run", "q.jsonl", question(answers=["---"]),
                                "no row can be used: no usable golden answer"),
    "a directory": ("run", "q.jsonl/x", GOOD, "q.jsonl.jsonl: no such file"),
    "blank line": ("score", "q.jsonl", GOOD + "\n", "q.jsonl:2: not JSON"),
    "one JSON object": ("score", "q.json", json.loads(GOOD), "not a JSON list of objects"),
    "a list of texts": ("score", "q.json", ["x"], "not a JSON list of objects"),
    "FlashRAG without answer": ("score", "q.json", [question(output={"pred": ["a", "b"]})],
                                "q.json:1: answer must be a text or null"),
    "verl without golden answers": ("score", "q.jsonl", {"input": "a", "output": "b", "gts": None},
                                    "golden_answers must be a list of texts"),
    "huge number": ("score", "q.jsonl", '{"id": ' + "9" * 5000 + "}\n", "q.jsonl:1: not JSON"),
    "id with a line feed": ("score", "q.jsonl", [question("a\n\ud800", answer="x")] * 2,
                            "occurs twice"),
    "corpus text null": ("search", "q.jsonl", {"title": "t", "text": None},
                         "q.jsonl:1: text must be a text, not null"),
    "corpus title a number": ("search", "q.jsonl", {"title": 1, "text": "t"},
                              "title must be a text, not 1"),
    "prompts Latin-1": ("prompts", "q.toml", 'x.y = "é"\n'.encode("latin-1"), "q.toml: "),
    "prompts without a table": ("prompts", "q.toml", 'policy = "x"\n', "policy is no table"),
    "prompt a number": ("prompts", "q.toml", "[policy]\nuser = 3\n", "policy.user must be a text"),
    "results without metrics": ("table", "results.json", {"benchmark": "nq"}, "no valid method"),
    "results with a bare metric": ("table", "results.json", RESULTS | {"metrics": {"em": 3}},
                                   "metric em needs mean, low and high"),
    "results without the metric": ("table", "results.json", RESULTS | {"metrics": {}}, "lack em"),
    "results deep": ("table", "results.json", DEEP, "JSON nested too deeply"),
    "turns a number": ("label", "q.jsonl", question(turns=3), "q.jsonl:1: turns must be a list"),
    "documents null texts": ("label", "q.jsonl", question(turns=[
        {"text": "", "query": "q", "documents": [None]}]), "turns must be a list of objects"),
    "trajectory without text": ("warmup", "q.jsonl", question(turns=[{"query": "q"}]),
                                "turns must be a list of objects with a text"),
    "pair without quality": ("train", "q.jsonl", {
        "question": "q", "golden_answers": [], "query": "q", "target": [], "quality": None,
        "documents": []}, "quality must be a text, not null"),
    "steps deep": ("costs", "metrics.jsonl", DEEP + "\n", "metrics.jsonl:1: JSON nested too"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_loses_nothing(kind, tmp_path, tiny, capsys, monkeypatch):
    """Refused with exit code 2, whatever the command, before an old run is touched."""
    name, file, contents, says = BAD[kind]
    path, old = tmp_path / file, tmp_path / "old"
    path.parent.mkdir(exist_ok=True)
    if isinstance(contents, dict | list):
        rows = contents if isinstance(contents, list) and path.suffix == ".jsonl" else [contents]
        contents = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    old.mkdir()
    kept = {"config.json": '{"settings": {}}', "predictions.jsonl": GOOD, "pairs.jsonl": GOOD}
    for item, text in kept.items():
        (old / item).write_text(text)
    out = ["--out", old, "--overwrite"]
    data = tmp_path / file.partition("/")[0]
    module, *arguments = {
        "run": (evaluate, "run", "--model", tiny, "--method", "direct", "--data", data, *out,
                *["--benchmark", "q.jsonl"] * data.is_dir()),
        "prompts": (evaluate, "run", "--model", tiny, "--benchmark", "world", "--prompts", path,
                    *out),
        "score": (evaluate, "score", path), "table": (evaluate, "table", tmp_path),
        "search": (sim, "search", "q", "--engine", "bm25", "--corpus", path),
        "label": (sim, "label", path, "--out", old / "pairs.jsonl", "--overwrite"),
        "train": (sim, "train", path, "--model", tiny, *out),
        "warmup": (rl, "warmup", path, "--model", tiny, *out),
        "costs": (costs, "run", tmp_path),
    }[name]
    if name == "costs":
        hardware = {"device": "cpu", "name": "c", "count": 1}
        (tmp_path / "config.json").write_text(json.dumps({"settings": {"engine": "none"},
                                                          "hardware": hardware}))
    assert says in one_line(capsys, monkeypatch, module, *arguments)
    assert {item: (old / item).read_text() for item in kept} == kept


def test_a_row_that_can_not_be_used_is_skipped_and_named(jsonl, capsys):
    rows = [question(0), question(1, ["---"]), question(2, []), question(3, ["!", "Lima"])]
    path = jsonl("q.jsonl", rows)
    assert [row["id"] for row in read_questions(path)] == ["q0", "q3"]
    said = " ".join(capsys.readouterr().err.split())
    assert ("q.jsonl: 2 of 4 rows skipped, no usable golden answer: row 2 (id 'q1'), "
            "row 3 (id 'q2')") in said
    answered = jsonl("a.jsonl", [row | {"answer": "Lima"} for row in rows])
    command(evaluate, "score", answered, "--json")  # "---" is nothing, but can be compared
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n"] == 3 and "1 of 4 rows skipped" in captured.err


def test_half_a_surrogate_pair_is_written_and_read_again(tmp_path):
    rows = [{"text": "\ud800 half"}, {"text": "東京"}]
    for write, name in ((write_jsonl, "new"), (append_jsonl, "more")):
        write(tmp_path / name, rows)
        assert read_jsonl(tmp_path / name) == rows
        assert "東京" in (tmp_path / name).read_text(encoding="utf-8")


def test_a_question_with_half_a_surrogate_pair_is_answered(tmp_path, tiny, jsonl):
    data = jsonl("q.jsonl", [question(0, question="\ud800?"), question(1)])
    command(evaluate, "run", "--model", tiny, "--method", "direct", "--data", data, "--out",
            tmp_path / "out")
    assert [row["question"] for row in read_lines(tmp_path / "out/predictions.jsonl")] == [
        "\ud800?", "Question 1?"]
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
