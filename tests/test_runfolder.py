"""Run folders: nothing is replaced before another run has begun; one run at a time; same inputs."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import BUDGET, command, corpus_rows, one_line, question, read_lines, trajectory

import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing.cli import UserError
from plumbing.engines import ENGINES, Engine
from plumbing.runfolder import LOCK, FolderSettings, RunFolder, begun


def tree(folder: Path) -> dict[str, bytes]:
    """What a folder holds: files by their path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file()}


OLD = {"config.json": b'{"settings": {}}', "model/weights": b"paid for", "metrics.jsonl": b"1\n"}


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder with a run in it."""
    for name, content in OLD.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "run"


@pytest.fixture
def stages(tiny, jsonl) -> dict[str, list]:
    """The arguments of each stage but for --out; each takes seconds."""
    questions = jsonl("questions.jsonl", [question(i) for i in range(2)])
    records = [trajectory("capital", ["Peru gold"])]
    for record in records:
        record["turns"][0]["text"] = "<search> capital </search>"
    tuning = ["--model", tiny, "--epochs", 1]
    return {
        "simulator": [sim, "train", jsonl("pairs.jsonl", [{"prompt": "p", "response": "r"}]),
                      *tuning],
        "warm-up": [rl, "warmup", jsonl("trajectories.jsonl", [r | {"id": "q"} for r in records]),
                    *tuning],
        "policy": [rl, "train", "--data", questions, "--model", tiny, *BUDGET, "--steps", 1,
                   "--engine", "bm25", "--corpus", jsonl("corpus.jsonl", corpus_rows())],
        "evaluation": [evaluate, "run", "--data", questions, "--model", tiny, "--engine", "none",
                       "--tokens-per-turn", 8, "--max-searches", 1],
    }


def test_a_start_that_fails_costs_no_run_and_leaves_none(stages, old, capsys, monkeypatch, tmp_path,
                                                         serve):
    """Whatever is wrong is found out before the folder is touched, or what it held is put back."""
    down = f"http://127.0.0.1:{serve(lambda handler, body: handler.reply({}, 400)).url[17:]}/v1"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    gone = tmp_path / "gone"
    held_out = ["--eval-every", 1, "--eval-data", empty, "--eval-engine", "bm25"]  # reads --corpus
    wrong = {"simulator": [["--model", gone], ["--prompts", gone]],
             "warm-up": [["--model", gone], ["--prompts", gone]],
             "policy": [["--model", gone], ["--corpus", gone], ["--data", gone], ["--data", empty],
                        ["--engine", "simulator", "--simulator", gone, *held_out],
                        ["--engine", "simulator", "--simulator", down, *held_out]],
             "evaluation": [["--model", gone], ["--engine", "bm25", "--corpus", gone],
                            ["--engine", "simulator", "--simulator", down]]}
    for stage, mistakes in wrong.items():
        for mistake in mistakes:
            for out in (old, tmp_path / "fresh"):
                arguments = [*stages[stage], *mistake, "--out", out, "--overwrite"]
                assert str(out) not in one_line(capsys, monkeypatch, *arguments), (stage, mistake)
            assert tree(old) == OLD and not (tmp_path / "fresh").exists()


def test_an_old_run_goes_when_the_first_step_of_the_new_one_is_done(stages, old, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # no git: that costs the commit alone
    for stage, arguments in stages.items():
        command(*arguments, "--out", old, "--overwrite")
        names = {path.name for path in old.iterdir()}
        wanted = {"predictions.jsonl"} if stage == "evaluation" else {"metrics.jsonl", "model"}
        assert names > wanted and "replaced" not in names and "weights" not in str(tree(old))
        config = json.loads((old / "config.json").read_text())
        assert config["commit"] is None and config["inputs"]
        assert "Question: {question}" in config["prompts"]["direct"]["user"]
        with pytest.raises(UserError, match="already holds a run.*--overwrite"):
            command(*arguments, "--out", old)


@pytest.mark.parametrize("stage,step", [
    ("simulator", "supervised_gradient"), ("policy", "collect"), ("evaluation", "answer_batch")])
def test_a_first_step_that_fails_puts_the_old_run_back(stages, old, monkeypatch, stage, step):
    def fail(*args, **kwargs):
        raise UserError("the first step fails")

    monkeypatch.setattr(stages[stage][0], step, fail)
    with pytest.raises(UserError, match="the first step fails"):
        command(*stages[stage], "--out", old, "--overwrite")
    assert tree(old) == OLD


def test_no_other_folder_is_written_into(stages, old, tiny, capsys, monkeypatch, tmp_path):
    """A model's folder has a config.json, too; a run's own model can't be what replaces it."""
    model, notes, whole = tmp_path / "released", tmp_path / "notes", tree(tiny)
    shutil.copytree(tiny, model)
    shutil.copytree(tiny, old / "model", dirs_exist_ok=True)
    notes.mkdir()
    (notes / "todo.txt").write_text("buy milk")
    for arguments in stages.values():
        for out, words in ((model, "no run of this kit"), (notes, "no run of this kit")):
            line = one_line(capsys, monkeypatch, *arguments, "--out", out, "--overwrite")
            assert words in line and str(out) in line
        before = tree(old)
        line = one_line(capsys, monkeypatch, *arguments, "--model", old / "model", "--out", old,
                        "--overwrite")
        assert "model:" in line and "name another --out" in line and tree(old) == before
    assert tree(model) == whole and tree(notes) == {"todo.txt": b"buy milk"}


