"""data/prepare.py on local copies of the Hub's repositories: what is kept, renamed, refused."""

import json
from pathlib import Path

import pytest
from helpers import command, data_script, one_line

from plumbing.files import read_questions


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return data_script("prepare")


def flashrag(folder: Path, **files: list[dict]) -> Path:
    """A repository's layout: configurations in the README, a JSONL file a split."""
    configs = []
    for name, rows in files.items():
        config, split = name.split("__")
        path = folder / config / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        configs.append(f"- config_name: {config}\n  data_files:\n  - split: {split}\n"
                       f"    path: {config}/{split}.jsonl\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return folder


def row(name: str, question: str | None, *answers: str, **more) -> dict:
    return {"id": name, "question": question, "golden_answers": list(answers), **more}


def test_prepare_benchmark(prepare, tmp_path, capsys):
    rows = [row("test_0", " who? ", "A", "Ann", "Ann", metadata={"x": 1}),
            row("test_1", "which?", "the", metadata={"x": 2}),
            row("test_0", " who? ", "Ann", metadata={"x": 3}),
            row("test_2", "who?", "Bob", metadata={"x": 4})]
    source = flashrag(tmp_path / "hub", nq__test=rows, hotpotqa__dev=rows[3:])
    command(prepare, "nq", "hotpotqa", "--source", source, "--out", tmp_path)
    assert read_questions(tmp_path / "nq.jsonl") == [row("test_0", "who?", "Ann"),
                                                     row("test_2", "who?", "Bob")]
    assert len(read_questions(tmp_path / "hotpotqa.jsonl")) == 1
    notes = " ".join(capsys.readouterr().err.split())
    for note in ("1 without a usable golden answer", "1 written twice",
                 "1 questions asked under several ids", "4 rows where 3,610 are published"):
        assert note in notes


def test_prepare_training_sets(prepare, tmp_path):
    import datasets

    nq, hotpotqa = row("train_0", "a?", "x"), row("train_0", "b?", "y")
    source = flashrag(tmp_path / "flashrag", nq__train=[nq], hotpotqa__train=[hotpotqa])
    expected = [row("nq-train_0", "a?", "x", data_source="nq"),
                row("hotpotqa-train_0", "b?", "y", data_source="hotpotqa")]
    assert prepare.prepare("train", str(source))[0] == expected
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    rows = [found | {"data_source": name, "prompt": [{"role": "user", "content": "?"}]}
            for name, found in (("nq", nq), ("hotpotqa", hotpotqa))]
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows).to_parquet(parquet / f"{split}.parquet")
    assert prepare.prepare("train-search-r1", str(parquet))[0] == expected


@pytest.mark.parametrize("example", [
    {"prompt": "ask", "response": "tell"},
    {"instruction": "ask", "input": "", "output": "tell"},
    {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]},
    {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]},
])
def test_prepare_tuning_sets(prepare, jsonl, tmp_path, example):
    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub/SimulationTuning_wiki_dataset.json"  # the one file of the Hub's
    file.write_text(json.dumps([example] * 2))
    pairs, _ = prepare.prepare("simulation-wiki", str(tmp_path / "hub"))
    assert pairs == [{"prompt": "ask", "response": "tell"}] * 2


def test_prepare_names_file_and_line(prepare, tmp_path, monkeypatch, capsys):
    good = row("1", "a?", "x")
    bad = flashrag(tmp_path / "bad", nq__test=[good, row("2", None, "x")])
    broken = flashrag(tmp_path / "broken", nq__test=[good])
    (broken / "nq/test.jsonl").write_text(json.dumps(good) + "\n{oops\n")
    clash = flashrag(tmp_path / "clash", nq__test=[good, row("1", "b?", "x")])
    for name, source, expected in (
            ("nq", bad, "nq/test.jsonl:2: no question"),
            ("nq", broken, "nq/test.jsonl:2: not JSON"),
            ("nq", clash, "id '1' belongs to two questions"),
            ("nq", tmp_path / "no", "no such folder"), ("nqq", clash, "unknown set")):
        assert expected in one_line(capsys, monkeypatch, prepare, name, "--source", source,
                                    "--out", tmp_path)
