"""Checkpoints: a run can be stopped at any time and resumed after its last whole step.

Accelerate saves and loads the state; it has no atomic write, and no checkpoint to go back to."""

import json
import logging
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from plumbing.cli import Settings, UserError, console, first_line, leave
from plumbing.files import flush, read_jsonl, set_lines_aside
from plumbing.models import save_model
from plumbing.runfolder import StopRun, begun, set_aside
from plumbing.signals import Signals, resume_command
from plumbing.text import clean

LOGS = ("metrics.jsonl", "episodes.jsonl")  # what a run appends at each step


def check_tracker(name: str | None) -> None:
    """Raise UserError if Accelerate has no such tracker, or its package is not installed."""
    if name is None:
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(map(str, LOGGER_TYPE_TO_CLASS))
        raise UserError(f"--logger {name}: Accelerate knows {known}")
    if name not in map(str, get_available_trackers()):
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

    def go_on(self) -> list[dict[str, Any]]:
        """Load the last checkpoint that is whole; `done` is then its steps. Returns their metrics.

        Says what is damaged, and goes back to the checkpoint before. Raises UserError if none can
        be loaded. Lines of later steps, and later checkpoints, are set aside."""
        main = self.accelerator.is_main_process
        whole = gather_object([whole_steps(self.out) if main else None])[0]
        saved = saved_steps(self.out)
        within = [step for step in saved if step <= whole]
        errors = []
        for step in within + [step for step in saved if step > whole]:
            error = load_checkpoint(self.accelerator, checkpoint_folder(self.out, step))
            if error is None:
                self.done = step
                break
            errors.append(error)
        if saved and not self.done:
            raise UserError(f"{'; '.join(errors)}: there is no other checkpoint; --overwrite "
                            "begins anew")
        if main:
            self.say_damage(errors, whole, saved)
            for later in (step for step in saved if step > self.done):
                set_aside(checkpoint_folder(self.out, later))
            for name in (*LOGS, "eval.jsonl"):
                keep_steps(self.out / name, self.done)
        self.accelerator.wait_for_everyone()
        log = self.out / LOGS[0]
        return read_jsonl(log, whole_lines=True) if log.exists() else []

    def say_damage(self, errors: list[str], whole: int, saved: list[int]) -> None:
        """Print why a run doesn't go on from its last checkpoint, or goes on without some lines."""
        errors = list(errors)
        for unfinished in (self.out / "checkpoints").glob("*.tmp"):
            errors.append(f"{unfinished} was left half-written: not used")
        if saved and whole < saved[0]:
            errors.append(f"{self.out}: {' or '.join(LOGS)} lacks lines of step {whole}")
        if whole < self.done:
            errors.append("no checkpoint is older: these lines are missing from the figures")
        elif saved and self.done < saved[0]:
            errors.append(f"going on from the checkpoint of step {self.done}")
        for error in errors:
            console.print(error, style="yellow", soft_wrap=True, markup=False)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Context of the training loop. On a signal: checkpoint of the steps done, then exit. On
        StopRun: the same, and the error says so."""
        self.signals = Signals()
        try:
            yield
        except KeyboardInterrupt:  # raised by `signals` only, never within an optimizer step
            save_checkpoint(self.accelerator, self.out, self.done)
            if self.accelerator.is_main_process:
                self.say_stopped()
            self._finish(128 + self.signals.number)
            raise typer.Exit(128 + self.signals.number) from None
        except StopRun as error:
            self.signals.allow(False)
            save_checkpoint(self.accelerator, self.out, self.done)
            self.accelerator.wait_for_everyone()  # a rank that ends may take the others with it
            saved = f"; {self.done} steps are saved: --resume goes on" if self.done else ""
            raise StopRun(f"{error}{saved}") from None
        finally:
            self.signals.restore()

    def say_stopped(self) -> None:
        """Print how many steps are saved and, on one line of stderr, the command to go on."""
        if not self.done:
            console.print("stopped before the first step was done: nothing is saved")
            return
        launched = self.accelerator.num_processes > 1
        options = " (with the launcher's own options, if it had any)" * launched
        console.print(f"stopped after {self.done} steps, which are saved; to go on{options}:")
        print(resume_command(self.accelerator.num_processes), file=sys.stderr)

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Context of work that a signal may stop at once. All ranks then drop the step."""
        with suppress(KeyboardInterrupt):  # stops this rank only; `forbid_abort` tells the others
            self.signals.allow(True)
            yield
            self.signals.allow(False)
        self.forbid_abort()
        self.allow_abort()

    def allow_abort(self) -> None:
        """Until `forbid_abort` a signal may stop the step, unless other ranks would wait for it."""
        self.signals.allow(self.accelerator.num_processes == 1)

    def forbid_abort(self) -> None:
        """Drop the step on all ranks if any got a signal. Later ones wait for the step's end."""
        self.signals.agree()

    def step_done(self, steps: int, of: int) -> None:
        """Record that `steps` steps are done; save a checkpoint if one is due and steps < of."""
        self.done = steps
        if self.accelerator.is_main_process:
            begun(self.out)
        if steps % self.every == 0 and steps < of:
            save_checkpoint(self.accelerator, self.out, steps)

    def end(self, model, tokenizer) -> None:
        """End a complete run: a checkpoint, then the model in OUT/model; close the trackers."""
        try:
            save_checkpoint(self.accelerator, self.out, self.done)
        finally:  # a disk too full for a checkpoint may have room for the model alone
            with writing(self.out / "model"):
                save_model(model, tokenizer, self.out / "model")
        if self.accelerator.is_main_process:
            console.print(f"model saved: {self.out / 'model'}")
        self._finish(0)

    def _finish(self, code: int) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        leave(self.accelerator.state, code)


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def saved_steps(out: Path) -> list[int]:
    """Steps done at each checkpoint of a run, the last first."""
    folders = (out / "checkpoints").glob("step-??????")
    return sorted((int(folder.name[5:]) for folder in folders), reverse=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context of writing to `path`: an error becomes a UserError, in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} can't be written: {first_line(error)}; older checkpoints are as "
                        "they were: --resume") from None


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
    with writing(temporary):
        accelerator.save_state(temporary)
        if accelerator.is_main_process and (out / "config.json").exists():
            shutil.copy(out / "config.json", temporary)  # see runfolder.read_config
        flush([path for path in temporary.rglob("*") if path.is_file()] + [temporary])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        temporary.rename(final)
        flush([final.parent])
        for old in saved_steps(out)[2:]:
            shutil.rmtree(checkpoint_folder(out, old))


