"""Run folders: one run each, locked while it goes on, replaced only once another has begun.

A folder holds config.json (settings, wording of the prompts, checksums of what is read, versions,
commit, hardware) and what the stage writes. Until a new run has done its first step, what it
replaces lies in REPLACED inside the folder; a start that fails before that puts it back."""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from plumbing.cli import Settings, UserError, console, option, option_name
from plumbing.files import sha256, write_json
from plumbing.text import ROOT, Prompts

LOCK = ".lock"
REPLACED = "replaced"
MOVING = "replaced.tmp"  # some files of the old run are in it, the others still in the run folder
GONE = "replaced.gone"  # being deleted
OWN = (LOCK, REPLACED, MOVING, GONE)


class StopRun(UserError):
    """Ends a run on all ranks, before the next step has changed a weight: the steps done are saved.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSettings(Settings):
    """The run folder of a stage."""

    out: Path = option(help="Run folder.", resumable=True)
    resume: bool = option(False, "Go on with the run that --out holds.", resumable=True)
    overwrite: bool = option(False, "Replace the run that --out holds.", resumable=True)


class RunFolder:
    """The folder of a stage's run, from its first check to its end: `with RunFolder(...)`.

    Entering it locks the folder and raises UserError if this run may not have it. `open`, once all
    that the run needs has loaded, makes it the run's; `begun` tells that its first step is done.
    Prompts and inputs: what a resumed run must find unchanged. Only the main rank touches files."""

    def __init__(self, s: FolderSettings, prompts: Prompts, main: bool = True,
                 **inputs: Path | None):
        self.s, self.main, self.prompts = s, main, prompts
        self.inputs = {name: path for name, path in inputs.items() if path is not None}

    def __enter__(self) -> "RunFolder":
        if self.main:
            self.lock = Lock(self.s.out)
            try:
                self.check()
            except BaseException:
                self.lock.release()
                raise
        return self

    def check(self) -> None:
        """Raise UserError unless this run may have the folder."""
        out = self.s.out
        finish_moves(out)
        if self.s.resume:
            self.check_same_run(read_config(out))
            return
        if missing := [path for path in self.inputs.values() if not Path(path).exists()]:
            raise UserError(f"{missing[0]}: no such file")
        put_back(out)  # of a run that was killed before its first step
        if is_run(out):
            if not self.s.overwrite:
                raise UserError(f"{out} already holds a run: name another folder, or pass "
                                "--overwrite (or --resume, to go on)")
            check_reads_elsewhere(self.s)
        elif contents(out):
            raise UserError(f"{out} holds files, but no run of this kit: name another folder")

    def check_same_run(self, config: dict[str, Any]) -> None:
        """Raise UserError if a run of other settings, prompts or contents has this config."""
        before, now = config["settings"], self.s.record()
        fixed = [f.name for f in dataclasses.fields(self.s) if not f.metadata.get("resumable")]
        # An option that the code has got since is left alone.
        if changed := [name for name in fixed if before.get(name, now[name]) != now[name]]:
            raise UserError(f"{self.s.out} was begun with other settings: {', '.join(changed)}")
        for kind, what in (("inputs", "contents"), ("prompts", "wording of the prompts")):
            before, now = config.get(kind, {}), self.record()[kind]
            if changed := [name for name in now if before.get(name) != now[name]]:
                raise UserError(f"{self.s.out} was begun with another {what}: "
                                f"{', '.join(changed)}")

    def record(self) -> dict[str, Any]:
        """What a resumed run must find unchanged, as JSON-compatible values."""
        inputs = {name: sha256(path) for name, path in self.inputs.items()}
        return {"settings": self.s.record(), "prompts": self.prompts, "inputs": inputs}

    def open(self) -> None:
        """Set the run that the folder holds aside, and write config.json."""
        if self.main:
            out = self.s.out
            if not self.s.resume:
                (out / MOVING).mkdir()
                for path in contents(out):
                    path.rename(out / MOVING / path.name)
                (out / MOVING).rename(out / REPLACED)
            write_json(out / "config.json", self.record() | describe_run())

    def __exit__(self, *error: object) -> None:
        if self.main:
            if error[0] is None:
                begun(self.s.out)
            elif not self.s.resume:
                put_back(self.s.out)
            self.lock.release()


class Lock:
    """A lock of a folder, which is made if need be. The kernel releases it when a process ends."""

    def __init__(self, out: Path):
        self.path = out / LOCK
        while True:
            out.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (held open)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                raise UserError(f"{out} is in use by {holder}") from None
            except OSError as error:  # some network file systems have no locks
                console.print(f"{out} can't be locked: {error}", style="yellow", markup=False)
            if self.path.exists() and os.path.samestat(os.fstat(self.file.fileno()),
                                                       self.path.stat()):
                break  # else its last holder has just removed it
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Remove the lock, and the folder if nothing else is in it."""
        self.path.unlink(missing_ok=True)
        self.file.close()
        if not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def contents(out: Path) -> list[Path]:
    """What a folder holds, but for what this module puts there."""
    return [path for path in out.iterdir() if path.name not in OWN] if out.is_dir() else []


