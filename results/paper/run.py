"""The paper in miniature: train and test every arm of arms.toml; page.py makes the page of it.

\b
    PY=.venv/bin/python
    $PY results/paper/run.py                     # what is missing; hours
    $PY results/paper/run.py r1 --seeds 0        # one arm
    $PY results/paper/run.py r1 --out runs/mine  # again, for yourself
    $PY results/paper/page.py                    # the pages beside this file, in seconds

`make demo` comes first: all arms start from its simulator and its warm start, with the settings of
its RL run, which is itself the arm without a change (as are the runs of `results/demo/run.sh
seeds`, if they are there). This script calls the chapters' own commands in a work folder
(runs/paper/ARM-SEED, or OUT/ARM-SEED.work) and copies what the page needs into OUT/ARM-SEED, each
file when its stage is done; so a killed driver goes on, and several drivers share the arms: each
takes one that nobody else holds.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

# first: here `evaluate` is chapter 3, not the package
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_rl as rl
from plumbing.cli import UserError, console, make_app, option_name, run_cli
from plumbing.files import read_jsonl, write_json, write_jsonl
from plumbing.rates import peak_flops
from plumbing.runfolder import Lock, read_config
from plumbing.text import ROOT
from arms import HERE, Arm, Cell, Out, list_cells, read_arms

DEMO, RUNS = ROOT / "runs/demo", ROOT / "runs/paper"
TESTS = {"clean": ["evaluate.py", "run"], "noisy": [str(HERE / "noisy.py"), "run"]}
KEPT = ("id", "question", "golden_answers", "answer", "hops", "end", "searches", "tokens",
        "seconds")

app = make_app(__doc__)


# ---------------------------------------------------------------- commands of one arm


def demo_settings() -> dict[str, Any]:
    """The settings of the demo's RL run. Raises UserError if there is none."""
    if not (DEMO / "policy/model").is_dir():
        raise UserError(f"{DEMO}/policy holds no trained policy: make demo comes first")
    return read_config(DEMO / "policy")["settings"]


def demo_run(cell: Cell) -> Path | None:
    """The RL run of the demo that is this cell: the arm without a change, of the demo's seed or one
    of those that `results/demo/run.sh seeds` adds. None if there is none."""
    if cell.arm.train or cell.arm.method:
        return None
    runs = [run for run in (DEMO / "policy", DEMO / f"policy-{cell.seed}")
            if (run / "model").is_dir()]
    return next((run for run in runs if read_config(run)["settings"]["seed"] == cell.seed), None)


def train_command(arm: Arm, seed: int, out: Path, demo: dict[str, Any]) -> list[str]:
    """The demo's settings with the arm's changes, less those that then have no effect."""
    values = demo | (arm.train or {}) | {"seed": seed, "out": str(out), "save_every": 2}
    values |= {"resume": False, "overwrite": False, "keep_best": False}
    typed = {f.name: values[f.name] for f in dataclasses.fields(rl.TrainSettings)
             if f.name in values}
    for name in rl.TrainSettings(**typed).unused():
        typed.pop(name, None)
    return ["train_rl.py", "train", *as_options(typed), *resume(out)]


def as_options(values: dict[str, Any]) -> list[str]:
    """Settings of `train` as its command line: those that differ from the defaults."""
    options = []
    for field in dataclasses.fields(rl.TrainSettings):
        value, name = values.get(field.name, field.default), option_name(field)
        if value == field.default or value is None:
            continue
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        else:
            options += [f"--{name}", str(value)]
    return options


def test_command(arm: Arm, test: str, model: str, out: Path, demo: dict[str, Any]) -> list[str]:
    """The arm's model on the test questions, with the demo's limits, greedy."""
    engine = {"clean": "bm25", "noisy": "bm25-noisy"}[test] if arm.searches else "none"
    limits = [part for name in ("top_k", "max_searches", "tokens_per_turn", "context_tokens",
                                "observation_tokens", "generator")
              for part in (f"--{name.replace('_', '-')}", str(demo[name]))]
    questions = read_arms()[1]["questions"]
    return [*TESTS[test], "--method", arm.method or "agent", "--model", model, "--benchmark",
            "world", "--engine", engine, "--limit", str(questions), *limits, "--out", str(out),
            *resume(out)]


def resume(out: Path) -> list[str]:
    """The option that goes on with a run, if there is one."""
    return ["--resume"] if (out / "config.json").exists() else []


