"""A run killed at any instant goes on from its last checkpoint, and ends as if nothing had been."""

import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import (BUDGET, TWO_PROCESSES, make_model, one_line, question, read_lines,
                     read_metrics)

import train_rl as rl
from plumbing.checkpoints import Checkpoints, checkpoint_folder, keep_steps, save_checkpoint
from plumbing.cli import UserError
from plumbing.signals import Signals
from plumbing.text import ROOT

TRACKER = '''
import json, os
def say(x): print(json.dumps(x), file=open(os.environ["TRACKER"], "a"), flush=True)
class Config(dict):
    def update(self, values, **options): say(values)
config = Config()
class Run:
    def log(self, values, step=None): say([step, values])
    def finish(self): say("finished")
def init(project, **options): return Run()
'''


# Processes that begin with the chapter imported: starting Python anew takes seconds.
PREPARED = multiprocessing.get_context("forkserver")
PREPARED.set_forkserver_preload(["train_rl"])


def run_script(script: Path, arguments: list[str], folder: Path) -> None:
    """What a process does: the script, in a folder, its stderr in a file there."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.chdir(folder)
    os.environ["COLUMNS"] = "200"
    sys.argv = [script.name, *arguments]
    runpy.run_path(str(script), run_name="__main__")


class World:
    """A run's command; folder `whole` has it uninterrupted, logged to a tracker of one file."""

    def __init__(self, folder: Path, policy: Path, simulator: Path, steps: int):
        self.folder, self.steps = folder, steps
        rows = [json.dumps(question(i, hops=1 + i % 2)) + "\n" for i in range(4)]
        (folder / "train.jsonl").write_text("".join(rows))
        self.options = ["train", "--data", folder / "train.jsonl", "--model", policy, "--simulator",
                        simulator, *BUDGET, "--kl-coef", "0.1", "--save-every", 2, "--steps", steps,
                        "--eval-every", 3, "--eval-data", folder / "train.jsonl",
                        "--warmup-ratio", 0.8, "--mini-batch-size", 3]
        package = folder / "site/trackio-1.0.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n")
        (folder / "site/trackio.py").write_text(TRACKER)
        env = {"PYTHONPATH": str(folder / "site"), "TRACKER": str(folder / "tracked.jsonl")}
        command = [sys.executable, ROOT / "train_rl.py", *self.options, "--out", "whole"]
        subprocess.run(list(map(str, [*command, "--logger", "trackio"])), cwd=folder, check=True,
                       env=os.environ | env)

    def run(self, script: str, *arguments, code=0) -> str:
        """Run a script to its exit code; what it says."""
        given = (ROOT / script, list(map(str, arguments)), self.folder)
        process = PREPARED.Process(target=run_script, args=given)
        process.start()
        process.join(300)
        errors = (self.folder / "stderr").read_text()
        assert process.exitcode == code, errors[-3000:]
        return errors

    def hit(self, number: int, phase: str, count: int, share: float | str, *options) -> str:
        """The run, ended by a signal: what it says."""
        aim = (int(number), phase, count, share, self.folder / "hit")
        code = -number if number == signal.SIGKILL else 128 + number
        return self.run("tests/killed.py", *aim, *self.options, *options, code=code)

    def ends_like(self, out: str, other: str) -> None:
        """All that a run leaves, but for times and rates, is equal bit for bit."""
        metrics = read_metrics(self.folder / out)
        assert metrics == read_metrics(self.folder / other) and len(metrics) == self.steps
        for file in ("episodes.jsonl", "eval.jsonl", "model/model.safetensors"):
            ours, theirs = ((self.folder / run / file).read_bytes() for run in (out, other))
            assert ours == theirs, file


@pytest.fixture(scope="module")
def world(tmp_path_factory, policy, tiny):
    return World(tmp_path_factory.mktemp("world"), policy, tiny, steps=10)


def test_killed_three_times_it_ends_as_if_nothing_had_been(world):
    """Each time resumed; results/kills/run.py does more of it, to all stages."""
    draws, hits = random.Random(1), set()
    for kill, phase in enumerate(("collect", "update", "save_checkpoint")):
        count, share = draws.randint(2, 2 if phase == "save_checkpoint" else 4), draws.random()
        resume = ["--resume"] * (kill > 0)
        world.hit(signal.SIGKILL, phase, count, share, "--out", "killed", *resume)
        hits.add((world.folder / "hit").read_text())
    world.run("train_rl.py", *world.options, "--out", "killed", "--resume")
    world.ends_like("killed", "whole")
    assert hits - {"between the phases"}


@pytest.mark.slow
def test_all_stages_are_killed_and_stopped(tmp_path):
    log, script = tmp_path / "log.md", ROOT / "results/kills/run.py"
    counts = ["--kills", "12", "--signals", "8", "--seed", str(time.time_ns() % 10**9)]
    subprocess.run([sys.executable, script, "--out", log, *counts], check=True)
    assert log.read_text().startswith("# 12 SIGKILLs and 8 signals")


