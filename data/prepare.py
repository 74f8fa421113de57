"""Fetch benchmarks and training sets from the Hub, check them, write them in the kit's one schema.

    python data/prepare.py nq popqa              # runs/data/nq.jsonl, runs/data/popqa.jsonl
    python data/prepare.py all                   # the seven benchmarks
    python data/prepare.py train                 # NQ + HotpotQA, 169,615 questions
    python data/prepare.py nq --source FOLDER    # from a local copy of the Hub repository, offline

Questions become lines of `id, question, golden_answers` (and data_source, where the set is merged
from several); simulation-tuning sets become lines of `prompt, response`.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

# last: evaluate.py must not hide the package `evaluate`
sys.path.append(str(Path(__file__).resolve().parents[1]))
from plumbing.cli import UserError, console, first_line, make_app, run_cli
from plumbing.files import check_golden, read_jsonl, write_jsonl
from plumbing.text import ROOT, normalize_answer

app = make_app(__doc__)
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a set lives on the Hub: its (configuration, split) parts, and their rows in all."""

    repository: str
    parts: tuple[tuple[str | None, str], ...]
    rows: int | None = None


FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
BENCHMARKS = {
    "nq": Source(FLASHRAG, (("nq", "test"),), 3_610),
    "triviaqa": Source(FLASHRAG, (("triviaqa", "test"),), 11_313),
    "popqa": Source(FLASHRAG, (("popqa", "test"),), 14_267),
    "hotpotqa": Source(FLASHRAG, (("hotpotqa", "dev"),), 7_405),
    "2wikimultihopqa": Source(FLASHRAG, (("2wikimultihopqa", "dev"),), 12_576),
    "musique": Source(FLASHRAG, (("musique", "dev"),), 2_417),
    "bamboogle": Source(FLASHRAG, (("bamboogle", "test"),), 125),
}
TRAINING = {
    "train": Source(FLASHRAG, (("nq", "train"), ("hotpotqa", "train")), 169_615),
    "train-search-r1": Source("PeterJinGo/nq_hotpotqa_train", ((None, "train"),), 169_615),
    "train-zerosearch": Source("sunhaonlp/ZeroSearch_dataset", ((None, "train"),)),
}
TUNING = {
    "simulation-google": Source("sunhaonlp/SimulationTuning_google_dataset", ((None, "train"),)),
    "simulation-wiki": Source("sunhaonlp/SimulationTuning_wiki_dataset", ((None, "train"),)),
}
SOURCES = BENCHMARKS | TRAINING | TUNING


QUESTION_COLUMNS = ("id", "question", "golden_answers", "data_source")
PAIR_COLUMNS = ("prompt", "response", "instruction", "input", "output", "messages",
                "conversations")


def load_part(location: str, config: str | None, split: str,
              columns: tuple[str, ...]) -> tuple[str, list[Row]]:
    """Name of the file, and those columns of one split of a Hub repository or a local copy.

    Raises UserError; for a broken JSONL file of a local copy, with file and line."""
    from datasets import load_dataset_builder  # here: it takes seconds

    try:
        builder = load_dataset_builder(location, config)
        files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
        present = [name for name in columns if name in table.column_names]
        rows = table.select_columns(present).to_list()
    except Exception as error:  # the library has no common class for its errors
        if Path(location).is_dir():
            for file in sorted(Path(location).rglob("*.jsonl")):
                read_jsonl(file)
        raise UserError(f"can't load {config or 'the data'} ({split}) from {location}: "
                        f"{first_line(error.__cause__ or error)}") from None
    return files[0] if len(files) == 1 else f"{location} {config or ''}/{split}", rows


def to_question(row: Row, where: str, number: int, source: str | None) -> Row:
    """One row in the kit's schema; without an id, its number is its id. Raises UserError.

    Answers of which normalisation leaves nothing are no answers."""
    question, answers = row.get("question"), row.get("golden_answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: no question")
    if answers != []:  # without any it is left out, see `check_questions`
        check_golden({"golden_answers": answers}, where)
    answers = [answer for answer in dict.fromkeys(answers) if normalize_answer(answer)]
    result = {"id": str(row.get("id") or number), "question": question.strip(),
              "golden_answers": answers}
    if source := row.get("data_source") or source:  # ids are unique within a source only
        result |= {"id": f"{source}-{result['id']}", "data_source": source}
    return result


