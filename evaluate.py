"""Chapter 3: any model, any method, any engine on the question-answering benchmarks, beside the paper.

\b
    run      answer a benchmark's questions     ->  OUT/predictions.jsonl, OUT/results.json
    score    every metric again, from predictions alone
    compare  two runs on the same questions: paired difference, interval, p-value
    table    runs beside the rows of the paper's tables
    report   figures and tables of training runs and evaluations, on one page
    ask      one question, live: what the model thinks, searches, reads and answers

A method is a function from questions to episodes. They are the same records as in training, so that an evaluation on
a real engine is also how trajectories are collected. `agent` is chapter 2's rollout, greedy and without noise.

\b
    python evaluate.py run --benchmark world --model runs/demo/policy/model --out runs/demo/test-policy
    python evaluate.py compare runs/demo/test-warmup runs/demo/test-policy
    accelerate launch evaluate.py run ...          # each batch is split over the processes

Exact match (em) is SQuAD's: equality after normalisation. Some published code, ZeroSearch's too, calls a substring
match by that name; here it is cover_em, so that old figures can be compared.
"""

import importlib
import json
import math
import random
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import typer
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.text import Text

import costs
from plumbing.cli import (
    MODEL_OR_SERVER,
    GeneratorOption,
    Overwrite,
    PromptsFile,
    Seed,
    TopK,
    Url,
    UserError,
    console,
    leave,
    progress_bar,
    run_cli,
)
from plumbing.engines import SearchEngine, SearchRequest, SearchResult, check_top_k
from plumbing.files import (
    append_jsonl,
    check_no_run,
    check_same_run,
    draw_seed,
    open_run,
    read_jsonl,
    read_questions,
    write_jsonl,
)
from plumbing.generate import Generation, Generator, Sampling
from plumbing.report import draw_costs, draw_em, draw_training, markdown_table, with_interval
from plumbing.served import load_generator
from plumbing.text import ROOT, Prompts, encode, fill, load_prompts, neutralize, normalize_answer, prompt_ids
from plumbing.web import check_engine
from sft_simulator import format_documents
from train_rl import (
    Episode,
    FailedSearches,
    RolloutSettings,
    Turn,
    check_failures,
    exact_match,
    f1_score,
    make_engine,
    new_episode,
    rollout,
    search_turn,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Engine = Annotated[Literal["bm25", "http", "serpapi", "simulator", "none"], typer.Option(help="Who answers searches.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


# ---------------------------------------------------------------- benchmarks

BENCHMARKS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
BENCHMARK_FOLDER = ROOT / "runs" / "data"  # where data/prepare.py puts them


def benchmark_file(name: str) -> Path:
    """The questions of a benchmark: one of the paper's seven, or the demo's world. Raises UserError."""
    if name == "world":
        return ROOT / "data" / "world" / "test.jsonl"
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}: there are {', '.join(BENCHMARKS)} and world; --data takes a file")
    path = BENCHMARK_FOLDER / f"{name}.jsonl"
    if not path.exists():
        raise UserError(f"{name} is not here yet: python data/prepare.py {name}")
    return path


def sample_questions(rows: list[dict[str, Any]], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """A seeded sample in the file's order, never its first rows: PopQA, for one, is grouped by relation."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(draw_seed("limit", seed)).sample(range(len(rows)), limit))]


# ---------------------------------------------------------------- methods

Rows = list[dict[str, Any]]
ANSWER_TOKENS = 32  # an answer is a few words; what goes on is wrong anyway


@dataclass(frozen=True)
class Setup:
    """What every method works with."""

    generator: Generator
    tokenizer: Any
    engine: SearchEngine | None
    prompts: Prompts
    settings: RolloutSettings
    seed: int = 0


def blank_episode(row: dict[str, Any]) -> Episode:
    return Episode(str(row["id"]), row["question"], row["golden_answers"], row.get("hops"))


def read_prompt(episode: Episode, setup: Setup, method: str, **values: str) -> Episode:
    """Begin an episode with the method's prompt."""
    template = setup.prompts[method]
    user = fill(template["user"], question=neutralize(episode.question, setup.tokenizer), **values)
    episode.read(prompt_ids(setup.tokenizer, fill(template["system"]), user))
    episode.prompt_tokens = len(episode.ids)
    return episode


def write_on(episodes: list[Episode], setup: Setup, max_tokens: int, stop: tuple[str, ...] = ()) -> list[str]:
    """Let the model continue every episode, greedily; returns what it wrote.

    An end-of-text token is left out: more follows, and the model should go on in the same reply."""
    sampling = Sampling(max_tokens, temperature=0.0, stop=stop)
    generations = setup.generator.generate([e.ids for e in episodes], sampling, [setup.seed] * len(episodes))
    texts = []
    for episode, generation in zip(episodes, generations, strict=True):
        end = len(generation.ids) - (generation.stop_reason == "eos")
        episode.write(generation.ids[:end], generation.logprobs[:end])
        texts.append(setup.tokenizer.decode(generation.ids[:end]))
    return texts


def conclude(episodes: list[Episode], setup: Setup, method: str) -> list[Episode]:
    """Ask everyone who has not answered for the answer: after the method's cue, the rest of the line is it."""
    cue = encode(setup.tokenizer, setup.prompts[method]["cue"])
    open_ones = [e for e in episodes if e.answer is None and e.end != "failed"]
    for episode in open_ones:
        episode.end = "context"
    open_ones = [e for e in open_ones if len(e.ids) + len(cue) + ANSWER_TOKENS <= setup.settings.context_tokens]
    for episode in open_ones:
        episode.read(cue)
    for episode, text in zip(open_ones, write_on(open_ones, setup, ANSWER_TOKENS, stop=("\n",)), strict=True):
        episode.turns.append(Turn(text, "answer"))
        episode.answer, episode.end = text.strip().partition("\n")[0].strip(), "answered"
    return episodes


def agent(rows: Rows, setup: Setup) -> list[Episode]:
    """The policy under its own template. Without an engine it is R1; one trained on a real engine is Search-R1."""
    search = setup.engine is not None
    episodes = [new_episode(row, 0, setup.tokenizer, setup.prompts, search) for row in rows]
    rollout(episodes, setup.generator, setup.tokenizer, setup.engine, setup.prompts, setup.settings, seed=setup.seed)
    return episodes


def direct(rows: Rows, setup: Setup) -> list[Episode]:
    """The answer at once, from what the model knows."""
    return conclude([read_prompt(blank_episode(row), setup, "direct") for row in rows], setup, "direct")


def cot(rows: Rows, setup: Setup) -> list[Episode]:
    """Reasoning first, then the answer: zero-shot chain of thought in two stages (Kojima et al. 2022)."""
    episodes = [read_prompt(blank_episode(row), setup, "cot") for row in rows]
    for episode, text in zip(episodes, write_on(episodes, setup, setup.settings.tokens_per_turn), strict=True):
        episode.turns.append(Turn(text, "invalid"))
    return conclude(episodes, setup, "cot")


def rag(rows: Rows, setup: Setup) -> list[Episode]:
    """One search with the question itself; its documents stand in the prompt."""
    episodes = [blank_episode(row) for row in rows]
    for episode in episodes:
        episode.turns.append(Turn("", "search", episode.question, "useful"))
    search_turn(episodes, setup.engine, setup.tokenizer, setup.settings, setup.seed, 0)
    for episode in episodes:
        documents = setup.tokenizer.decode(episode.ids).strip()  # as read: made safe, and cut if too long
        episode.ids, episode.mask, episode.logprobs = [], [], []
        read_prompt(episode, setup, "rag", documents=documents)
    return conclude(episodes, setup, "rag")


REACT_ACTION = re.compile(r"(Search|Finish)\[(.*?)\]", re.DOTALL)


def ra_agent(rows: Rows, setup: Setup) -> list[Episode]:
    """ReAct (Yao et al. 2023): thought, action and observation by turns; asked for the answer when searches run out."""
    active = episodes = [read_prompt(blank_episode(row), setup, "ra_agent") for row in rows]
    for _ in range(setup.settings.max_searches):
        for episode in active:
            episode.read(encode(setup.tokenizer, "\nThought:"))
        for episode, text in zip(active, write_on(active, setup, setup.settings.tokens_per_turn, ("]",)), strict=True):
            match = REACT_ACTION.search(text)
            episode.turns.append(Turn(text, "invalid"))
            if match and match[2].strip() and match[1] == "Finish":
                episode.turns[-1].action, episode.answer, episode.end = "answer", match[2].strip(), "answered"
            elif match and match[2].strip():
                episode.turns[-1] = Turn(text, "search", match[2].strip(), "useful")
                episode.read(encode(setup.tokenizer, "\nObservation:"))
        searching = [e for e in active if e.turns[-1].action == "search"]
        search_turn(searching, setup.engine, setup.tokenizer, setup.settings, setup.seed, 0)
        room = setup.settings.context_tokens - setup.settings.tokens_per_turn - ANSWER_TOKENS
        active = [e for e in active if e.end is None and len(e.ids) < room]
    return conclude(episodes, setup, "ra_agent")


class Condenser:
    """An engine whose documents the model itself boils down to what the question needs, before anyone reads them."""

    name = "condensed"

    def __init__(self, setup: Setup):
        self.setup = setup
        self.found: dict[tuple[str, str], list[str]] = {}  # (question, query) -> the documents behind the digest

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        setup, wording = self.setup, self.setup.prompts["search_o1"]
        results, prompts = setup.engine.search(requests), []
        for request, result in zip(requests, results, strict=True):
            self.found[request.question, request.query] = result.documents
            safe = [neutralize(text, setup.tokenizer) for text in (request.question, request.query, *result.documents)]
            values = {"question": safe[0], "query": safe[1], "documents": format_documents(safe[2:])}
            prompts.append(prompt_ids(setup.tokenizer, fill(wording["condense_system"]),
                                      fill(wording["condense_user"], **values)))  # fmt: skip
        sampling = Sampling(setup.settings.tokens_per_turn, temperature=0.0)
        digests = setup.generator.generate(prompts, sampling, [setup.seed] * len(prompts))
        texts = [setup.tokenizer.decode(digest.ids, skip_special_tokens=True).strip() for digest in digests]
        return [SearchResult([text], result.well_formed, result.prompt_tokens + len(prompt),
                             result.completion_tokens + len(digest.ids), result.error)
                for text, result, prompt, digest in zip(texts, results, prompts, digests, strict=True)]  # fmt: skip


def search_o1(rows: Rows, setup: Setup) -> list[Episode]:
    """Search-o1 (Li et al. 2025): the agent's loop under a template of its own, documents condensed before they enter.

    The condenser sees question, query and documents; the original also shows it the reasoning so far. What it reads
    and writes is counted with the simulator's tokens; a turn keeps the documents, the token ids hold the digest."""
    prompts = setup.prompts | {"policy": setup.prompts["policy"] | setup.prompts["search_o1"]}
    engine = Condenser(setup)
    episodes = [new_episode(row, 0, setup.tokenizer, prompts) for row in rows]
    rollout(episodes, setup.generator, setup.tokenizer, engine, prompts, setup.settings, seed=setup.seed)
    for episode in episodes:
        for turn in episode.turns:
            if turn.documents:
                turn.documents = engine.found[episode.question, turn.query]
    return conclude(episodes, setup, "search_o1")


METHODS: dict[str, Callable[[Rows, Setup], list[Episode]]] = {
    "agent": agent,
    "direct": direct,
    "cot": cot,
    "rag": rag,
    "ra-agent": ra_agent,
    "search-o1": search_o1,
}
WITHOUT_SEARCH = ("direct", "cot")
SIMULATOR = {"simulator_words": 25, "simulator_temperature": 0.8, "simulator_max_tokens": 600}  # as in training


# ---------------------------------------------------------------- metrics

RESAMPLES = 10_000
Summary = dict[str, dict[str, float]]  # metric -> mean, low, high


def cover_em(answer: str | None, golden_answers: list[str]) -> float:
    """1 if a normalised golden answer is a substring of the normalised answer: what ZeroSearch's code calls EM.

    A golden answer of which normalisation leaves nothing never matches; as a substring it always would."""
    given = normalize_answer(answer or "")
    return float(any(gold in given for gold in map(normalize_answer, golden_answers) if gold))


def answer_scores(answer: str | None, golden_answers: list[str]) -> dict[str, float]:
    """The metrics of one answer, each in [0, 1]."""
    return {
        "em": exact_match(answer, golden_answers),
        "f1": f1_score(answer, golden_answers),
        "cover_em": cover_em(answer, golden_answers),
        "answered": float(bool(answer and answer.strip())),
    }


PERCENT = tuple(answer_scores(None, []))
COMPARED = ("em", "f1", "cover_em")


def answer_row(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of one line of predictions, in percent."""
    return {name: 100 * x for name, x in answer_scores(record["answer"], record["golden_answers"]).items()}


def summarize(rows: list[dict[str, float]]) -> Summary:
    """Mean and 95 % interval of every column. The order of the rows changes no digit."""
    values = np.array([list(row.values()) for row in rows], dtype=np.float64)  # (N, M)
    values = values[np.lexsort(values.T)]
    low, high = np.percentile(bootstrap_means(values), [2.5, 97.5], axis=0)  # (M,), (M,)
    means = [math.fsum(column) / len(rows) for column in values.T]
    columns = zip(rows[0], means, low.tolist(), high.tolist())
    return {name: {"mean": mean, "low": lo, "high": hi} for name, mean, lo, hi in columns}


def bootstrap_means(values: np.ndarray) -> np.ndarray:
    """Means of resamples of the rows: values (N, M) -> (RESAMPLES, M). Percentile bootstrap (Efron 1979), one seed."""
    generator = np.random.default_rng(0)
    chunk = max(1, 2_000_000 // values.size)
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    return np.concatenate([values[generator.integers(len(values), size=(k, len(values)))].mean(axis=1) for k in sizes])


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of paired differences (N,): how often random signs give a sum as far from 0 as theirs.

    A permutation test (Fisher 1935). Every pattern is tried where there are few; a difference of 0 has no sign."""
    differences = differences[differences != 0]
    n, observed = len(differences), abs(differences.sum()) - 1e-9
    if 2**n <= RESAMPLES:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2^n, n)
        return float(np.mean(np.abs(signs @ differences) >= observed))
    generator = np.random.default_rng(0)
    sums = [generator.choice((-1.0, 1.0), size=(100, n)) @ differences for _ in range(RESAMPLES // 100)]
    return float((1 + np.sum(np.abs(np.concatenate(sums)) >= observed)) / (1 + RESAMPLES))


@cache
def hugging_face_evaluate() -> ModuleType:
    """The package `evaluate`, whose name this script has: the import looks past this folder and this module.

    The name still means this module afterwards, wherever it did before."""
    ours = sys.modules.pop("evaluate", None)
    if hasattr(ours, "__path__"):  # someone found the package already
        sys.modules["evaluate"] = ours
        return ours
    path = sys.path.copy()
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != ROOT]
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path[:] = path
        if ours is not None:
            sys.modules["evaluate"] = ours


def answer_metric(**options: Any):
    """EM, F1 and cover-EM, in percent, as a Metric of the package `evaluate`: compute, add_batch, combine, save.

    Predictions are texts, references lists of accepted texts. Options are evaluate.Metric's own."""
    from datasets import Features, List, Value

    package = hugging_face_evaluate()

    class AnswerMatch(package.Metric):
        def _info(self):
            return package.MetricInfo(
                description="SQuAD's exact match and F1, and substring match, against the best of several answers.",
                citation="arXiv:2505.04588",
                inputs_description="predictions: list of str; references: list of lists of str",
                features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
            )

        def _compute(self, predictions, references):
            rows = [answer_scores(answer, golds) for answer, golds in zip(predictions, references, strict=True)]
            return {name: 100 * math.fsum(row[name] for row in rows) / len(rows) for name in COMPARED}

    return AnswerMatch(**options)


# ---------------------------------------------------------------- run


@app.command()
def run(
    model: Annotated[str, typer.Option(help='"smollm2" (embedded), a Hub id or a folder.')],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    method: Annotated[Literal[tuple(METHODS)], typer.Option(help="How the model is put to the question.")] = "agent",
    benchmark: Annotated[str | None, typer.Option(help=f"{', '.join(BENCHMARKS)} or world.")] = None,
    data: Annotated[Path | None, typer.Option(help="Or a JSONL file with id, question, golden_answers.")] = None,
    engine: Engine = "bm25",
    corpus: Annotated[Path, typer.Option(help="bm25: a JSONL corpus.")] = ROOT / "data/world/passages.jsonl",
    simulator: Annotated[str | None, typer.Option(help=f"simulator: {MODEL_OR_SERVER}.")] = None,
    url: Url = None,
    failed_searches: FailedSearches = 0,
    limit: Annotated[int | None, typer.Option(help="A random sample of so many questions, drawn with --seed.")] = None,
    top_k: TopK = 3,
    max_searches: Annotated[int, typer.Option(help="Searches a question may take.")] = 5,
    tokens_per_turn: int = 500,
    context_tokens: int = 4096,
    observation_tokens: Annotated[int, typer.Option(help="Documents of one search are cut to this.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Questions at a time, over all processes.")] = 64,
    generator: GeneratorOption = "auto",
    prompts: PromptsFile = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that OUT holds.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Answer a benchmark's questions, greedily, and score the answers."""
    if method in WITHOUT_SEARCH:
        engine = "none"
    s = SimpleNamespace(**locals(), **SIMULATOR)
    check_settings(s)
    rows = sample_questions(read_questions(data or benchmark_file(benchmark)), limit, seed)
    if len({str(row["id"]) for row in rows}) < len(rows):
        raise UserError(f"{data or benchmark}: an id occurs twice")
    state, wording = PartialState(), load_prompts(prompts)
    if resume:
        check_same_run(out, vars(s), free=("failed_searches",))
    elif state.is_main_process:
        check_no_run(out, overwrite)
    # First the generator: vLLM, when it starts, trips over modules that the real engine's package imports.
    generates = load_generator(model, state.device, generator)
    searcher = make_engine(s, wording, state.device)
    if not resume and state.is_main_process:  # only now: what can't work must not cost an old run its folder
        open_run(out, vars(s), overwrite)
    console.print(f"generation: {generates.name}")
    predictions = out / "predictions.jsonl"
    records = whole_batches(predictions, rows, batch_size) if resume else []
    if resume and state.is_main_process:
        write_jsonl(predictions, records)

    limits = RolloutSettings(max_searches, tokens_per_turn, context_tokens, observation_tokens, temperature=0.0)
    setup = Setup(generates, generates.tokenizer, searcher, wording, limits, seed)
    with progress_bar() as bar:
        task = bar.add_task(method, total=len(rows), completed=len(records), info="")
        for start in range(len(records), len(rows), batch_size):
            batch = answer_batch(rows[start : start + batch_size], METHODS[method], setup, state)
            check_failures([record.get("error") for record in records + batch], 0, failed_searches)
            if state.is_main_process:
                append_jsonl(predictions, batch)
            records += batch
            so_far = 100 * np.mean([record["scores"]["em"] for record in records if record["end"] != "failed"])
            bar.update(task, completed=len(records), info=f"EM {so_far:.1f} %")
    if state.is_main_process:
        results = run_results(records, s)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        show_summary(f"{results['benchmark']}, {method}, {model}: {len(records)} questions", results["metrics"])
    leave(state)


def check_settings(s: SimpleNamespace) -> None:
    """Refuse what can't work before anything is loaded."""
    check_top_k(s.top_k)
    if (s.data is None) == (s.benchmark is None):
        raise UserError("name the questions: --benchmark NAME or --data FILE")
    if s.engine == "none" and s.method not in (*WITHOUT_SEARCH, "agent"):
        raise UserError(f"--method {s.method} searches: --engine none can't serve it")
    check_engine(s.engine, s.simulator, s.url)
    if s.batch_size < 1 or (s.limit is not None and s.limit < 1):
        raise UserError("--batch-size and --limit must be at least 1")
    if s.max_searches < 0 or s.tokens_per_turn < 1 or s.context_tokens <= s.tokens_per_turn:
        raise UserError("--max-searches must be at least 0, and --context-tokens hold more than --tokens-per-turn")


def whole_batches(predictions: Path, rows: Rows, batch_size: int) -> list[dict[str, Any]]:
    """The records of finished batches; a line or a batch that was cut short is dropped and will be run again.

    Batches are fixed by their place in the questions, for in bfloat16 a row's arithmetic depends on the company it
    has. Raises UserError if the file answers other questions."""
    lines = predictions.read_bytes().split(b"\n")[:-1] if predictions.exists() else []
    whole = len(lines) if len(lines) == len(rows) else len(lines) // batch_size * batch_size
    records = [json.loads(line) for line in lines[:whole]]
    if [record["id"] for record in records] != [str(row["id"]) for row in rows[:whole]]:
        raise UserError(f"{predictions} answers other questions than the data asks")
    return records


def answer_batch(rows: Rows, method: Callable, setup: Setup, state: PartialState) -> list[dict[str, Any]]:
    """Records of a batch in the order of its questions, each process having answered its share."""
    started = time.perf_counter()
    mine = rows[state.process_index :: state.num_processes]
    episodes = method(mine, setup) if mine else []
    for episode in episodes:
        if episode.end != "failed":
            episode.scores = answer_scores(episode.answer, episode.golden_answers)
    records = {record["id"]: record for record in gather_object([episode.record() for episode in episodes])}
    seconds = (time.perf_counter() - started) / len(rows)
    ordered = [records[str(row["id"])] for row in rows]
    return [record | {"tokens": sum(record["mask"]), "seconds": seconds} for record in ordered]


def run_results(records: list[dict[str, Any]], s: SimpleNamespace) -> dict[str, Any]:
    """What results.json holds: all of it from the records, so that a resumed run ends with the same figures."""
    failed = sum(r["end"] == "failed" for r in records)
    records = [r for r in records if r["end"] != "failed"]
    rows = [answer_row(r) | {"searches": float(r["searches"]), "tokens": float(r["tokens"])} for r in records]
    by_hops: dict[int, list[dict[str, float]]] = {}
    for record, row in zip(records, rows, strict=True):
        if record["hops"]:
            by_hops.setdefault(record["hops"], []).append(row)
    return {
        "benchmark": s.benchmark or s.data.stem,
        "method": s.method,
        "model": s.model,
        "engine": s.engine,
        "n": len(records),
        "failed": failed,
        "metrics": summarize(rows),
        "by_hops": {str(hops): {"n": len(part)} | summarize(part) for hops, part in sorted(by_hops.items())},
        "seconds": math.fsum(record["seconds"] for record in records),
        "lineage": lineage(s.model),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(s).items()},
    }


def lineage(model: str) -> list[dict[str, Any]]:
    """Settings of the training runs a local model came from, the last first; [] for any other model."""
    runs: list[dict[str, Any]] = []
    while (config := Path(model).parent / "config.json").is_file() and len(runs) < 10:
        settings = json.loads(config.read_text(encoding="utf-8")).get("settings", {})
        if not settings.get("model"):
            break
        runs.append(settings)
        model = settings["model"]
    return runs


def show_summary(title: str, metrics: Summary) -> None:
    rows = [[name + ", %" * (name in PERCENT), f"{m['mean']:.2f}", f"{m['low']:.2f} to {m['high']:.2f}"]
            for name, m in metrics.items()]  # fmt: skip
    costs.print_table(title, ["", "mean", "95 % interval"], rows)


# ---------------------------------------------------------------- score, compare


def read_predictions(path: Path, *fields: str) -> list[dict[str, Any]]:
    """Lines of a predictions file, or of the run folder that holds one, but for those whose search failed.

    Raises UserError naming file and line."""
    path = path / "predictions.jsonl" if path.is_dir() else path
    rows = read_jsonl(path, required=("question", "golden_answers", "answer", *fields))
    for number, row in enumerate(rows, start=1):
        golds = row["golden_answers"]
        if not (isinstance(golds, list) and golds and all(isinstance(gold, str) for gold in golds)):
            raise UserError(f"{path}:{number}: golden_answers must be a list of at least one text")
        if not isinstance(row["answer"], str | None):
            raise UserError(f"{path}:{number}: answer must be a text or null")
    if not (answered := [row for row in rows if row.get("end") != "failed"]):
        raise UserError(f"{path}: every search failed, nothing can be scored")
    return answered


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="JSONL with question, golden_answers, answer; or a run folder.")],
    as_json: AsJson = False,
) -> None:
    """Compute the metrics from predictions alone, in percent. The order of the lines changes no digit."""
    rows = read_predictions(predictions)
    metrics = summarize([answer_row(row) for row in rows])
    if as_json:
        means = {name: m["mean"] for name, m in metrics.items()}
        intervals = {name: [m["low"], m["high"]] for name, m in metrics.items()}
        print(json.dumps({"n": len(rows), **means, "intervals": intervals}))
    else:
        show_summary(f"{predictions}: {len(rows)} answers", metrics)


def paired_difference(a: Path, b: Path) -> dict[str, Any]:
    """B minus A on the same questions, in percentage points, with 95 % interval and two-sided sign-flip p-value."""
    scores = []
    for path in (a, b):
        rows = read_predictions(path, "id")
        scores.append({str(row["id"]): answer_row(row) for row in rows})
        if len(scores[-1]) < len(rows):
            raise UserError(f"{path}: an id occurs twice")
    of_a, of_b = scores
    if alone := sorted(of_a.keys() ^ of_b.keys()):
        raise UserError(f"{a} and {b} answer different questions: {len(alone)} ids are in one only, such as {alone[0]}")
    differences = [{name: of_b[i][name] - of_a[i][name] for name in COMPARED} for i in sorted(of_a)]
    result: dict[str, Any] = {"a": str(a), "b": str(b), "n": len(differences)}
    for name, d in summarize(differences).items():
        means = [math.fsum(row[name] for row in of.values()) / len(of) for of in scores]
        result[name] = {"a": means[0], "b": means[1], "difference": d["mean"], "low": d["low"], "high": d["high"],
                        "p": sign_flip_p(np.array([row[name] for row in differences]))}  # fmt: skip
    return result


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Run folder or predictions file.")],
    b: Annotated[Path, typer.Argument(help="Another, on the same questions.")],
    as_json: AsJson = False,
) -> None:
    """Compare two runs question by question: B minus A, with 95 % bootstrap interval and sign-flip p-value."""
    result = paired_difference(a, b)
    if as_json:
        return print(json.dumps(result))
    rows = [[name, f"{d['a']:.2f}", f"{d['b']:.2f}", f"{d['difference']:+.2f}", f"{d['low']:+.2f} to {d['high']:+.2f}",
             f"{d['p']:.4f}"] for name in COMPARED for d in [result[name]]]  # fmt: skip
    title = f"A: {a}\nB: {b}\n{result['n']} questions, in percent"
    costs.print_table(title, ["", "A", "B", "B - A", "95 % interval", "p"], rows)


