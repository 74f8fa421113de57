"""Checkpoints and signals: a run can be stopped at any instant, and goes on from its last whole step."""

import json
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from safetensors import SafetensorError

from plumbing.cli import Settings, UserError, console, first_line, leave
from plumbing.files import check_same_run, read_jsonl, write_jsonl


def check_tracker(name: str | None) -> None:
    """Raises UserError if Accelerate has no such tracker, or its package is not installed."""
    if name is not None and name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"--logger {name}: Accelerate knows {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}")
    if name is not None and name not in map(str, get_available_trackers()):
        raise UserError(f"--logger {name} needs a package that is not installed: pip install {name}")


class Checkpoints:
    """A run's checkpoints, and its answer to SIGTERM and SIGINT: the whole steps are saved, and the process ends."""

    def __init__(self, accelerator: Accelerator, out: Path, every: int):
        self.accelerator, self.out, self.every, self.done = accelerator, out, every, 0

    def go_on(self, step: int) -> list[dict[str, Any]]:
        """Load the checkpoint of so many steps; returns the lines of metrics up to there."""
        if step:
            load_checkpoint(self.accelerator, self.out, step)
        if self.accelerator.is_main_process:
            set_lines_aside(self.out, step)
        self.accelerator.wait_for_everyone()
        return read_jsonl(self.out / "metrics.jsonl") if step else []

    @contextmanager
    def stoppable(self, start: int) -> Iterator[None]:
        """Around the loop over steps, `start` of which are done: what a signal ends is saved, and can go on."""
        self.done, self.signals = start, Signals()
        try:
            yield
        except KeyboardInterrupt:  # raised by `signals` alone, while the weights are those of whole steps
            save_checkpoint(self.accelerator, self.out, self.done)
            if self.accelerator.is_main_process:
                launched = self.accelerator.num_processes > 1
                options = " (with the launcher's own options, if it had any)" * launched
                console.print(f"stopped after {self.done} steps, which are saved; to go on{options}:")
                print(resume_command(self.accelerator.num_processes), file=sys.stderr)
            self._finish(128 + self.signals.number)
            raise typer.Exit(128 + self.signals.number) from None

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Around work that a signal may end at once. All ranks then drop the step."""
        with suppress(KeyboardInterrupt):  # it ends this rank's work; `agree` tells the others
            self.signals.allow(True)
            yield
            self.signals.allow(False)
        self.signals.agree()
        self.signals.allow(self.accelerator.num_processes == 1)  # several would wait for each other

    def agree(self) -> None:
        """Drop the step on all ranks if a signal has come to any. From here on it waits for the step's end."""
        self.signals.agree()

    def step_done(self, steps: int, of: int) -> None:
        """So many steps are done: write a checkpoint if one is due. The last step has the model itself."""
        self.done = steps
        if steps % self.every == 0 and steps < of:
            save_checkpoint(self.accelerator, self.out, steps)

    def end(self, text: str) -> None:
        """The run is complete: say so, close the trackers, and leave."""
        if self.accelerator.is_main_process:
            console.print(text)
        self._finish(0)

    def _finish(self, code: int) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        leave(self.accelerator.state, code)


class Signals:
    """SIGTERM and SIGINT: all ranks drop the same step and save what came before it. A second signal ends the process at once.

    A signal raises KeyboardInterrupt: where that is allowed as it comes, elsewhere at the next `allow` or `agree`."""

    def __init__(self):
        self.number, self.allowed = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.arrived)

    def arrived(self, number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
        self.number = number
        self.allow(self.allowed)

    def allow(self, allowed: bool) -> None:
        """Whether a signal may end this rank's work here; one that waits does so now."""
        self.allowed = allowed
        if allowed and self.number:
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Raise KeyboardInterrupt on every rank if a signal has come to any. From here on none ends a rank's work alone."""
        self.allowed = False
        self.number = max(gather_object([self.number]))
        if self.number:
            raise KeyboardInterrupt


def resume_command(processes: int) -> str:
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    return shlex.join([*launcher, *(a for a in sys.argv if a not in ("--overwrite", "--resume")), "--resume"])


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Weights, optimizers and random states after `step` steps: written under another name, flushed, then renamed.

    That is all there is: the place in the data, the noise and every draw of a generator are functions of seed and step."""
    final = checkpoint_folder(out, step)
    if step == 0 or final.exists():
        return
    temporary = final.with_name(final.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # it warns of tied weights, every time
    try:
        accelerator.save_state(temporary)
        flush([path for path in temporary.rglob("*") if path.is_file()] + [temporary])
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{temporary} can't be written: {first_line(error)}; older checkpoints are as they were") from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        temporary.rename(final)
        flush([final.parent])
        for old in sorted(final.parent.glob("step-??????"))[:-2]:
            shutil.rmtree(old)


def flush(paths: list[Path]) -> None:
    """Bring files, or the names in a folder, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def find_checkpoint(out: Path, settings: Settings) -> int:
    """Steps done at the last whole checkpoint of OUT, 0 without one. Raises UserError if the run used other settings."""
    check_same_run(out, settings)
    saved = sorted((out / "checkpoints").glob("step-??????"))
    return int(saved[-1].name[5:]) if saved else 0


def load_checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    folder = checkpoint_folder(out, step)
    try:
        accelerator.load_state(folder)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not fit this run's model: {first_line(error)}") from None


def set_lines_aside(out: Path, step: int) -> None:
    """Move the lines of metrics and episodes that came after the checkpoint, and a line cut short, to another file."""
    for unfinished in (out / "checkpoints").glob("*.tmp"):
        console.print(f"{unfinished} was left half-written: not used", style="yellow", soft_wrap=True)
    for name in ("metrics.jsonl", "episodes.jsonl"):
        if not (out / name).exists():
            continue
        with open(out / name, encoding="utf-8") as file:
            lines = list(file)  # cut at line feeds alone: a text may hold the other separators of Unicode
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [row for row in rows if row["step"] < step]
        with open(out / f"{name}.set-aside", "a", encoding="utf-8") as aside:
            aside.writelines(lines[len(kept) :])
        write_jsonl(out / name, kept)
