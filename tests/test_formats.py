"""plumbing/formats.py through score, compare and table: files of FlashRAG and of verl."""

import json

import pytest
from helpers import command, one_line, question

import evaluate
from plumbing.cli import UserError

ROWS = [question(0, ["Ann Lee", "Ann"]), question(1, ["Rome"]), question(2, ["---"])]
ANSWERS = ["Ann", "in Rome", None]
READ = ["Doc 1(Title: Ann) Ann Lee was here.", "Nothing.", "A dash."]
PROMPT = "You can answer inside <answer> and </answer>, <answer> Beijing </answer>. Question: {}\n"


def response(answer, document):
    said = f"<search> q </search>\n\n<information>{document}</information>\n\n"
    return "<answer> maybe </answer>" + said + f"<answer> {answer} </answer>" * (answer is not None)


def flashrag_items(answers=ANSWERS):
    """As FlashRAG's Dataset.save writes them: an agent's response, or passages of a search."""
    items = []
    for row, answer, text in zip(ROWS, answers, READ):
        found = ({"final_response": response(answer, text)} if row["id"] == "q0" else
                 {"retrieval_result": [{"id": "7", "contents": text, "score": 1.5}]})
        output = {"query": "x", "pred": answer or "", "metric_score": {"em": 0.0}, **found}
        items.append(row | {"output": output, "metadata": {"type": "bridge"}})
    return items


def verl_items():
    """As verl's trainer dumps generations, with Search-R1's prompt and ground truth."""
    chat = "system\n{}<|im_end|>\n<|im_start|>assistant\n"
    texts = [PROMPT.format(ROWS[0]["question"]), chat.format(PROMPT.format(ROWS[1]["question"])),
             PROMPT.format(ROWS[2]["question"])]
    gts = [{"target": ["Ann Lee", "Ann"]}, ["Rome"], "---"]
    return [{"input": text, "output": response(answer, read).replace("<answer> maybe </answer>", "")
             if answer is None else response(answer, read), "gts": gold, "score": 0.0, "step": 5}
            for text, answer, read, gold in zip(texts, ANSWERS, READ, gts)]


@pytest.fixture
def files(tmp_path, jsonl):
    """The same three answers in the three forms; FlashRAG's as the folder that it writes."""
    folder = tmp_path / "nq_2026_01_01"
    folder.mkdir()
    (folder / "intermediate_data.json").write_text(json.dumps(flashrag_items(), indent=4))
    own = [row | {"answer": answer, "turns": [{"text": "", "query": "q", "documents": [text]}]}
           for row, answer, text in zip(ROWS, ANSWERS, READ)]
    return {"own": jsonl("own.jsonl", own), "flashrag": folder,
            "verl": jsonl("5.jsonl", verl_items())}


def test_files_of_other_frameworks_score_like_ours(files, capsys):
    """Of q2, which has no answer, FlashRAG keeps the empty text: then "" is in it."""
    figures = {}
    for name, path in files.items():
        command(evaluate, "score", path, "--json")
        figures[name] = json.loads(capsys.readouterr().out)
    third = 100 / 3
    assert figures["own"] == figures["verl"]
    assert {n: figures["own"][n] for n in ("n", "em", "cover_em", "answered", "recall")} == (
        pytest.approx({"n": 3, "em": third, "cover_em": 2 * third, "answered": 2 * third,
                       "recall": third}))
    assert figures["flashrag"] == figures["own"] | {
        "em": pytest.approx(2 * third), "cover_em": 100, "f1": figures["flashrag"]["f1"],
        "intervals": figures["flashrag"]["intervals"]}


def test_outside_predictions_are_compared_and_stand_in_the_table(files, capsys):
    command(evaluate, "compare", files["own"], files["flashrag"], "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 3 and result["em"]["difference"] == pytest.approx(100 / 3)
    for metric, mean in (("em", "33.3"), ("cover_em", "66.7")):
        command(evaluate, "table", f"nq={files['own']}", f"Search-R1/popqa={files['verl']}",
                "--metric", metric, "--markdown")
        out = capsys.readouterr().out
        rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines()
                if line.startswith("|")}
        assert [name.strip() for name in rows[f"{metric}, %"]] == ["nq", "popqa", "avg"]
        assert rows["predictions"][0].strip().startswith(f"{mean}<br>")
        assert rows["Search-R1"][1].strip().endswith("<br>n 3") and rows["Search-R1"][0] == " - "
        assert "a substring match EM" in out
    with pytest.raises(UserError, match="--metric bleu: there are em, f1, cover_em, recall"):
        command(evaluate, "table", f"nq={files['own']}", "--metric", "bleu")
    with pytest.raises(UserError, match="name its benchmark, such as nq="):
        command(evaluate, "table", files["own"])


def test_only_the_same_questions_are_compared(jsonl, capsys, monkeypatch):
    """Row numbers are ids too: the same ids say nothing."""
    rows = [question(i, ["a", "b"], answer="a") for i in range(3)]
    first = jsonl("first.jsonl", rows)
    for name, other, says in (
        ("other", [row | {"question": f"Another {i}?"} for i, row in enumerate(rows)],
         "question of id q0 is 'Question 0?' in one, 'Another 0?' in the other"),
        ("turned", [row | {"id": f"q{i}"} for i, row in enumerate(rows[::-1])],
         "question of id q0"),
        ("gold", [*rows[:2], rows[2] | {"golden_answers": ["a"]}], "golden_answers of id q2 is"),
        ("fewer", rows[:2], "1 ids are in one only, such as q2"),
        ("nameless", [{k: v for k, v in row.items() if k != "id"} for row in rows], "no field id")):
        line = one_line(capsys, monkeypatch, evaluate, "compare", first,
                        jsonl(f"{name}.jsonl", other))
        assert says in line, name
    # the same questions in another order, golden answers too, are the same
    again = [row | {"golden_answers": ["b", "a"], "answer": "x"} for row in rows]
    results = []
    for name, part in (("a", again), ("b", again[::-1])):
        command(evaluate, "compare", first, jsonl(f"{name}.jsonl", part), "--json")
        results.append(json.loads(capsys.readouterr().out) | {"b": ""})
    assert results[0] == results[1] and results[0]["em"]["difference"] == -100


def test_an_id_counts_once(jsonl, capsys, monkeypatch):
    rows = [question(0, answer="Lima"), question(1, answer="x"), question(0, answer="Lima")]
    line = one_line(capsys, monkeypatch, evaluate, "score", jsonl("twice.jsonl", rows))
    assert "twice.jsonl:3: id q0 occurs twice" in line
    samples = [question(0, answer=a, sample=i) for i, a in enumerate(("Lima", "x", "Lima"))]
    command(evaluate, "score", jsonl("samples.jsonl", samples), "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["n"] == 1 and figures["em"] == pytest.approx(200 / 3)
    assert [figures[f"pass@{k}"] for k in (2, 3)] == [pytest.approx(100), pytest.approx(100)]