def load_checkpoint(accelerator: Accelerator, folder: Path) -> str | None:
    """Load a checkpoint. Returns what is wrong with it, if anything, of any rank."""
    error, place = None, folder
    try:
        for place in folder.iterdir():
            check_file(place)
        place = folder
        if not any(folder.glob("random_states_*.pkl")):  # Accelerate would go on without them
            raise FileNotFoundError("no random states")
        accelerator.load_state(folder)
    except Exception as problem:  # noqa: BLE001 (a damaged file can raise anything)
        error = f"{place} can't be loaded: {clean(str(problem) or repr(problem), 300)}"
    return next(filter(None, gather_object([error])), None)


def check_file(path: Path) -> None:
    """Raise an error unless a file of a checkpoint is whole."""
    if path.suffix in (".bin", ".pkl"):  # of torch.save: an archive with checksums
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # compares the file's length with its header
            pass


def step_of(line: bytes) -> int | None:
    """The step of a line of a log; None if it was cut short or is damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError):
        return None


def whole_steps(out: Path) -> int:
    """Steps, from the first on, whose lines are all in each log."""
    whole = []
    for path in (out / name for name in LOGS):
        if path.exists():
            with open(path, "rb") as lines:
                steps = Counter(map(step_of, lines))
            full, step = max(steps.values(), default=0), 0  # every step has as many lines
            while steps[step] == full > 0:
                step += 1
            whole.append(step)
        elif path.name == LOGS[0]:
            return 0
    return min(whole)


def keep_steps(path: Path, steps: int) -> None:
    """Keep a log's lines of the first steps. Later ones and damaged ones go to *.set-aside."""
    set_lines_aside(path, lambda _, line: (step := step_of(line)) is not None and step < steps)