def holder(out: Path) -> int:
    """Another process that has a run in the folder; its id."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with RunFolder(FolderSettings(out=out), {}) as folder:
            folder.open()
            os.write(writer, b".")
            signal.pause()
    os.read(reader, 1)
    return child


def test_a_second_run_in_a_folder_is_told_who_has_it(stages, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    first = holder(out)
    held = tree(out)
    for extra in ([], ["--overwrite"], ["--resume"]):
        line = one_line(capsys, monkeypatch, *stages["evaluation"], "--out", out, *extra)
        assert f"in use by process {first} on " in line
    assert tree(out) == held
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert (out / LOCK).exists()  # the file is left, the kernel's lock is not
    command(*stages["evaluation"], "--out", out)
    assert not (out / LOCK).exists() and (out / "results.json").exists()


def attempt(out: Path, renames: int) -> bool:
    """Replace the run in `out`, in a process, killed at a rename; False: it ended."""
    if (child := os.fork()) == 0:
        rename, done = Path.rename, []

        def counted(path, target):
            done.append(path)
            if len(done) > renames:
                os._exit(9)
            return rename(path, target)

        Path.rename = counted
        with RunFolder(FolderSettings(out=out, overwrite=True), {}) as folder:
            folder.open()
            (out / "metrics.jsonl").write_bytes(b"new")
            begun(out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_any_rename_either_run_is_whole(old, tmp_path):
    """...and the next start sees it, after as many kills as there are."""
    out, ends = tmp_path / "out", []
    for renames in range(20):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        for again in range(3):
            killed = attempt(out, renames + again)
        with pytest.raises(UserError, match="already holds a run"), \
                RunFolder(FolderSettings(out=out), {}):
            pass
        ends.append(tree(out).get("metrics.jsonl"))
        if ends[-1] != b"new":
            assert {name: text for name, text in tree(out).items() if name != LOCK} == OLD
        elif not killed:
            break
    assert ends[0] == b"1\n" and ends[-1] == b"new" and 4 < len(ends) < 19


def test_a_run_killed_before_its_first_step_blocks_no_other(tmp_path, old):
    """Resumed it goes on; any other start finds what it had replaced."""
    for out, held in ((old, OLD), (tmp_path / "fresh", {})):
        s = FolderSettings(out=out, overwrite=True)

        def kill():
            if (child := os.fork()) == 0:
                RunFolder(s, {}).__enter__().open()  # noqa: B023
                os._exit(9)
            os.waitpid(child, 0)

        kill()
        with pytest.raises(UserError, match="too soon"), RunFolder(replace(s, resume=True), {}):
            raise UserError("too soon")  # of a resumed run: nothing is put back
        assert "config.json" in tree(out) and len(tree(out)) == 1 + len(held)
        with RunFolder(s, {}):
            assert {name: text for name, text in tree(out).items() if name != LOCK} == held
        assert tree(out) == held if held else not out.exists()
        kill()
        with RunFolder(replace(s, resume=True), {}) as folder:
            folder.open()
        assert set(tree(out)) == {"config.json"}


@pytest.mark.parametrize("reads", [("corpus",), None])
def test_resumed_on_other_contents_it_is_refused(stages, tmp_path, jsonl, capsys, monkeypatch,
                                                 reads):
    """Data, corpus or prompts that have changed under their names; with an engine of one's own."""
    monkeypatch.setitem(ENGINES, "mine", Engine(ENGINES["bm25"].make, reads=reads))
    wording = tmp_path / "wording.toml"
    wording.write_text('[direct]\nuser = "{question} Now!"')
    evaluation = [*stages["evaluation"], "--engine", "mine", "--corpus",
                  jsonl("corpus.jsonl", corpus_rows()), "--prompts", wording]
    command(*evaluation, "--out", tmp_path / "run")
    capsys.readouterr()
    held = tree(tmp_path / "run")
    for path, words in {tmp_path / "questions.jsonl": "contents: data",
                        tmp_path / "corpus.jsonl": "contents: corpus",
                        wording: "wording of the prompts: direct"}.items():
        text = path.read_text()
        path.write_text(text.replace("Question 1", "Question One").replace("Oslo", "Bergen")
                        .replace("Now!", "Soon!"))
        line = one_line(capsys, monkeypatch, *evaluation, "--out", tmp_path / "run", "--resume")
        assert line.endswith(words) and tree(tmp_path / "run") == held
        path.write_text(text)
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["settings"]["samples"]  # as of a version that had no such option
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    command(*evaluation, "--out", tmp_path / "run", "--resume")
    assert len(read_lines(tmp_path / "run/predictions.jsonl")) == 2
