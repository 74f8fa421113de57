"""Files: JSONL, JSON, checksums, and seeds that depend on their arguments alone."""

import gzip
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plumbing.cli import UserError
from plumbing.text import normalize_answer


def read_jsonl(path: Path, required: Iterable[str] = (), *,
               whole_lines: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSONL file (.gz or not). Raises UserError, with file and line, for a missing or
    empty file, and for a line that is not a JSON object with the required fields.

    whole_lines: skip a last line without a line feed, as a killed process leaves it; the file may
    then have no row."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if whole_lines and not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            if missing := [name for name in required if name not in row]:
                raise UserError(f"{path}:{number}: no field {', '.join(missing)}")
            rows.append(row)
    if not (rows or whole_lines):
        raise UserError(f"{path}: empty file")
    return rows


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows with `id, question, golden_answers` (FlashRAG's names), each with a real answer."""
    rows = read_jsonl(path, required=("id", "question", "golden_answers"))
    for number, row in enumerate(rows, start=1):
        check_golden(row, f"{path}:{number}")
        if not any(map(normalize_answer, row["golden_answers"])):
            raise UserError(f"{path}:{number}: golden_answers: normalisation leaves nothing of any")
    return rows


def read_predictions(path: Path, *fields: str) -> list[dict[str, Any]]:
    """Lines of a predictions file, or of a run folder's, but for those whose search failed."""
    path = path / "predictions.jsonl" if path.is_dir() else path
    rows = read_jsonl(path, required=("question", "golden_answers", "answer", *fields))
    for number, row in enumerate(rows, start=1):
        check_golden(row, f"{path}:{number}")
        if not isinstance(row["answer"], str | None):
            raise UserError(f"{path}:{number}: answer must be a text or null")
    if not (answered := [row for row in rows if row.get("end") != "failed"]):
        raise UserError(f"{path}: every search failed, nothing can be scored")
    return answered


def check_golden(row: dict[str, Any], where: str) -> None:
    """Raises UserError unless golden_answers is a list of at least one text."""
    golden = row["golden_answers"]
    if not (isinstance(golden, list) and golden and all(isinstance(text, str) for text in golden)):
        raise UserError(f"{where}: golden_answers must be a list of at least one text")


def whole_batches(path: Path, ids: list[str], batch_size: int) -> list[dict[str, Any]]:
    """The records of finished batches; a line or a batch that was cut short will be run again.

    Batches are fixed by their place in the questions, for in bfloat16 a row's arithmetic depends on
    the rows beside it. Raises UserError if the file answers other questions than `ids`."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    whole = len(lines) if len(lines) == len(ids) else len(lines) // batch_size * batch_size
    records = [json.loads(line) for line in lines[:whole]]
    if [record["id"] for record in records] != ids[:whole]:
        raise UserError(f"{path} answers other questions than the data asks")
    return records


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file atomically: a killed process leaves the old file or the new one."""
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace_file(path: Path, text: str) -> None:
    """Write to a temporary file, flush it to the disk, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    """Replace a file atomically, as `write_jsonl`."""
    replace_file(path, json.dumps(value, indent=1) + "\n")


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in one write, flushed to the disk: a later crash can't lose them."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Checksum of a file's contents, in hex. Raises UserError for a missing file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_seed(*parts: object) -> int:
    """A 63-bit seed from a hash of its arguments: equal in every process, thread and restart."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
