"""Files: JSONL, run folders, and seeds that are functions of their arguments."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from plumbing.cli import Settings, UserError
from plumbing.text import ROOT, normalize_answer


def read_jsonl(path: Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises UserError naming file and line for anything that is not a row with those fields."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            if missing := [name for name in required if name not in row]:
                raise UserError(f"{path}:{number}: no field {', '.join(missing)}")
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: empty file")
    return rows


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows with `id, question, golden_answers` (FlashRAG's names). Raises UserError for an empty list of answers."""
    rows = read_jsonl(path, required=("id", "question", "golden_answers"))
    for number, row in enumerate(rows, start=1):
        answers = row["golden_answers"]
        strings = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
        if not strings or not any(map(normalize_answer, answers)):
            raise UserError(f"{path}:{number}: golden_answers must be a list of strings, one of them a real answer")
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a temporary file, then rename it: a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.rename(path)


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in one write, flushed to the disk, so that a later crash can't take them back."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def describe_run(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run used: its settings, the versions, the commit, the machine. Saved as config.json."""
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "transformers", "accelerate", "bm25s", "numpy")
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {
        "settings": settings,
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "commit": commit or None,
        "hardware": {"device": "cuda" if cuda else "cpu", "name": name,
                     "count": torch.cuda.device_count() if cuda else torch.get_num_threads()},
    }  # fmt: skip


def check_no_run(out: Path, overwrite: bool) -> None:
    if (out / "config.json").exists() and not overwrite:
        raise UserError(f"{out} already holds a run: name another folder, or pass --overwrite "
                        "(or --resume, if offered)")  # fmt: skip


def open_run(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make an empty run folder with its config.json. Raises UserError if it holds a run to keep."""
    check_no_run(out, overwrite)
    if (out / "config.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "config.json.tmp"
    temporary.write_text(json.dumps(describe_run(settings), indent=1) + "\n", encoding="utf-8")
    temporary.rename(out / "config.json")  # never half of it: --resume reads it


def read_settings(run: Path) -> dict[str, Any]:
    """The settings in a run's config.json; {} if the folder has none."""
    path = run / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("settings", {}) if path.is_file() else {}


def check_same_run(out: Path, settings: Settings) -> None:
    """Raises UserError if OUT holds no run, or one whose settings differ in what may not change."""
    if not (out / "config.json").exists():
        raise UserError(f"{out} holds no run to resume")
    before, now = read_settings(out), settings.record()
    fixed = [field.name for field in dataclasses.fields(settings) if not field.metadata.get("resumable")]
    if changed := [name for name in fixed if before.get(name) != now[name]]:
        raise UserError(f"{out} was begun with other settings: {', '.join(changed)}")


def draw_seed(*parts: object) -> int:
    """A 63-bit seed that depends on its arguments alone: the same in every process, thread and restart."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