def read_results(run_dir: Path) -> dict[str, Any]:
    """results.json of an evaluation. Raises UserError where it isn't one."""
    path = run_dir / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"benchmark", "method", "model", "engine", "n", "metrics"} - results.keys():
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the results of an evaluation: {error}") from None
    return results


# ---------------------------------------------------------------- table

PaperTable = Literal["table3", "table4", "table5", "table6", "table7"]
PROMPTED = {"direct": "Direct Answer", "cot": "CoT", "rag": "RAG", "ra-agent": "RA-Agent", "search-o1": "Search-o1"}


@app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(help="Evaluation folders; those of one model and method form a row.")],
    paper: Annotated[PaperTable, typer.Option(help="Which of the paper's tables to stand beside.")] = "table3",
    paper_model: Annotated[str | None, typer.Option(help="Its model, where yours has another name or size.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Exact match beside the paper's row for the same method and size, and the difference.

    +- is half of our 95 % interval; the paper's figure is taken as it stands (each is from about 500 questions)."""
    published = json.loads((ROOT / "data" / "paper.json").read_text(encoding="utf-8"))
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for results in map(read_results, runs):
        group = groups.setdefault((results["method"], results["model"]), {})
        if results["benchmark"] in group:
            raise UserError(f"two runs of {results['method']} with {results['model']} on {results['benchmark']}")
        group[results["benchmark"]] = results
    known = {name for group in groups.values() for name in group}
    columns = [name for name in BENCHMARKS if name in known] + sorted(known.difference(BENCHMARKS)) + ["avg"]
    rows = []
    for (method, model), group in groups.items():
        label, theirs = paper_row(published, paper, next(iter(group.values())), paper_model)
        ours = {name: (r["metrics"]["em"]["mean"], (r["metrics"]["em"]["high"] - r["metrics"]["em"]["low"]) / 2)
                for name, r in group.items()}  # fmt: skip
        if ours.keys() >= set(BENCHMARKS):  # the mean of seven independent figures
            means, halves = zip(*(ours[name] for name in BENCHMARKS))
            ours["avg"] = (math.fsum(means) / 7, math.hypot(*halves) / 7)
        cells = {
            f"{method}, {model}": {c: f"{mean:.1f} ±{half:.1f}" for c, (mean, half) in ours.items()},
            f"  paper: {label}": {c: f"{value:.1f}" for c, value in theirs.items()},
            "  difference": {c: f"{ours[c][0] - theirs[c]:+.1f} ±{ours[c][1]:.1f}" for c in ours if c in theirs},
        }
        rows += [[name, *(row.get(c, "-") for c in columns)] for name, row in cells.items()]
    if markdown:
        print(markdown_table([f"EM, %, {paper}", *columns], rows))
    else:
        costs.print_table(f"Exact match, %, beside the paper's {paper}", ["", *columns], rows)


def squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def paper_row(published: dict, paper: str, results: dict[str, Any], paper_model: str | None) -> tuple[str, dict]:
    """The paper's row for a run, by method and by how its model was trained: name, figures by benchmark or {}."""
    models, runs = list(published["table3_main"]), results.get("lineage", [])
    trained = next((settings for settings in runs if "algorithm" in settings), None)
    start = runs[-1]["model"] if runs else results["model"]
    if paper_model is not None and paper_model not in models:
        raise UserError(f"the paper has no model {paper_model!r}; it has {', '.join(models)}")
    model = paper_model or next((name for name in models if squash(name) in squash(start)), None)
    if model is None:
        return f"none of the size of {start}", {}
    base, learnt = f"{model}-Base", trained or {}
    entry = next(entry for name, entry in published.items() if name.startswith(paper))
    if paper == "table3":
        rows, row = entry[model], PROMPTED.get(results["method"]) or trained_row(trained, start)
    elif results["method"] != "agent" or entry.get("policy", base) != base:
        rows, row = {}, "none"
    elif paper == "table4":
        rows, row = entry["rows"], simulator_row(trained)
    elif paper == "table5":
        rows, row = entry["avg"], learnt.get("algorithm", "untrained").upper()
    elif paper == "table6":
        rows, row = entry["avg"].get(base, {}), "random" if learnt.get("curriculum") == "random" else "curriculum"
    else:
        rows, row = entry["avg"], "with_masking" if learnt.get("mask_documents") else "without_masking"
    figures = rows.get(row, {})
    return f"{model}, {row}", figures if isinstance(figures, dict) else {"avg": figures}


def trained_row(trained: dict[str, Any] | None, start: str) -> str:
    """The name table 3 gives a policy: how it was trained, here or by its own name, and from which variant."""
    engine = trained["engine"] if trained else "simulator" if "zerosearch" in squash(start) else "bm25"
    kind = {"simulator": "ZeroSearch", "none": "R1"}.get(engine, "Search-R1")
    if trained is None and "zerosearch" not in squash(start) and "searchr1" not in squash(start):
        return "untrained"
    instruct = "instruct" if kind == "R1" else "inst"
    return f"{kind}-{instruct if re.search('instruct|-it', start.lower()) else 'base'}"


def simulator_row(trained: dict[str, Any] | None) -> str:
    """The name table 4 gives a policy: by the engine it was trained on."""
    if trained is None:
        return "Base Model"
    if trained["engine"] != "simulator":
        return "Google"
    runs = lineage(trained["simulator"])
    start = runs[-1]["model"] if runs else trained["simulator"]
    tuned = runs or "simulation" in start.lower()  # as the released ones are named
    size = re.search(r"(\d+)b(?![a-z0-9])", start.lower())
    return f"{'SFT' if tuned else 'Prompt'}-{size[1] if size else '?'}B"


# ---------------------------------------------------------------- report


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs and of evaluations, in any mix.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and its figures.")],
) -> None:
    """Put runs on one page, from their metrics.jsonl and results.json."""
    names = run_names(runs)
    stages = {name: read_jsonl(run / "metrics.jsonl", ("step",)) for name, run in names.items()
              if (run / "metrics.jsonl").exists()}  # fmt: skip
    evaluations = {name: read_results(run) for name, run in names.items() if (run / "results.json").exists()}
    if unknown := [str(run) for name, run in names.items() if name not in stages and name not in evaluations]:
        raise UserError(f"neither metrics.jsonl nor results.json in {', '.join(unknown)}")
    trainings = {name: steps for name, steps in stages.items() if "reward/mean" in steps[0]}
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Report"]
    if evaluations:
        parts += evaluation_section(evaluations, names, out)
    if trainings:
        parts += training_section(trainings, out) + cost_section({name: names[name] for name in trainings}, out)
    parts += time_section(stages, evaluations, out / "seconds.txt")
    parts += [f"Made by `{shlex.join(['python', 'evaluate.py', *sys.argv[1:]])}`."]
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    console.print(f"report: {out / 'report.md'}")


def run_names(runs: list[Path]) -> dict[str, Path]:
    """Each run by its folder's name, or by its path where another has the same name."""
    folders = [run.resolve().name for run in runs]
    return {str(run) if folders.count(folder) > 1 else folder: run for folder, run in zip(folders, runs)}


def evaluation_section(evaluations: dict[str, dict], names: dict[str, Path], out: Path) -> list[str]:
    """Tables by run and by hops, the two agents' paired difference, and the bars."""
    header = ["run", "benchmark", "method", "engine", "n", "EM, %", "F1, %", "cover-EM, %", "searches a question"]
    rows = [[name, r["benchmark"], r["method"], r["engine"], str(r["n"]), *(with_interval(r["metrics"][metric])
             for metric in COMPARED), with_interval(r["metrics"]["searches"], 2)]
            for name, r in evaluations.items()]  # fmt: skip
    parts = ["## Test", "Greedy answers against the golden ones; in brackets the 95 % bootstrap interval.",
             markdown_table(header, rows, text_columns=4)]  # fmt: skip
    if hops := sorted({hop for r in evaluations.values() for hop in r.get("by_hops", {})}):
        parted = {name: r["by_hops"] for name, r in evaluations.items() if r.get("by_hops")}
        rows = [[name, *(with_interval(by_hops[hop]["em"]) if hop in by_hops else "-" for hop in hops)]
                for name, by_hops in parted.items()]  # fmt: skip
        parts.append(markdown_table(["EM, %, by number of hops", *hops], rows))
    agents = [name for name, r in evaluations.items() if r["method"] == "agent"]
    if len(agents) == 2:
        parts.append(difference_sentence(*agents, names))
    draw_em(evaluations, out / "em.png")
    return [*parts, "![Exact match by method](em.png)"]


def difference_sentence(a: str, b: str, names: dict[str, Path]) -> str:
    """The paired difference in words. It alone needs predictions.jsonl; without them it says so."""
    try:
        result = paired_difference(names[a], names[b])
    except UserError as error:
        return f"No paired difference of {a} and {b}: {error}."
    em, f1 = result["em"], result["f1"]
    verdict = "above 0" if em["low"] > 0 else "below 0" if em["high"] < 0 else "it holds 0"
    return (f"The same {result['n']} questions, **{b}** minus **{a}**: EM {em['difference']:+.1f} points (95 % "
            f"interval {em['low']:+.1f} to {em['high']:+.1f}: {verdict}; p = {em['p']:.4f}), "
            f"F1 {f1['difference']:+.1f} ({f1['low']:+.1f} to {f1['high']:+.1f}).")  # fmt: skip


def training_section(trainings: dict[str, list[dict]], out: Path) -> list[str]:
    rows = []
    for name, steps in trainings.items():
        tenth = max(1, len(steps) // 10)
        rows.append([name, str(len(steps))])
        for key in ("reward/mean", "search/per_episode", "noise/p"):
            first, last = (np.mean([step[key] for step in part]) for part in (steps[:tenth], steps[-tenth:]))
            rows[-1].append(f"{first:.2f} to {last:.2f}")
    draw_training(trainings, out / "training.png")
    return ["## Training", "From the mean over the first tenth of the steps to that over the last.",
            markdown_table(["run", "steps", "reward", "searches an episode", "noise p"], rows),
            "![Reward, searches and noise over steps](training.png)"]  # fmt: skip


def cost_section(runs: dict[str, Path], out: Path) -> list[str]:
    bills, notes = {}, []
    for name, run_dir in runs.items():
        try:
            bills[name] = costs.run_cost(run_dir)
        except costs.CostError as error:
            notes.append(f"No cost for {name}: {error}.")
    if bills:
        header = ["run", "searches", *BILL, "device"]
        rows = [[name, f"{bill['searches']:,.0f}", *(costs.dollars(part(bill)) for part in BILL.values()),
                 f"{bill['devices']} x {bill['device']}"] for name, bill in bills.items()]  # fmt: skip
        bars = {name: {kind: (part(bill), costs.dollars(part(bill))) for kind, part in BILL.items()}
                for name, bill in bills.items()}
        draw_costs(bars, out / "costs.png")
        notes = [markdown_table(header, rows), *notes, "![Cost](costs.png)"]
    return ["## Cost", "What the searches would have cost at an API, and what the run cost, at the prices of "
            "data/prices.toml.", *notes]  # fmt: skip


BILL: dict[str, Callable[[dict], float]] = {
    f"searches at {costs.PAPER_API}": lambda bill: bill["api_usd"][costs.PAPER_API],
    "search side of the run": lambda bill: bill["bill"]["search_side"],
    "whole run": lambda bill: bill["bill"]["whole_run"],
}


def time_section(stages: dict[str, list[dict]], evaluations: dict[str, dict], written: Path) -> list[str]:
    """Seconds of every stage from start to end where make has written them, else those spent in steps and answers."""
    if written.exists():
        rows = [list(line.rsplit(": ", 1)) for line in written.read_text(encoding="utf-8").splitlines()]
        return ["## Time", markdown_table(["stage", "time"], rows)]
    seconds = {name: math.fsum(step.get("time/step", math.nan) for step in steps) for name, steps in stages.items()}
    seconds |= {name: r.get("seconds", math.nan) for name, r in evaluations.items()}
    rows = [[name, costs.number(s)] for name, s in seconds.items()]
    return ["## Time", "Spent in training steps and in answering; loading is not counted.",
            markdown_table(["run", "seconds"], rows)]  # fmt: skip


# ---------------------------------------------------------------- ask

SEGMENTS = {"think": "dim", "search": "bold cyan", "answer": "bold green"}


class Aloud:
    """A generator and an engine that print all that passes through them."""

    concurrent = False

    def __init__(self, generator: Generator, engine: SearchEngine | None, tokenizer):
        self.generator, self.engine, self.tokenizer = generator, engine, tokenizer

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation]:
        generations = self.generator.generate(prompts, sampling, seeds)
        for generation in generations:
            text = Text(self.tokenizer.decode(generation.ids, skip_special_tokens=True).strip())
            for tag, style in SEGMENTS.items():
                text.highlight_regex(re.compile(rf"<{tag}>.*?(</{tag}>|$)", re.DOTALL), style)
            Console().print(text)
        return generations

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        results = self.engine.search(requests)
        for result in results:
            documents = [neutralize(document, self.tokenizer) for document in result.documents]
            Console().print(Text(format_documents(documents), style="yellow"))
        return results


@app.command()
def ask(
    question: str,
    model: Annotated[str, typer.Option(help='"smollm2" (embedded), a Hub id or a folder.')],
    engine: Engine = "bm25",
    corpus: Annotated[Path, typer.Option(help="bm25: a JSONL corpus.")] = ROOT / "data/world/passages.jsonl",
    simulator: Annotated[str | None, typer.Option(help=f"simulator: {MODEL_OR_SERVER}.")] = None,
    url: Url = None,
    top_k: TopK = 3,
    generator: GeneratorOption = "auto",
    prompts: PromptsFile = None,
    seed: Seed = 0,
) -> None:
    """Watch the agent answer one question: thoughts dim, searches blue, documents yellow, the answer green."""
    check_engine(engine, simulator, url)
    s = SimpleNamespace(engine=engine, corpus=corpus, simulator=simulator, url=url, top_k=top_k, generator=generator,
                        **SIMULATOR)  # fmt: skip
    wording, generates = load_prompts(prompts), load_generator(model, engine=generator)
    aloud = Aloud(generates, make_engine(s, wording, None), generates.tokenizer)
    searcher = aloud if engine != "none" else None
    setup = Setup(aloud, generates.tokenizer, searcher, wording, RolloutSettings(temperature=0.0), seed)
    (episode,) = agent([{"id": "ask", "question": question, "golden_answers": []}], setup)
    Console().print(Text(f"\n{episode.answer or 'no answer'}", style="bold"), Text(f"({episode.searches} searches)"))


if __name__ == "__main__":
    run_cli(app)