def check_saved(world: World, out: str) -> int:
    """Every finished step is in a checkpoint; how many they are."""
    steps = len(read_metrics(world.folder / out))
    assert checkpoint_folder(world.folder / out, steps).is_dir() and steps < world.steps
    return steps


@pytest.mark.parametrize("number,phase,share,steps", [
    (signal.SIGTERM, "collect", "write_turn", 1), (signal.SIGINT, "optimizer_step", 0, 1)])
def test_stopped_it_loses_no_step_and_says_how_to_go_on(world, number, phase, share, steps):
    """A rollout is dropped; a step whose weights are about to change is finished."""
    errors = world.hit(number, phase, 2, share, "--out", phase)
    assert check_saved(world, phase) == steps
    (line,) = [line for line in errors.splitlines() if line.endswith("--resume")]
    python, script, *arguments = line.split()  # the command that it printed
    assert python == "python" and f"--out {phase}" in line
    world.run(script, *arguments)
    world.ends_like(phase, "whole")


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(world):
    def start(out, *extra):
        command = [*TWO_PROCESSES, ROOT / "train_rl.py", *world.options, "--out", out, *extra]
        return subprocess.Popen(list(map(str, command)), cwd=world.folder, text=True,
                                stderr=subprocess.PIPE)

    def finish(process, code=0):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == code, errors[-3000:]
        return errors

    finish(start("whole-by-two"))
    process, metrics = start("by-two"), world.folder / "by-two/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.random() / 2)
    process.send_signal(signal.SIGTERM)
    errors = finish(process, code=1)  # the launcher's own code
    check_saved(world, "by-two")
    assert "accelerate launch --num_processes 2" in " ".join(errors.split())
    finish(start("by-two", "--resume"))
    world.ends_like("by-two", "whole-by-two")


def test_a_second_signal_ends_at_once():
    child = os.fork()
    if child == 0:
        signals = Signals()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.allow(False)
        if signals.number == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_tracker_gets_every_metric(world):
    config, *lines, last = read_lines(world.folder / "tracked.jsonl")
    assert config["steps"] == 10 and config["model"] and config["curriculum"] == "exponential"
    rows = read_lines(world.folder / "whole/metrics.jsonl")
    held_out = [line for line in lines if "eval/n" in line[1]]
    assert [line for line in lines if line not in held_out] == [[row["step"], row] for row in rows]
    evaluations = read_lines(world.folder / "whole/eval.jsonl")
    assert held_out == [[row["step"], row] for row in evaluations] and last == "finished"
    trained = [row for row in rows if row["loss/grad_norm"]]
    assert all(row["rate/mfu"] > 0 and row["rate/update_tokens"] > 0 for row in trained)


def test_an_unwritable_folder_is_one_line(world, capsys, monkeypatch):
    out = world.folder / "train.jsonl/run"
    assert str(out) in one_line(capsys, monkeypatch, rl, *world.options, "--out", out)


def prepared(hidden: int) -> Accelerator:
    accelerator, model = Accelerator(cpu=True), make_model(259, hidden_size=hidden)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_a_full_disk_leaves_what_was_there_and_two_are_kept(tmp_path, capsys):
    """No file may grow past a limit, which is how a full disk shows: an error while writing."""
    accelerator, limits = prepared(32), resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(accelerator, tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    words = "step-000004.tmp can't be written.*older checkpoints are as they were"
    try:
        with pytest.raises(UserError, match=words):
            save_checkpoint(accelerator, tmp_path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(path.read_bytes() == content for path, content in before.items())
    Checkpoints(accelerator, tmp_path, 1).go_on()
    said = " ".join(capsys.readouterr().err.split())
    assert "step-000004.tmp was left half-written" in said
    save_checkpoint(accelerator, tmp_path, 4)
    assert saved(tmp_path) == ["step-000002", "step-000004"]
    for step in (5, 6, 6):  # the last two are kept, and fit their model alone
        save_checkpoint(accelerator, tmp_path, step)
    assert saved(tmp_path) == ["step-000005", "step-000006"]
    words = "step-000006 can't be loaded: .*size mismatch.*step-000005"
    with pytest.raises(UserError, match=words):
        Checkpoints(prepared(48), tmp_path, 1).go_on()


def test_a_line_cut_short_is_set_aside(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    keep_steps(metrics, 1)
    assert metrics.read_text() == '{"step": 0}\n'
    aside = metrics.with_name("metrics.jsonl.set-aside")
    assert aside.read_text() == '{"step": 1}\n{"step": 2, "rew'
    aside.unlink()
    keep_steps(metrics, 1)  # nothing to move: no empty file
    assert metrics.read_text() == '{"step": 0}\n' and not aside.exists()
