"""A run can be killed at any instant: it goes on from its last checkpoint and ends as if nothing had been.

KILL_TEST_LOG=results/kill-test.md names a file for the log of the kills."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import BUDGET, ROOT, TWO_PROCESSES, make_model, question, read_metrics

import sft_simulator as sim
import train_rl as rl

TRACKER = '''
import json, os
config = {}
class Run:
    def log(self, values, step=None): print(json.dumps([step, values]), file=open(os.environ["TRACKER"], "a"), flush=True)
    def finish(self): print('"finished"', file=open(os.environ["TRACKER"], "a"), flush=True)
def init(project, **options): return Run()
'''


class World:
    """A run's command and environment, the same every time; `steps` long, a checkpoint every second step."""

    def __init__(self, folder: Path, policy: Path, simulator: Path, steps: int):
        self.folder, self.steps = folder, steps
        rows = [question(i, hops=1 + i % 2) for i in range(4)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.options = ["train", "--data", folder / "train.jsonl", "--model", policy, "--simulator", simulator, *BUDGET,
                        "--kl-coef", "0.1", "--save-every", 2, "--steps", steps]  # fmt: skip
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def start(self, *command, env=None, **kwargs):
        return subprocess.Popen(list(map(str, command)), cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, env=self.env | (env or {}), **kwargs)  # fmt: skip

    def train(self, out: str, *extra, launcher=(sys.executable,), **kwargs):
        return self.start(*launcher, ROOT / "train_rl.py", *self.options, "--out", out, *extra, **kwargs)

    def finish(self, process, code=0) -> str:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == code, errors[-3000:]
        return errors

    def ends_like(self, out: str, other: str) -> None:
        """Weights, episodes and metrics, but for times and rates, are equal bit for bit."""
        assert read_metrics(self.folder / out) == read_metrics(self.folder / other)
        assert len(read_metrics(self.folder / out)) == self.steps
        for file in ("episodes.jsonl", "model/model.safetensors"):
            assert (self.folder / out / file).read_bytes() == (self.folder / other / file).read_bytes(), file


def whole_run(folder: Path, policy: Path, simulator: Path, steps: int) -> World:
    """A world with an uninterrupted run in its folder `whole`, logged to a tracker that only writes a file."""
    world = World(folder, policy, simulator, steps)
    (folder / "site/trackio-1.0.dist-info").mkdir(parents=True)
    (folder / "site/trackio-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n")
    (folder / "site/trackio.py").write_text(TRACKER)
    env = {"PYTHONPATH": str(folder / "site"), "TRACKER": str(folder / "tracked.jsonl")}
    world.finish(world.train("whole", "--logger", "trackio", env=env))
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory, policy, tiny):
    return whole_run(tmp_path_factory.mktemp("world"), policy, tiny, steps=10)


def kill_and_resume(world: World, kills: int, seed: int) -> list[list[str]]:
    """A run killed so many times, each time resumed; one line a kill: where it was aimed, what it hit, what was lost."""
    draws, log, lines = random.Random(seed), world.folder / "hit", []
    for kill in range(kills):
        phase = ("rollout", "update", "save_checkpoint")[kill % 3]
        count, share = 2 if phase == "save_checkpoint" else draws.randint(2, 4), draws.random()
        aim = (ROOT / "tests/killed.py", int(signal.SIGKILL), phase, count, share, log)
        process = world.start(sys.executable, *aim, *world.options, "--out", "killed", *(["--resume"] if kill else []))
        world.finish(process, code=-signal.SIGKILL)
        steps = len((world.folder / "killed/metrics.jsonl").read_bytes().split(b"\n")) - 1
        saved = sorted(path.name for path in (world.folder / "killed/checkpoints").glob("step-*"))
        lines.append([f"{share:.2f} into {phase} {count}", log.read_text(), str(steps), ", ".join(saved)])
    world.finish(world.train("killed", "--resume"))
    return lines


def check_kills(world: World, kills: int, seed: int) -> None:
    lines = kill_and_resume(world, kills, seed)
    try:
        world.ends_like("killed", "whole")
        result = "equal to the uninterrupted run, bit for bit"
    except AssertionError:
        result = "DIFFERENT from the uninterrupted run"
        raise
    finally:
        if path := os.environ.get("KILL_TEST_LOG"):
            write_log(Path(path), lines, world.steps, result)
    assert {line[1] for line in lines} & {"rollout", "update", "follow_gradient", "save_checkpoint"}  # kills did hit phases


