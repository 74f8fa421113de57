"""Runs that are killed, or stopped by a signal, end like runs that were not: bit for bit.

Each stage runs on tiny models. 30 SIGKILLs: at any instant, or within a write (half a line, a file
before its flush, a rename, the saving of a checkpoint). 20 signals (SIGTERM and SIGINT): at any
instant, or while a served simulator or a retrieval server hangs; the seconds to the checkpoint and
to the exit are taken. The log is written anew after each.

    python results/kills/run.py --out results/kills/README.md     # ten minutes
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

# before torch: a child of fork hangs in the thread pool that the parent has started
os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests"))
import torch

import evaluate
import sft_simulator as sim
import train_rl as rl
from helpers import (BUDGET, PROMPTS, TIMES, Server, corpus_rows, make_model, make_tokenizer,
                     question, tune)
from plumbing import checkpoints, files, runfolder, web
from plumbing.cli import UserError, make_app, markdown_table, run_cli
from plumbing.engines import ENGINES, Engine
from plumbing.models import save_model
from plumbing.rates import peak_flops
from plumbing.scorer import Sequence
from plumbing.text import encode

app = make_app(__doc__)
LONGEST_SAVE, LONGEST_STOP = 10.0, 15.0  # seconds from a signal to the checkpoint, to the exit
PATIENCE = 300.0  # seconds for what must happen in a run


def fork(work, log: Path) -> int:
    """Do work in a process of its own (which has all modules already); its id."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    try:
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(place: Path, where: str) -> None:
    place.write_text(where)
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_write(place: Path, kind: str, number: int) -> None:
    """Let this process be killed within its `number`-th write of a kind."""
    calls = []

    def counted(function, before):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                before(*args)
            return function(*args, **kwargs)
        return call

    def half_a_line(path, rows):
        text = "".join(json.dumps(row) for row in rows).encode()
        with open(path, "ab") as file:
            file.write(text[: len(text) // 2])
        die(place, f"half a line of {path.name}")

    if kind == "line":
        for chapter in (sim, rl, evaluate):
            chapter.append_jsonl = counted(files.append_jsonl, half_a_line)
    elif kind == "flush":
        os.fsync = counted(os.fsync, lambda descriptor: die(
            place, f"before a flush of {Path(f'/proc/self/fd/{descriptor}').readlink().name}"))
    elif kind == "rename":
        Path.rename = counted(Path.rename, lambda path, to: die(
            place, f"before {path.name} is renamed {to.name}"))
    else:
        saving = checkpoints.save_checkpoint
        later = random.Random(number).uniform(0, 0.05)
        checkpoints.save_checkpoint = counted(saving, lambda *_: threading.Timer(
            later, die, (place, f"{1000 * later:.0f} ms into saving a checkpoint")).start())


@dataclass
class World:
    """Tiny models and data in a folder, servers that hang on demand, a command for each stage.

    report: called after each kill, comparison and signal."""

    folder: Path
    report: Callable[["World"], None]
    stages: dict[str, list] = field(default_factory=dict)
    kills: list[list[str]] = field(default_factory=list)  # rows of the log's tables
    signals: list[list[str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self):
        rows = {"questions": [question(i, ("7",), hops=1 + i % 2) for i in range(8)],
                "corpus": corpus_rows(),
                "pairs": [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(48)],
                "trajectories": [self.trajectory(i) for i in range(48)]}
        for name, content in rows.items():
            files.write_jsonl(self.folder / f"{name}.jsonl", content)
        code = wait(fork(self.make_models, self.folder / "log"))
        assert code == 0, (self.folder / "log").read_text()
        self.hang = self.folder / "hang"
        self.server = self.serve()
        policy, tiny = self.folder / "policy", self.folder / "tiny"
        tuning = ["--model", tiny, "--batch-size", 4, "--lr", "1e-3", "--save-every", 12]
        data = ["--data", self.folder / "questions.jsonl", "--model", policy]
        simulator = ["--engine", "simulator", "--simulator"]
        budget = [*BUDGET, "--lr", "3e-4", "--steps", 8, "--kl-coef", "0.1", "--save-every", 2,
                  "--empty-steps", 99]
        answering = ["--batch-size", 2, "--tokens-per-turn", 24, "--max-searches", 2]
        self.stages = {
            "tuning": [sim, "train", self.folder / "pairs.jsonl", *tuning, "--epochs", 10],
            "warm-up": [rl, "warmup", self.folder / "trajectories.jsonl", *tuning, "--epochs", 3],
            "RL": [rl, "train", *data, *budget, *simulator, tiny],
            "evaluation": [evaluate, "run", *data, *answering, *simulator, tiny],
            "RL, served simulator": [rl, "train", *data, *budget, *simulator, f"{self.server}/v1"],
            "RL, retrieval server": [rl, "train", *data, *budget, "--engine", "http", "--url",
                                     self.server],
        }

    def trajectory(self, i: int) -> dict:
        turns = [{"text": f"<search> {i} </search>", "query": str(i), "documents": ["Lima."]},
                 {"text": "<answer> Lima </answer>"}]
        return question(i) | {"turns": turns}

    def make_models(self) -> None:
        """A random model, and a policy that searches or not, and answers 7 or 8."""
        tokenizer, sequences = make_tokenizer(), []
        for i in range(480):
            episode = rl.new_episode(question(i % 8), 0, tokenizer, PROMPTS)
            answer, searches = "78"[i // 8 % 2], i // 16 % 2
            for text in ["<search>it</search>"] * searches + [f"<answer>{answer}</answer>"]:
                episode.write(ids := encode(tokenizer, text), [0.0] * len(ids))
                episode.read(rl.observation_ids(tokenizer, ["a", "b"], 80))
            sequences.append(Sequence(episode.ids, episode.mask))
        model = make_model(len(tokenizer), initializer_range=0.05)
        save_model(make_model(len(tokenizer)), tokenizer, self.folder / "tiny")
        tune(model, sequences, sim.TuningSettings(out=self.folder, lr=1e-2, batch_size=4, epochs=2,
                                                  batch_tokens=10_000))
        save_model(model, tokenizer, self.folder / "policy")

    def serve(self) -> str:
        """The address of a simulator and retrieval server, which hangs while self.hang exists."""
        address = self.folder / "address"

        def behave(handler, body):
            if handler.path == "/v1/models":
                return handler.reply({"data": [{"id": "s", "root": str(self.folder / "tiny")}]})
            if self.hang.exists():
                (self.folder / "hanging").touch()
                if self.hang.read_text() == "half an answer":
                    handler.break_off()
                while self.hang.exists():
                    time.sleep(0.05)
            if handler.path == "/retrieve":
                texts = [{"contents": f"{n}\n{body['query']}"} for n in "ab"]
                return handler.reply({"result": [texts]})
            text = f"1. {body['seed']} a\n2. {len(body['prompt'])} b"
            choice = {"text": text, "finish_reason": "stop", "stop_reason": None}
            return handler.reply({"choices": [choice]})

        def run() -> None:
            address.write_text(Server(behave).url)
            threading.Event().wait()

        self.server_pid = fork(run, self.folder / "log")
        while not address.exists() or not address.read_text():
            time.sleep(0.02)
        return address.read_text()

    def start(self, stage: str, out: str, *flags: str, prepare=lambda: None) -> int:
        """Run a stage's command in a process of its own; its id."""
        module, *arguments = [*self.stages[stage], "--out", self.folder / out, *flags]

        def work() -> None:
            prepare()
            engine = Engine(lambda s: web.HTTPEngine(s.url, s.top_k, cache=self.folder
                                                     / f"searches-{os.getpid()}.sqlite"))
            ENGINES["http"] = engine
            sys.argv = [Path(module.__file__).name, *map(str, arguments)]
            run_cli(module.app)

        return fork(work, self.folder / "log")

    def finish(self, stage: str, out: str, *flags: str) -> float:
        """Run a stage to its end; seconds."""
        started = time.monotonic()
        code = wait(self.start(stage, out, *flags))
        assert code == 0, (stage, code, (self.folder / "log").read_text()[-3000:])
        return time.monotonic() - started

    def outcome(self, out: str) -> dict:
        """What a run ends with, but for times and rates."""
        folder, found = self.folder / out, {}
        for name in ("metrics.jsonl", "predictions.jsonl"):
            if (folder / name).exists():
                rows = files.read_jsonl(folder / name)
                found[name] = [{k: v for k, v in row.items() if not k.startswith(TIMES)
                                and k != "seconds"} for row in rows]
        for name in ("episodes.jsonl", "model/model.safetensors"):
            if (folder / name).exists():
                found[name] = (folder / name).read_bytes()
        return found

    def compare(self, stage: str, out: str, rows: list[list[str]]) -> None:
        """How a run ended beside a whole one, as the last column of its rows."""
        ours, theirs = self.outcome(out), self.outcome(f"whole-{stage}")
        different = [name for name in theirs if ours.get(name) != theirs[name]]
        different += ["no file"] * (not theirs)
        self.wrong += [f"{stage}: {name}" for name in different]
        for row in rows:
            row[-1] = f"DIFFERENT: {', '.join(different)}" if different else "equal"
        self.report(self)

    def state(self, out: str) -> list[str]:
        """Finished steps or answers, and the checkpoints on the disk."""
        folder, counts = self.folder / out, []
        for name in ("metrics.jsonl", "predictions.jsonl"):
            if (folder / name).exists():
                counts.append((folder / name).read_bytes().count(b"\n"))
        kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        return [str(sum(counts)), ", ".join(kept)]

    def kill(self, stage: str, seconds: float, draws: random.Random, kind: str | None) -> str:
        """Kill the run of a stage once; where it was hit, or "" if it had ended before."""
        out, place = stage.replace(" ", "-") + "-killed", self.folder / "place"
        place.unlink(missing_ok=True)
        resume = ["--resume"] * runfolder.is_run(self.folder / out)
        number = draws.randint(2, {"line": 3, "save": 2}.get(kind, 9))
        pid = self.start(stage, out, *resume, prepare=lambda: kind and die_in_a_write(
            place, kind, number))
        if kind is None:
            time.sleep(pause := draws.uniform(0.2, 0.8) * seconds)
            place.write_text(f"after {pause:.2f} s")
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        assert code in (0, -signal.SIGKILL), (self.folder / "log").read_text()[-3000:]
        return place.read_text() if code else ""

    def kill_often(self, stage: str, kinds: list[str | None], seed: int) -> None:
        """Kill a stage's run so often, resume it to its end, compare it with a whole run."""
        draws, out = random.Random(seed), stage.replace(" ", "-") + "-killed"
        seconds, rows = self.finish(stage, f"whole-{stage}"), []
        for kind in kinds:
            while not (where := self.kill(stage, seconds, draws, kind)):  # had ended: begun anew
                self.compare(stage, out, rows)
                shutil.rmtree(self.folder / out)
                rows = []
            rows.append([stage, where, *self.state(out), "not yet resumed"])
            self.kills.append(rows[-1])
            self.report(self)
        self.finish(stage, out, *["--resume"] * runfolder.is_run(self.folder / out))
        self.compare(stage, out, rows)

    def stop(self, stage: str, number: int, hang: str | None, seed: int) -> None:
        """Stop a stage's run by a signal, resume it, compare it with a whole run."""
        draws, out = random.Random(seed), f"stopped-{seed}"
        if not (self.folder / f"whole-{stage}").exists():
            self.finish(stage, f"whole-{stage}")
        hanging, log = self.folder / "hanging", self.folder / out / "metrics.jsonl"
        hanging.unlink(missing_ok=True)
        pid = self.start(stage, out)
        enough = draws.randint(1, 5)
        self.until(lambda: log.exists() and log.read_bytes().count(b"\n") >= enough)
        if hang:
            self.hang.write_text(hang)
            cache = self.folder / f"searches-{pid}.sqlite"  # from there on the server is asked
            self.until(lambda: cache.unlink(missing_ok=True) or hanging.exists())
        time.sleep(draws.random() / 5)
        started = time.time()
        os.kill(pid, number)
        code, exited = wait(pid), time.time() - started
        assert code == 128 + number, (code, (self.folder / "log").read_text()[-3000:])
        done = log.read_bytes().count(b"\n")
        checkpoint = checkpoints.checkpoint_folder(self.folder / out, done)
        assert checkpoint.is_dir(), done
        saved = max(0.0, checkpoint.parent.stat().st_mtime - started)  # of its renaming
        self.hang.unlink(missing_ok=True)
        self.signals.append([stage, signal.Signals(number).name, hang or "at any instant",
                             str(done), f"{saved:.1f}", f"{exited:.1f}", "not yet resumed"])
        if saved > LONGEST_SAVE or exited > LONGEST_STOP:
            self.wrong.append(f"{stage}: saved after {saved:.1f} s, ended after {exited:.1f} s")
        self.report(self)
        self.finish(stage, out, "--resume")
        self.compare(stage, out, self.signals[-1:])

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.01)


PAGE = """# {kills} SIGKILLs and {signals} signals

    {command}

Runs of tiny models (`hf` engine, one thread), ended again and again and resumed. The last column
compares the final weights, metrics, episodes and predictions (but for times and rates) with those
of a run that was not ended: "equal" is **bit for bit**. A run is killed several times and compared
once, so that its rows share a result.
Commit {commit}; {tflops:.2f} TFLOP/s in a {dtype} matrix product.

{killed}

SIGTERM and SIGINT lose no finished step: each is in a checkpoint at most {saved:.1f} s after the
signal (bound: {save_bound:g} s), and the process has ended after at most {exited:.1f} s (bound:
{stop_bound:g} s), whatever its threads wait for.

{stopped}
"""
KILLED = ["run", "SIGKILL", "lines of finished steps or answers", "checkpoints on disk", "end"]
STOPPED = ["run", "signal", "while the server gives", "steps done and saved",
           "seconds to the checkpoint", "seconds to the exit", "end"]
IN_WRITES = ["line", None, "flush", None, "save", None, "rename", None, "line", None]


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where the log goes.")],
    kills: Annotated[int, typer.Option(help="SIGKILLs, over four stages.")] = 30,
    signals: Annotated[int, typer.Option(help="Signals, half of them while a server hangs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the instants.")] = 0,
) -> None:
    """End runs, resume them, compare how they end, and write a log."""
    run = runfolder.describe_run()
    tflops = peak_flops(torch.device("cpu")) / 1e12

    def report(world: World) -> None:
        saved, exited = (max((float(row[i]) for row in world.signals), default=0) for i in (4, 5))
        out.write_text(PAGE.format(
            kills=len(world.kills), signals=len(world.signals), saved=saved, exited=exited,
            command=f"python {' '.join(sys.argv)}", commit=run["commit"], tflops=tflops,
            dtype=run["hardware"]["dtype"], save_bound=LONGEST_SAVE, stop_bound=LONGEST_STOP,
            killed=markdown_table(KILLED, world.kills, text_columns=5),
            stopped=markdown_table(STOPPED, world.signals, text_columns=3)))

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), report)
        try:
            stages = ("tuning", "RL", "evaluation", "warm-up")
            for i, stage in enumerate(stages):
                share = (kills + len(stages) - 1 - i) // len(stages)
                kinds = IN_WRITES[2 * (i % 2) :] * 3
                if stage == "evaluation":  # has no checkpoints
                    kinds = [kind for kind in kinds if kind not in ("save", "rename")]
                world.kill_often(stage, kinds[:share], seed + i)
            hangs = ("no answer", "half an answer")
            runs = [("RL, served simulator", hangs), ("tuning", None),
                    ("RL, retrieval server", hangs), ("RL", None)]
            for i in range(signals):
                stage, hang = runs[i % 4]
                number = (signal.SIGTERM, signal.SIGINT)[i // 4 % 2]
                world.stop(stage, number, hang and hang[i // 8 % 2], seed + 100 + i)
        finally:
            os.kill(world.server_pid, signal.SIGKILL)
    if world.wrong:
        raise UserError("; ".join(world.wrong))


if __name__ == "__main__":
    run_cli(app)