def call(command: list[str]) -> None:
    """Run a chapter's command. Raises UserError if it fails; a signal's exit code goes on."""
    print(" ".join(["python", *command]), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code in (130, 143):
        raise typer.Exit(code)
    if code:
        raise UserError(f"{command[0]} failed, see above")


# ---------------------------------------------------------------- run


def work_folder(cell: Cell) -> Path:
    """Where an arm is trained and tested, until its results are kept."""
    out = cell.out.resolve()
    return RUNS / cell.name if out == HERE else out / f"{cell.name}.work"


def play(cell: Cell) -> None:
    """Do what is missing of an arm, and keep its results."""
    demo, folder = demo_settings(), work_folder(cell)
    policy = demo_run(cell) or folder / "policy"
    model = cell.arm.model if cell.arm.method else str(policy / "model")
    for stage in cell.missing():
        if stage == "train":
            if policy.parent == folder:
                call(train_command(cell.arm, cell.seed, policy, demo))
            keep_training(policy, cell.out / cell.name)
        else:
            call(test_command(cell.arm, stage, model, folder / stage, demo))
            keep_test(folder / stage, cell.kept(f"{stage}.jsonl"))
    shutil.rmtree(folder, ignore_errors=True)  # gigabytes: weights and checkpoints


def keep_training(run: Path, to: Path) -> None:
    """Copy a training run's files, the metrics last: their being there says that it is done."""
    write_json(to / "config.json", settings_of(run))
    for name in ("episodes.jsonl", "eval.jsonl", "metrics.jsonl"):
        if (run / name).exists():
            shutil.copy(run / name, to / f"{name}.part")
            os.replace(to / f"{name}.part", to / name)


def keep_test(run: Path, to: Path) -> None:
    """Keep predictions without their token ids and documents, and how they were made."""
    write_json(to.with_suffix(".config.json"), settings_of(run))
    rows = read_jsonl(run / "predictions.jsonl")
    write_jsonl(to, [{key: row[key] for key in KEPT} for row in rows])


def settings_of(run: Path) -> dict[str, Any]:
    """A run's config.json, its paths from the root of the repository on."""
    return json.loads((run / "config.json").read_text(encoding="utf-8").replace(f"{ROOT}/", ""))


def step_work(run: Path) -> float | None:
    """FLOPs that the machine of a training run could have done in one of its steps, the median; its
    rate is that of a matrix product, measured as the run began. None: there is no such run."""
    rows = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    work = [row["time/step"] * row["rate/update_tflops"] * 1e12 / row["rate/mfu"]
            for row in rows if row.get("rate/mfu")]
    return statistics.median(work) if work else None


def estimate(left: list[Cell], steps: int) -> str:
    """A sentence on how long the training of these cells takes on this machine: as many times the
    demo's own seconds, at today's rate, as the arm took of the demo's where both are kept.

    (Rates alone mislead: at a seventh of the rate, in float32, a step takes four times as long.)
    """
    rate = peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kept: dict[str, list[float]] = {}
    for cell in list_cells([], [], HERE):
        if work := step_work(HERE / cell.name):
            kept.setdefault(cell.arm.name, []).append(work)
    demo = next(arm.name for arm in read_arms()[0].values() if not (arm.train or arm.method))
    times = {name: statistics.median(work) / statistics.median(kept[demo])
             for name, work in kept.items() if demo in kept}
    longest = max([1.0, *times.values()])  # for an arm that nobody has run
    trained = [cell for cell in left if "train" in cell.missing() and not demo_run(cell)]
    seconds = steps * (step_work(DEMO / "policy") or 0.0) / rate * sum(
        times.get(cell.arm.name, longest) for cell in trained)
    tests = sum(len(set(cell.missing()) - {"train"}) for cell in left)
    return (f"{len(left)} arms and seeds: {steps * len(trained)} optimisation steps, some "
            f"{seconds / 3600:.1f} hours at this machine's {rate / 1e12:.2f} TFLOP/s, and {tests} "
            "tests of some minutes each")


@app.command()
def run(
    arms: Annotated[list[str] | None, typer.Argument(help="Names of arms.toml; all.")] = None,
    seeds: Annotated[list[int], typer.Option(help="Of trained arms; as in arms.toml.")] = (),
    out: Out = HERE,
) -> None:
    """Train and test what is missing. Says first how long it takes."""
    left = [cell for cell in list_cells(arms or [], list(seeds), out) if cell.missing()]
    if not left:
        return console.print("nothing is missing")
    console.print(estimate(left, demo_settings()["steps"]), soft_wrap=True)
    for cell in left:
        try:
            lock = Lock(work_folder(cell).with_suffix(".lock"))
        except UserError as error:  # another driver is at it
            console.print(f"{cell.name}: {error}", style="yellow", markup=False, soft_wrap=True)
            continue
        try:
            play(cell)
        finally:
            lock.release()


if __name__ == "__main__":
    run_cli(app)
