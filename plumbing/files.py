"""Files: JSONL, JSON, checksums, and seeds that depend on their arguments alone."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plumbing.cli import UserError, console
from plumbing.text import normalize_answer


def check_is_file(path: Path) -> None:
    """Raise UserError unless there is a file under that name."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, where a file is needed")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")


def check_out_file(path: Path, overwrite: bool) -> None:
    """Raise UserError if a command may not write the file that its --out names."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: --out names a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already: --overwrite replaces it")


def read_jsonl(path: Path, required: Iterable[str] = (), *, texts: Iterable[str] = (),
               whole_lines: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSONL file (.gz or not). Raises UserError, with file and line, for a missing, empty
    or cut .gz file, and for a line that is not a JSON object with the required fields.

    texts: fields that must hold a text, too.
    whole_lines: skip a last line without a line feed, as a killed process leaves it; the file may
    then have no row."""
    check_is_file(path)
    rows = []
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if whole_lines and not line.endswith(b"\n"):
                    break
                rows.append(parse_row(line, f"{path}:{number}"))
                check_fields(rows[-1], f"{path}:{number}", required, texts)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole .gz file ({error})") from None
    if not (rows or whole_lines):
        raise UserError(f"{path}: empty file")
    return rows


def parse_json(text: bytes, where: str) -> Any:
    """A JSON value. Raises UserError."""
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not JSON in UTF-8") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def parse_row(text: bytes, where: str) -> dict[str, Any]:
    if not isinstance(row := parse_json(text, where), dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def check_fields(row: dict[str, Any], where: str, required: Iterable[str],
                 texts: Iterable[str] = ()) -> None:
    """Raises UserError if the row lacks a field, or one of `texts` is no text."""
    texts = tuple(texts)
    if missing := [name for name in (*required, *texts) if name not in row]:
        raise UserError(f"{where}: no field {', '.join(missing)}")
    for name in texts:
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name} must be a text, not {json.dumps(row[name])[:50]}")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows with `id, question, golden_answers` (FlashRAG's names) and maybe `hops`.

    A row of whose golden answers normalisation leaves nothing can't be answered: it is skipped, and
    the skipped ones are counted and named. Raises UserError."""
    rows, skipped = read_jsonl(path, ("id", "golden_answers"), texts=("question",)), []
    for number, row in enumerate(rows, start=1):
        where = f"{path}:{number}"
        check_golden(row, where)
        if not isinstance(row["id"], str | int):
            raise UserError(f"{where}: id must be a text or a whole number")
        if type(row.get("hops")) not in (int, type(None)):
            raise UserError(f"{where}: hops must be a whole number")
        if not any(map(normalize_answer, row["golden_answers"])):
            skipped.append((number, row))
    return without(path, rows, skipped, "no usable golden answer")


def without(path: Path, rows: list[dict], skipped: list[tuple[int, dict]],
            why: str) -> list[dict[str, Any]]:
    """The rows but for the skipped ones (number, row), which are counted and named on stderr.

    Raises UserError if none is left."""
    numbers = {number for number, _ in skipped}
    if not (kept := [row for i, row in enumerate(rows, start=1) if i not in numbers]):
        raise UserError(f"{path}: no row can be used: {why}")
    if skipped:
        named = ", ".join(f"row {number} (id {row.get('id')!r})" for number, row in skipped[:3])
        console.print(f"{path}: {len(skipped)} of {len(rows)} rows skipped, {why}: {named}"
                      + ", ..." * (len(skipped) > 3), markup=False, soft_wrap=True)
    return kept


def check_golden(row: dict[str, Any], where: str) -> None:
    """Raises UserError unless golden_answers is a list of texts."""
    golden = row["golden_answers"]
    if not (isinstance(golden, list) and all(isinstance(text, str) for text in golden)):
        raise UserError(f"{where}: golden_answers must be a list of texts")


def whole_batches(path: Path, ids: list[str], batch_size: int) -> list[dict[str, Any]]:
    """The records of finished batches up to a line or a batch that was cut short or is damaged.

    Batches are fixed by their place in the questions, for in bfloat16 a row's arithmetic depends on
    the rows beside it. Raises UserError if the file answers other questions than `ids`."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
            record["id"]
        except (ValueError, LookupError, TypeError):
            break
        records.append(record)
    whole = len(records) if len(records) == len(ids) else len(records) // batch_size * batch_size
    if [record["id"] for record in records[:whole]] != ids[:whole]:
        raise UserError(f"{path} answers other questions than the data asks")
    return records[:whole]


def keep_lines(path: Path, count: int) -> None:
    """Move what follows a file's first `count` lines to *.set-aside, and say so."""
    if set_lines_aside(path, lambda number, _: number < count):
        console.print(f"{path}: from line {count + 1} on it is damaged, or was cut short within a "
                      f"batch: these lines are now in {path.name}.set-aside", style="yellow",
                      markup=False, soft_wrap=True)


def set_lines_aside(path: Path, keep: Callable[[int, bytes], bool]) -> bool:
    """Move the lines of a file that `keep` refuses (number from 0, line) to *.set-aside. Returns
    whether there were any. The file may be missing."""
    if not path.exists():
        return False
    kept, aside = (path.with_name(path.name + suffix) for suffix in (".tmp", ".set-aside"))
    with open(path, "rb") as lines, open(kept, "wb") as ours, open(aside, "ab") as theirs:
        before = theirs.tell()
        for number, line in enumerate(lines):
            (ours if keep(number, line) else theirs).write(line)
        moved = theirs.tell() > before
    flush([kept, aside])
    kept.rename(path)
    if not aside.stat().st_size:
        aside.unlink()
    return moved


def json_line(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON. Half of a surrogate pair, which UTF-8 can't hold, is escaped."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file atomically: a killed process leaves the old file or the new one."""
    replace_file(path, b"".join(map(json_line, rows)))


def replace_file(path: Path, content: bytes) -> None:
    """Write to a temporary file, flush it to the disk, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    flush([temporary])
    temporary.rename(path)


def flush(paths: Iterable[Path]) -> None:
    """Flush files, or the entries of folders, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replace a file atomically, as `write_jsonl`."""
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode())


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in one write, flushed to the disk: a later crash can't lose them."""
    with open(path, "ab") as file:
        file.write(b"".join(map(json_line, rows)))
    flush([path])


def sha256(path: Path) -> str:
    """Checksum of a file's contents, in hex. Raises UserError for a missing file."""
    check_is_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_seed(*parts: object) -> int:
    """A 63-bit seed from a hash of its arguments: equal in every process, thread and restart."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
