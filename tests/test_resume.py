"""A run that is stopped, extended, or out of disk loses no finished step."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import (BUDGET, ROOT, TWO_PROCESSES, command, one_line, question, read_lines,
                     read_metrics, trajectory)

import sft_simulator as sim
import train_rl as rl
from plumbing import checkpoints
from plumbing.cli import UserError
from plumbing.remote import in_threads
from plumbing.text import encode


@pytest.fixture
def tuning(tiny, jsonl, tmp_path) -> dict[str, list]:
    """The two supervised commands, of four steps each, but for --out."""
    rows = [trajectory("capital", ["Peru gold"]) | {"id": i} for i in range(8)]
    options = ["--model", tiny, "--batch-size", 2, "--lr", "1e-2", "--save-every", 2]
    pairs = [{"prompt": f"p{i}", "response": "r"} for i in range(8)]
    return {"simulator": [sim, "train", jsonl("pairs.jsonl", pairs), *options],
            "warm-up": [rl, "warmup", jsonl("trajectories.jsonl", rows), *options]}


def weights(out) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["simulator", "warm-up"])
def test_supervised_training_is_stopped_and_resumed(tuning, tmp_path, monkeypatch, capsys, stage):
    """Its learning rate, too, goes on where it was: the end is the same to the bit."""
    whole, out, gradient, calls = tmp_path / "whole", tmp_path / "out", sim.supervised_gradient, []
    command(*tuning[stage], "--out", whole)

    def stop(*args):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradient(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sim, "supervised_gradient", stop)
        assert command(*tuning[stage], "--out", out) == 143
    assert "stopped after 3 steps, which are saved" in capsys.readouterr().err
    assert len(read_lines(out / "metrics.jsonl")) == 3 and not (out / "model").exists()
    command(*tuning[stage], "--out", out, "--resume")
    assert weights(out) == weights(whole) and read_metrics(out) == read_metrics(whole)


def test_a_run_is_extended_and_keeps_its_curriculum(policy, tiny, jsonl, tmp_path, capsys,
                                                    monkeypatch):
    data = jsonl("questions.jsonl", [question(i) for i in range(4)])
    training = [rl, "train", "--data", data, "--model", policy, *BUDGET, "--simulator", tiny]
    long, short = tmp_path / "long", tmp_path / "short"
    command(*training, "--out", long, "--steps", 4, "--curriculum-steps", 2)
    command(*training, "--out", short, "--steps", 2)
    command(*training, "--out", short, "--resume", "--steps", 4)
    assert weights(short) == weights(long) and read_metrics(short) == read_metrics(long)
    assert [row["noise/p"] for row in read_metrics(short)] == [0, 0.5, 0.5, 0.5]
    capsys.readouterr()
    line = one_line(capsys, monkeypatch, *training, "--out", short, "--resume", "--steps", 3)
    assert "--steps 3: the run already has 4" in line


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_the_end_costs_no_step(tuning, tmp_path, monkeypatch):
    """The last checkpoint comes before the model; where it has no room, the model may have."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    command(*tuning["simulator"], "--out", whole)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_model", full)
        with pytest.raises(UserError, match="out/model can't be written: .*No space left"):
            command(*tuning["simulator"], "--out", out)
    before = read_lines(out / "metrics.jsonl")
    command(*tuning["simulator"], "--out", out, "--resume")
    assert weights(out) == weights(whole) and read_lines(out / "metrics.jsonl") == before

    flush, saved = checkpoints.flush, []
    with monkeypatch.context() as patch:  # the first checkpoint is written, the last is not
        patch.setattr(checkpoints, "flush", lambda paths: (
            saved.append(paths) or (full if len(saved) > 2 else flush)(paths)))
        with pytest.raises(UserError, match="step-000004.tmp can't be written"):
            command(*tuning["simulator"], "--out", out, "--overwrite")
    assert weights(out) == weights(whole)
    shutil.rmtree(out / "model")
    command(*tuning["simulator"], "--out", out, "--resume")
    assert weights(out) == weights(whole)


def test_a_signal_ends_the_wait_for_threads():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    started, asked = time.monotonic(), []
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        in_threads(lambda i: asked.append(i) or time.sleep(20), range(5), 2)
    assert time.monotonic() - started < 10 and len(asked) == 2


SEARCHING = """
import sys
import train_rl as rl, evaluate
rl.write_turn = lambda active, *_: [
    e.turns.append(rl.Turn("<search> a </search>", "search")) for e in active]
module = {"train_rl": rl, "evaluate": evaluate}[sys.argv[1]]
del sys.argv[0]
rl.run_cli(module.app)
"""  # one of the chapters, whose policy searches at once