def write_log(path: Path, lines: list[list[str]], steps: int, result: str) -> None:
    table = ["| kill | aimed at | hit | steps done | checkpoints on disk |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join([str(number), *line])} |" for number, line in enumerate(lines, start=1)]
    text = f"""# {len(lines)} kills of one run

A run of {steps} steps on the tiny model (`hf` engine, simulator, one thread), ended by SIGKILL and resumed {len(lines)} times.
Its final weights, episodes and metrics (but for `time/` and `rate/`): **{result}**.

{chr(10).join(table)}

Made by `KILL_TEST_LOG=results/kill-test.md make test-slow`.
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_killed_three_times_it_ends_as_if_nothing_had_been(world):
    check_kills(world, kills=3, seed=1)


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_if_nothing_had_been(tmp_path, policy, tiny):
    check_kills(whole_run(tmp_path, policy, tiny, steps=32), kills=10, seed=time.time_ns())


def stop(world: World, out: str, number: int, **launch) -> str:
    """Send a signal to a run that has done a few steps; what it says, once it has ended."""
    process, metrics = world.train(out, **launch), world.folder / out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.random() / 2)
    process.send_signal(number)
    return world.finish(process, 1 if launch else 128 + number)  # the launcher says 1 whatever its processes say


def goes_on_as_told(world: World, out: str, errors: str) -> None:
    """After its last finished step, by the command it printed, to the end of the uninterrupted run."""
    steps = len(read_metrics(world.folder / out))
    assert rl.checkpoint_folder(world.folder / out, steps).is_dir() and steps < world.steps
    (command,) = [line for line in errors.splitlines() if line.endswith("--resume")]
    assert command.startswith("python ") and f"--out {out}" in command
    world.finish(world.start(sys.executable, ROOT / "train_rl.py", *command.split()[2:]))
    world.ends_like(out, "whole")


@pytest.mark.parametrize("phase,share,steps", [("rollout", 0.5, 1), ("follow_gradient", 0, 2)])
def test_stopped_it_loses_no_step_and_says_how_to_go_on(world, phase, share, steps):
    """A rollout is dropped; a step whose weights are about to change is finished."""
    aim = (ROOT / "tests/killed.py", int(signal.SIGTERM), phase, 2, share, world.folder / "hit")
    errors = world.finish(world.start(sys.executable, *aim, *world.options, "--out", phase), 128 + signal.SIGTERM)
    assert len(read_metrics(world.folder / phase)) == steps
    goes_on_as_told(world, phase, errors)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_instant(world, number):
    goes_on_as_told(world, f"stopped-by-{number.name}", stop(world, f"stopped-by-{number.name}", number))


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(world):
    world.finish(world.train("whole-by-two", launcher=TWO_PROCESSES))
    errors = stop(world, "stopped-by-two", signal.SIGTERM, launcher=TWO_PROCESSES)
    steps = len(read_metrics(world.folder / "stopped-by-two"))
    assert rl.checkpoint_folder(world.folder / "stopped-by-two", steps).is_dir() and steps < world.steps
    assert "accelerate launch --num_processes 2" in errors
    world.finish(world.train("stopped-by-two", "--resume", launcher=TWO_PROCESSES))
    world.ends_like("stopped-by-two", "whole-by-two")


def test_a_second_signal_ends_at_once():
    child = os.fork()
    if child == 0:
        signals = rl.Signals()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.allow(False)
        if signals.number == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_tracker_gets_every_metric(world):
    *lines, last = [json.loads(line) for line in (world.folder / "tracked.jsonl").read_text().splitlines()]
    rows = sim.read_jsonl(world.folder / "whole/metrics.jsonl")
    assert lines == [[row["step"], row] for row in rows] and last == "finished"
    assert all(row["rate/mfu"] > 0 and row["rate/update_tokens"] > 0 for row in rows if row["loss/grad_norm"])


# ---------------------------------------------------------------- checkpoints


def prepared(hidden: int) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    model = make_model(259, hidden_size=hidden)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator


def test_a_full_disk_leaves_what_was_there(tmp_path, capsys):
    """No file may grow past a limit, which is how a full disk shows: an error in the middle of writing."""
    accelerator, limits = prepared(32), resource.getrlimit(resource.RLIMIT_FSIZE)
    rl.save_checkpoint(accelerator, tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(sim.UserError, match="step-000004.tmp can't be written.*older checkpoints are as they were"):
            rl.save_checkpoint(accelerator, tmp_path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items()
    rl.set_lines_aside(tmp_path, 2)
    assert "step-000004.tmp was left half-written" in " ".join(capsys.readouterr().err.split())
    rl.save_checkpoint(accelerator, tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    accelerator = prepared(32)
    for step in (0, 1, 2, 3, 3):
        rl.save_checkpoint(accelerator, tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    rl.save_checkpoint(prepared(32), tmp_path, 1)
    with pytest.raises(sim.UserError, match="step-000001 does not fit"):
        rl.load_checkpoint(prepared(48), tmp_path, 1)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    sim.open_run(tmp_path / "run", {"lr": 1e-3, "save_every": 2, "resume": False}, overwrite=False)
    assert rl.find_checkpoint(tmp_path / "run", {"lr": 1e-3, "save_every": 5, "resume": True}) == 0
    with pytest.raises(sim.UserError, match="other settings: lr"):
        rl.find_checkpoint(tmp_path / "run", {"lr": 1e-4, "save_every": 2, "resume": True})


def test_a_line_cut_short_is_set_aside(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    rl.set_lines_aside(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
    assert (tmp_path / "metrics.jsonl.set-aside").read_text() == '{"step": 1}\n{"step": 2, "rew'


@pytest.mark.slow
def test_an_unwritable_folder_is_one_line(world):
    (world.folder / "file").write_text("")
    errors = world.finish(world.train("file/run"), code=2)
    assert len(errors.strip().splitlines()) == 1 and "file/run" in errors