def begun(out: Path) -> None:
    """Tell that a run has done its first step: the one that it replaces is deleted."""
    if (out / REPLACED).exists():
        (out / REPLACED).rename(out / GONE)
        shutil.rmtree(out / GONE)


def put_back(out: Path) -> None:
    """Delete a run that has not `begun`, and put back what it was to replace. Else do nothing."""
    if (out / REPLACED).exists():
        for path in contents(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / REPLACED).rename(out / MOVING)
        finish_moves(out)


def finish_moves(out: Path) -> None:
    """Finish what a killed process has left half done."""
    shutil.rmtree(out / GONE, ignore_errors=True)
    if (out / MOVING).exists():
        for path in (out / MOVING).iterdir():
            path.rename(out / path.name)
        (out / MOVING).rmdir()


def check_reads_elsewhere(s: FolderSettings) -> None:
    """Raise UserError if an option names something in the folder that is to be replaced."""
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        for one in value if isinstance(value, list | tuple) else [value]:
            path = Path(one).resolve() if isinstance(one, str | Path) else None
            if field.name != "out" and path and s.out.resolve() in path.parents and path.exists():
                raise UserError(f"{option_name(field)}: {one} lies in {s.out}, which --overwrite "
                                "would replace: name another --out")


def set_aside(path: Path) -> None:
    """Rename a damaged file or folder to *.set-aside; an earlier one goes."""
    aside = path.with_name(path.name + ".set-aside")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def describe_run() -> dict[str, Any]:
    """What a run depends on besides its settings: package versions, git commit, hardware."""
    # Not at the top: it imports torch, and a command without models starts fast.
    from plumbing.devices import describe_hardware

    try:
        git = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git here
        commit = ""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "bm25s", "numpy"):
        versions[package] = importlib.metadata.version(package)
    return {"versions": versions, "commit": commit or None, "hardware": describe_hardware()}


def read_config(out: Path) -> dict[str, Any]:
    """A run's config.json, or the copy in a checkpoint if it is damaged. Raises UserError if no run
    is there, or none whose config can be read."""
    copies = sorted(out.glob("checkpoints/step-??????/config.json"), reverse=True)
    damaged = []
    for path in [out / "config.json", *copies]:
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(config["settings"], dict):
                if damaged:
                    console.print(f"{damaged[0]}: {path} takes its place", style="yellow",
                                  soft_wrap=True, markup=False)
                return config
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            damaged.append(f"{path} is no run's config ({type(error).__name__}: {error})")
    raise UserError(damaged[0] if damaged else f"{out} holds no run to resume")


def is_run(out: Path) -> bool:
    try:
        return bool(read_config(out))
    except UserError:
        return False