@pytest.mark.parametrize("arguments,number", [
    (["train_rl", "train", *BUDGET, "--engine", "http"], signal.SIGTERM),
    (["evaluate", "run", "--method", "rag", "--engine", "simulator"], signal.SIGINT)])
def test_a_signal_while_a_server_hangs_ends_the_run(tiny, tmp_path, jsonl, serve, arguments,
                                                    number):
    """Without its first step the run leaves no folder."""
    asked, released = threading.Event(), threading.Event()

    def behave(handler, body):
        if handler.path == "/v1/models":
            return handler.reply({"data": [{"id": "s", "root": str(tiny)}]})
        asked.set()
        released.wait(60)

    server = serve(behave)
    data = jsonl("questions.jsonl", [question(i) for i in range(4)])
    arguments = [*arguments, "--data", data, "--model", tiny, "--out", tmp_path / "out"]
    arguments += (["--url", server.url] if "http" in arguments
                  else ["--simulator", f"{server.url}/v1"])
    process = subprocess.Popen([sys.executable, "-c", SEARCHING, *map(str, arguments)], cwd=ROOT)
    try:
        assert asked.wait(120)
        process.send_signal(number)
        assert process.wait(15) == 128 + number
    finally:
        released.set()
        process.kill()
    assert not (tmp_path / "out").exists()


BY_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import train_rl as rl
from plumbing.served import ServerGenerator
from plumbing.text import encode

def write_turn(active, setup, step, turn):
    for e in active:
        text = "<answer> Lima </answer>" if turn else "<search> a </search>"
        e.write(ids := encode(setup.tokenizer, text), [-1.0] * len(ids))
        e.turns.append(rl.Turn(text, "invalid"))

class Policy(ServerGenerator):
    def load_weights(self, weights): ...

if sys.argv.pop(1) == "policy":
    url = sys.argv.pop(1)
    rl.load_generator = lambda *_: Policy([url])
else:
    rl.write_turn = write_turn
rl.run_cli(rl.app)
"""  # a policy that searches and answers; or a served one, which takes no new weights else


@pytest.mark.slow
@pytest.mark.parametrize("served,end", [("simulator", "hangs"), ("policy", "hangs"),
                                        ("simulator", "fails")])
def test_two_ranks_whose_server_is_at_fault_lose_no_step(tiny, tokenizer, tmp_path, jsonl, serve,
                                                         served, end):
    """From the third step's requests on, four of each step. A server that hangs holds up both
    ranks; SIGTERM: the steps are in a checkpoint within 10 s, the processes have ended within 15.
    One that fails ends the run."""
    out, sound, released = tmp_path / "out", itertools.count(), threading.Event()
    log, hung = out / "metrics.jsonl", []
    text = {"policy": "<answer> Lima </answer>", "simulator": "1. a\n2. b"}[served]
    ids = encode(tokenizer, text)
    choice = {"text": text, "finish_reason": "stop", "stop_reason": None, "token_ids": ids,
              "logprobs": {"token_logprobs": [-1.0] * len(ids)}}

    def behave(handler, body):
        if handler.path == "/v1/models":
            return handler.reply({"data": [{"id": "s", "root": str(tiny)}]})
        if next(sound) < 8 or released.is_set():
            return handler.reply({"choices": [choice]})
        hung.append(body)
        if end == "hangs":
            released.wait(120)
        return handler.reply({}, 400)

    def start(*flags):
        return subprocess.Popen([*TWO_PROCESSES, script, served, *map(str, arguments), *flags],
                                cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})

    url, script = f"{serve(behave).url}/v1", tmp_path / "script.py"
    script.write_text(BY_SCRIPT.format(root=str(ROOT)))
    data = jsonl("questions.jsonl", [question(i) for i in range(4)])
    arguments = ["train", "--data", data, "--model", tiny, "--out", out, *BUDGET, "--kl-coef", 0,
                 "--steps", 4, *(["--simulator", url] if served == "simulator" else
                                 ["--engine", "none"])]
    arguments[:0] = [url] * (served == "policy")
    process = start()
    try:
        wait_for(lambda: len(hung) >= 4 and log.read_bytes().count(b"\n") == 2, process)
        if end == "hangs":
            process.terminate()
        signalled = time.time()
        _, said = process.communicate(timeout=60)
        ended = time.time() - signalled
    finally:
        released.set()
        process.kill()
    assert process.returncode == 1, said[-3000:]  # the launcher's own code
    saved = checkpoints.checkpoint_folder(out, 2)
    assert saved.is_dir() and saved.parent.stat().st_mtime - signalled < 10 and ended < 15
    assert end == "hangs" or "; 2 steps are saved: --resume goes on" in said
    before = read_lines(log)
    process = start("--resume")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    assert read_lines(log)[:2] == before and len(read_lines(log)) == 4


def wait_for(condition, process):
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