def to_pair(row: Row, where: str) -> Row:
    """A prompt and its response: columns of that name, Alpaca's, or a chat. Raises UserError."""
    chat = row.get("messages") or row.get("conversations")
    if "prompt" in row and "response" in row:
        prompt, response = row["prompt"], row["response"]
    elif "instruction" in row and "output" in row:
        prompt = "\n".join(filter(None, (row["instruction"], row.get("input"))))
        response = row["output"]
    elif chat:
        texts = [turn.get("content") or turn.get("value") for turn in chat]
        prompt, response = "\n\n".join(map(str, texts[:-1])), texts[-1]
    else:
        raise UserError(f"{where}: neither prompt and response, nor instruction and output, "
                        "nor messages")
    if not all(isinstance(text, str) and text.strip() for text in (prompt, response)):
        raise UserError(f"{where}: prompt and response must be texts, and not empty")
    return {"prompt": prompt, "response": response}


def check_questions(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows that can be used, and notes on the others. Raises UserError if two questions share
    an id."""
    kept, notes, by_id = [], [], {}
    for row in rows:
        first = by_id.setdefault(row["id"], row["question"])
        if first != row["question"]:
            raise UserError(f"id {row['id']!r} belongs to two questions: {first!r} and "
                            f"{row['question']!r}")
    seen = set()
    for row in rows:
        if row["golden_answers"] and row["id"] not in seen:
            kept.append(row)
        seen.add(row["id"])
    if empty := sum(not row["golden_answers"] for row in rows):
        notes.append(f"{empty} without a usable golden answer, left out")
    if twice := len(rows) - len(seen):
        notes.append(f"{twice} written twice, left out")
    if again := sum(n - 1 for n in Counter(row["question"] for row in kept).values()):
        notes.append(f"{again} questions asked under several ids, kept")
    return kept, notes


def prepare(name: str, location: str | None) -> tuple[list[Row], list[str]]:
    """All rows of a set, checked, and notes on them."""
    source, rows = SOURCES[name], []
    for config, split in source.parts:
        columns = PAIR_COLUMNS if name in TUNING else QUESTION_COLUMNS
        file, loaded = load_part(location or source.repository, config, split, columns)
        merged_from = config if len(source.parts) > 1 else None
        for number, row in enumerate(loaded, start=1):
            where = f"{file}:{number}"
            rows.append(to_pair(row, where) if name in TUNING
                        else to_question(row, where, number, merged_from))
    kept, notes = (rows, []) if name in TUNING else check_questions(rows)
    if source.rows not in (None, len(rows)):
        notes.append(f"{len(rows):,} rows where {source.rows:,} are published")
    return kept, notes


@app.command()
def main(
    names: Annotated[list[str], typer.Argument(
        help=f"{', '.join(SOURCES)}; or all: the seven benchmarks.")],
    out: Annotated[Path, typer.Option(help="Where the JSONL files go.")] = ROOT / "runs" / "data",
    source: Annotated[Path | None, typer.Option(help="A local copy of the Hub repository.")] = None,
) -> None:
    """Fetch sets from the Hub, check them and write OUT/NAME.jsonl."""
    names = [name for given in names for name in (BENCHMARKS if given == "all" else [given])]
    if unknown := [name for name in names if name not in SOURCES]:
        raise UserError(f"unknown set {unknown[0]!r}: there are {', '.join(SOURCES)} and all")
    if source is not None and not source.is_dir():
        raise UserError(f"{source}: no such folder")
    for name in names:
        rows, notes = prepare(name, str(source) if source else None)
        if not rows:
            raise UserError(f"{name}: no usable row")
        write_jsonl(out / f"{name}.jsonl", rows)
        console.print("; ".join([f"{out / name}.jsonl: {len(rows):,} rows", *notes]))


if __name__ == "__main__":
    run_cli(app)
