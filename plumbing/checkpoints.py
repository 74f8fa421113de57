"""Checkpoints and signals: a run can be stopped at any instant, and goes on from its last whole step."""

import json
import logging
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from plumbing.cli import UserError, console, first_line
from plumbing.files import check_same_run, write_jsonl


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


def find_checkpoint(out: Path, settings: dict[str, Any]) -> int:
    """Steps done at the last whole checkpoint of OUT, 0 without one. Raises UserError if the run used other settings."""
    check_same_run(out, settings, free=("save_every", "logger", "preset", "failed_searches"))
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
