"""What a crash, a full disk or a slip of the hand leaves: a run goes on, or says which file it is.

Each damage is done to a finished run; resumed, it ends as it had, from an older checkpoint if it
must."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import BUDGET, command, corpus_rows, one_line, question, read_lines, read_metrics

import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing import models
from plumbing.cli import UserError

LAST, OLDER = "checkpoints/step-000004", "checkpoints/step-000003"


def cut(keep):
    return lambda path: path.write_bytes(path.read_bytes()[:keep])


def lines(change):
    """Damage to the lines of a file: `change` gets a list of them, as bytes."""
    def damage(path):
        rows = path.read_bytes().splitlines(keepends=True)
        change(rows)
        path.write_bytes(b"".join(rows))
    return damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_with(text):
    return lambda path: path.write_text(text)


def become_file(path):
    remove(path)
    path.write_text("")


def in_the_middle_of_a_character(rows):
    rows[-1] = rows[-1].replace(b"Question", "Fräge".encode(), 1).partition(b"\xa4")[0]


def take_out(number):
    return lines(lambda rows: rows.pop(number))


def spoil(number, text=b'{"step": 2, oops}\n'):
    return lines(lambda rows: rows.__setitem__(number, text))


# stage, damaged file, damage, what the resumed run says; every run ends as it had.
RESUMED = [
    ("simulator", f"{LAST}/optimizer.bin", cut(0), f"{LAST}/optimizer.bin can't be loaded"),
    ("simulator", f"{LAST}/optimizer.bin", cut(900), f"{LAST}/optimizer.bin can't be loaded"),
    ("simulator", f"{LAST}/optimizer.bin", flip, "damaged"),
    ("simulator", f"{LAST}/optimizer.bin", remove, "optimizer.bin"),
    ("simulator", f"{LAST}/model.safetensors", cut(0), f"{LAST}/model.safetensors can't be loaded"),
    ("simulator", f"{LAST}/model.safetensors", cut(-9), f"{LAST}/model.safetensors can't be"),
    ("simulator", f"{LAST}/model.safetensors", remove, f"{LAST} can't be loaded"),
    ("simulator", f"{LAST}/random_states_0.pkl", remove, "no random states"),
    ("simulator", f"{LAST}/random_states_0.pkl", cut(0), "random_states_0.pkl can't be loaded"),
    ("simulator", f"{LAST}/custom_checkpoint_0.pkl", cut(0), "custom_checkpoint_0.pkl can't be"),
    ("simulator", LAST, become_file, f"{LAST} can't be loaded"),
    ("simulator", LAST, remove, ""),
    ("simulator", "config.json", cut(0), f"config.json is no run's.*{LAST}/config.json takes its"),
    ("simulator", "config.json", cut(80), "config.json is no run's config"),
    ("simulator", "config.json", replace_with('["settings"]'), "config.json is no run's config"),
    ("simulator", "config.json", remove, ""),
    ("simulator", "metrics.jsonl", cut(-9), "metrics.jsonl.*lacks lines of step 3"),
    ("simulator", "metrics.jsonl", take_out(3), "lacks lines of step 3.*checkpoint of step 3"),
    ("simulator", "metrics.jsonl", spoil(3), "lacks lines of step 3.*checkpoint of step 3"),
    ("simulator", "model/model.safetensors", cut(10), ""),
    ("policy", "episodes.jsonl", lines(in_the_middle_of_a_character), "lacks lines of step 3"),
    ("policy", "episodes.jsonl", take_out(-2), "lacks lines of step 3"),
    ("policy", f"{LAST}/optimizer.bin", cut(0), "going on from the checkpoint of step 3"),
    ("evaluation", "predictions.jsonl", lines(in_the_middle_of_a_character), "from line 3 on"),
    ("evaluation", "predictions.jsonl", spoil(1), "from line 1 on.*predictions.jsonl.set-aside"),
    ("evaluation", "predictions.jsonl", spoil(2, b"[]\n"), "from line 3 on"),
    ("evaluation", "predictions.jsonl", remove, ""),
    ("evaluation", "results.json", cut(20), ""),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny, policy):
    """Each stage's arguments and its finished run, of four steps (or questions)."""
    folder = tmp_path_factory.mktemp("finished")
    for name, rows in (("questions", [question(i) for i in range(4)]), ("corpus", corpus_rows()),
                       ("pairs", [{"prompt": f"p{i}", "response": "r"} for i in range(8)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", folder / "questions.jsonl", "--model", policy]
    stages = {
        "simulator": [sim, "train", folder / "pairs.jsonl", "--model", tiny, "--batch-size", 2,
                      "--lr", "1e-2", "--save-every", 1],
        "policy": [rl, "train", *data, *BUDGET, "--steps", 4, "--save-every", 1, "--kl-coef", 0,
                   "--engine", "none"],
        "evaluation": [evaluate, "run", *data, "--engine", "none", "--batch-size", 2,
                       "--tokens-per-turn", 8, "--max-searches", 1],
    }
    for stage, arguments in stages.items():
        command(*arguments, "--out", folder / stage)
    return folder, stages


def outcome(stage: str, out: Path):
    """What a run ends with, but for times."""
    if stage == "evaluation":
        return [row | {"seconds": 0} for row in read_lines(out / "predictions.jsonl")]
    kept = {} if stage == "simulator" else {"episodes": (out / "episodes.jsonl").read_bytes()}
    return kept | {"metrics": read_metrics(out),
                   "model": (out / "model/model.safetensors").read_bytes()}


@pytest.mark.parametrize("stage,file,damage,words", RESUMED)
def test_a_damaged_run_ends_as_it_had(finished, tmp_path, capsys, monkeypatch, stage, file, damage,
                                      words):
    folder, stages = finished
    out = tmp_path / stage
    shutil.copytree(folder / stage, out)
    damage(out / file)
    capsys.readouterr()
    command(*stages[stage], "--out", out, "--resume")
    assert outcome(stage, out) == outcome(stage, folder / stage)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(words, said), said


# Where nothing older helps: refused in one line, and nothing is changed.
REFUSED = [
    ("simulator", f"{LAST}/optimizer.bin", cut(0), f"{OLDER}/optimizer.bin", cut(5),
     f"{LAST}/optimizer.bin can't be loaded.*{OLDER}/optimizer.bin.*--overwrite begins anew"),
    ("simulator", "config.json", cut(9), "checkpoints", remove, "config.json is no run's config"),
    ("evaluation", "config.json", cut(0), "results.json", remove, "config.json is no run's config"),
    ("evaluation", "predictions.jsonl", lines(lambda rows: rows.reverse()), "results.json", remove,
     "predictions.jsonl answers other questions"),
]


@pytest.mark.parametrize("stage,first,damage,second,another,words", REFUSED)
def test_a_run_that_cannot_be_resumed_is_refused(finished, tmp_path, capsys, monkeypatch, stage,
                                                 first, damage, second, another, words):
    folder, stages = finished
    out = tmp_path / stage
    shutil.copytree(folder / stage, out)
    damage(out / first)
    another(out / second)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(UserError, match=words):
        command(*stages[stage], "--out", out, "--resume")
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    after.pop(out / "config.json"), before.pop(out / "config.json")
    assert before == after


@pytest.mark.parametrize("damage", [take_out(1), spoil(1), cut(0)])
def test_lines_that_no_checkpoint_is_older_than_are_missing(finished, tmp_path, capsys, damage):
    folder, stages = finished
    out = tmp_path / "run"
    shutil.copytree(folder / "simulator", out)
    damage(out / "metrics.jsonl")
    command(*stages["simulator"], "--out", out, "--resume")
    said = " ".join(capsys.readouterr().err.split())
    assert re.search("lacks lines of step [01].*these lines are missing from the figures", said)
    whole, ours = (outcome("simulator", run) for run in (folder / "simulator", out))
    assert ours["model"] == whole["model"]
    kept = whole["metrics"][:1] + whole["metrics"][2:]
    assert ours["metrics"] == (kept if "step 1" in said else [])


# The other caches: test_engines.py damages the answers of searches and BM25's index.
@pytest.mark.parametrize("file,damage", [
    ("model.safetensors", cut(0)), ("model.safetensors", cut(-9)), ("config.json", cut(-9)),
    ("config.json", remove), ("tokenizer.json", cut(-9)), ("tokenizer.json", remove),
    ("tokenizer_config.json", cut(0))])
@pytest.mark.parametrize("embedded", [True, False])
def test_a_damaged_model_is_refused_in_one_line(tiny, tmp_path, capsys, monkeypatch, file, damage,
                                                embedded):
    """One that a run made, or the embedded model's copy, which can be fetched again."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    monkeypatch.setattr(models, "SMOLLM2_FOLDER", folder)
    damage(folder / file)
    line = one_line(capsys, monkeypatch, sim, "search", "x", "--engine", "simulator",
                    "--generator", "hf", "--simulator", "smollm2" if embedded else folder)
    assert not embedded or line.endswith(f"; delete {folder}, and it is fetched again")
    assert str(folder) in line


def test_code_in_a_models_folder_is_not_run(tiny, tmp_path, capsys, monkeypatch):
    """Nor is the user asked whether it may be."""
    folder, ran = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config",
                                                 "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    line = one_line(capsys, monkeypatch, sim, "search", "x", "--engine", "simulator",
                    "--generator", "hf", "--simulator", folder)
    assert str(folder) in line and not ran.exists()
