"""Checkpoints and signals: a run can be stopped at any time and resumed after its last whole step.

Accelerate saves and loads the state; it has no atomic write and no handling of signals."""

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
from plumbing.files import read_jsonl, write_jsonl
from plumbing.runfolder import begun


def check_tracker(name: str | None) -> None:
    """Raise UserError if Accelerate has no such tracker, or its package is not installed."""
    if name is not None and name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(map(str, LOGGER_TYPE_TO_CLASS))
        raise UserError(f"--logger {name}: Accelerate knows {known}")
    if name is not None and name not in map(str, get_available_trackers()):
        raise UserError(f"--logger {name} needs a package that is not installed: "
                        f"pip install {name}")


def start_tracker(accelerator: Accelerator, name: str | None, settings: Settings) -> None:
    """Tell Accelerate's tracker, if the run has one, its settings."""
    if name is not None:
        values = settings.record().items()
        values = {n: v if isinstance(v, int | float) else str(v) for n, v in values}
        accelerator.init_trackers("zerosearch", values)


class Checkpoints:
    """A run's checkpoints. A signal makes it save the whole steps and exit."""

    def __init__(self, accelerator: Accelerator, out: Path, every: int):
        self.accelerator, self.out, self.every, self.done = accelerator, out, every, 0

    def go_on(self, step: int) -> list[dict[str, Any]]:
        """Load the checkpoint after `step` steps; returns the lines of metrics up to there."""
        if step:
            load_checkpoint(self.accelerator, self.out, step)
        if self.accelerator.is_main_process:
            set_lines_aside(self.out, step)
        self.accelerator.wait_for_everyone()
        return read_jsonl(self.out / "metrics.jsonl") if step else []

    @contextmanager
    def stoppable(self, start: int) -> Iterator[None]:
        """Context of the training loop, `start` steps done. On a signal: checkpoint, then exit."""
        self.done, self.signals = start, Signals()
        try:
            yield
        except KeyboardInterrupt:  # raised by `signals` only, never within an optimizer step
            save_checkpoint(self.accelerator, self.out, self.done)
            if self.accelerator.is_main_process:
                launched = self.accelerator.num_processes > 1
                options = " (with the launcher's own options, if it had any)" * launched
                console.print(f"stopped after {self.done} steps, which are saved; "
                              f"to go on{options}:")
                print(resume_command(self.accelerator.num_processes), file=sys.stderr)
            self._finish(128 + self.signals.number)
            raise typer.Exit(128 + self.signals.number) from None

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Context of work that a signal may stop at once. All ranks then drop the step."""
        with suppress(KeyboardInterrupt):  # stops this rank only; `agree` tells the others
            self.signals.allow(True)
            yield
            self.signals.allow(False)
        self.signals.agree()
        self.signals.allow(self.accelerator.num_processes == 1)  # several ranks would deadlock

    def agree(self) -> None:
        """Drop the step on all ranks if any got a signal. Later ones wait for the step's end."""
        self.signals.agree()

    def step_done(self, steps: int, of: int) -> None:
        """Record that `steps` steps are done; save a checkpoint if one is due and steps < of."""
        self.done = steps
        if self.accelerator.is_main_process:
            begun(self.out)
        if steps % self.every == 0 and steps < of:
            save_checkpoint(self.accelerator, self.out, steps)

    def end(self, text: str) -> None:
        """End a complete run: print `text`, close the trackers, exit on several ranks."""
        if self.accelerator.is_main_process:
            console.print(text)
        self._finish(0)

    def _finish(self, code: int) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        leave(self.accelerator.state, code)


class Signals:
    """SIGTERM and SIGINT: all ranks drop the same step. A second signal kills the process.

    A signal raises KeyboardInterrupt: at once if allowed, else at the next `allow` or `agree`."""

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
        """Set whether a signal may stop this rank at once; a pending one does so now."""
        self.allowed = allowed
        if allowed and self.number:
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Raise KeyboardInterrupt on all ranks if any got a signal. Later signals are pending."""
        self.allowed = False
        self.number = max(gather_object([self.number]))
        if self.number:
            raise KeyboardInterrupt


def resume_command(processes: int) -> str:
    several = ["accelerate", "launch", "--num_processes", str(processes)]
    arguments = [a for a in sys.argv if a not in ("--overwrite", "--resume")]
    return shlex.join([*(["python"] if processes == 1 else several), *arguments, "--resume"])


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Save weights, optimizers and random states after `step` steps: write to a temporary folder,
    flush, rename. Keeps the last two. Raises UserError if writing fails.

    No other state exists: data order, noise and sampling seeds are functions of seed and step."""
    final = checkpoint_folder(out, step)
    if step == 0 or final.exists():
        return
    temporary = final.with_name(final.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # no tied-weight warning
    try:
        accelerator.save_state(temporary)
        flush([path for path in temporary.rglob("*") if path.is_file()] + [temporary])
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{temporary} can't be written: {first_line(error)}; "
                        "older checkpoints are as they were") from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        temporary.rename(final)
        flush([final.parent])
        for old in sorted(final.parent.glob("step-??????"))[:-2]:
            shutil.rmtree(old)


def flush(paths: list[Path]) -> None:
    """Flush files, or the entries of a folder, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def find_checkpoint(out: Path) -> int:
    """Steps done at the last checkpoint of `out`, 0 without one."""
    saved = sorted((out / "checkpoints").glob("step-??????"))
    return int(saved[-1].name[5:]) if saved else 0


def load_checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    folder = checkpoint_folder(out, step)
    try:
        accelerator.load_state(folder)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not fit this run's model: {first_line(error)}") from None


def set_lines_aside(out: Path, step: int) -> None:
    """Move lines of metrics, episodes and evaluations after the checkpoint, and an incomplete last
    line, to *.set-aside."""
    for unfinished in (out / "checkpoints").glob("*.tmp"):
        text = f"{unfinished} was left half-written: not used"
        console.print(text, style="yellow", soft_wrap=True)
    for name in ("metrics.jsonl", "episodes.jsonl", "eval.jsonl"):
        if not (out / name).exists():
            continue
        with open(out / name, encoding="utf-8") as file:
            lines = list(file)  # unlike splitlines(), splits at line feeds only
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [row for row in rows if row["step"] < step]
        with open(out / f"{name}.set-aside", "a", encoding="utf-8") as aside:
            aside.writelines(lines[len(kept) :])
        write_jsonl(out / name, kept)
