"""Chapter 3: any model, method and engine on the question-answering benchmarks, beside the paper.

\b
    run      answer a benchmark's questions     ->  OUT/predictions.jsonl, OUT/results.json
    score    every metric again, from predictions alone
    compare  two runs on the same questions: paired difference, interval, p-value
    table    runs beside the rows of the paper's tables
    report   figures and tables of training runs and evaluations, on one page
    show     recorded episodes as text: by question, by step, the worst, what changed between runs
    ask      one question, live: what the model thinks, searches, reads and answers

A method is a function from questions to episodes. They are the same records as in training, so
that an evaluation on a real engine is also how trajectories are collected. `agent` is chapter 2's
rollout, greedy and without noise.

\b
    python evaluate.py run --benchmark world --model runs/demo/policy/model --out runs/demo/test
    python evaluate.py compare runs/demo/test-warmup runs/demo/test-policy
    accelerate launch evaluate.py run ...          # each batch is split over the processes

Exact match (em) is SQuAD's: equality after normalisation. Some published code, ZeroSearch's too,
calls a substring match by that name; here it is cover_em, so that old figures can be compared.
"""

import json
import math
import random
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import typer
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.text import Text

import costs
from plumbing.cli import (UserError, argument, command, console, leave, make_app, markdown_table,
                          option, print_table, progress_bar, run_cli)
from plumbing.engines import ENGINES, SearchRequest, SearchResult, check_failures
from plumbing.episodes import changed, episode_text, read_episodes, select
from plumbing.files import (append_jsonl, draw_seed, read_jsonl, read_predictions, read_questions,
                            whole_batches, write_json, write_jsonl)
from plumbing.generate import Sampling
from plumbing.page import (Aloud, coloured, cost_section, difference_sentence, episodes_section,
                           evaluation_section, read_held_out, simulator_section, time_section,
                           training_section)
from plumbing.runfolder import FolderSettings, RunFolder, begun
from plumbing.served import load_generator
from plumbing.text import (ROOT, cover_em, encode, exact_match, f1_score, fill, load_prompts,
                           neutralize, prompt_ids)
from sft_simulator import SearchSettings, format_documents
from train_rl import (Episode, EpisodeSettings, Setup, Turn, new_episode, rollout, search_turn)

app = make_app(__doc__)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


# ---------------------------------------------------------------- benchmarks

BENCHMARKS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
BENCHMARK_FOLDER = ROOT / "runs" / "data"  # where data/prepare.py puts them


def benchmark_file(name: str) -> Path:
    """The questions of a benchmark: one of the paper's seven, or the demo's world."""
    if name == "world":
        return ROOT / "data" / "world" / "test.jsonl"
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}: there are {', '.join(BENCHMARKS)} and world; "
                        "--data takes a file")
    path = BENCHMARK_FOLDER / f"{name}.jsonl"
    if not path.exists():
        raise UserError(f"{name} is not here yet: python data/prepare.py {name}")
    return path


Rows = list[dict[str, Any]]


def sample_questions(rows: Rows, limit: int | None, seed: int) -> Rows:
    """A seeded sample in the file's order, not its first rows: PopQA's are grouped by relation."""
    if limit is None or limit >= len(rows):
        return rows
    drawn = random.Random(draw_seed("limit", seed)).sample(range(len(rows)), limit)
    return [rows[i] for i in sorted(drawn)]


# ---------------------------------------------------------------- methods

ANSWER_TOKENS = 32  # an answer is a few words; what goes on is wrong anyway


def blank_episode(row: dict[str, Any]) -> Episode:
    return Episode(str(row["id"]), row["question"], row["golden_answers"], row.get("hops"))


def read_prompt(episode: Episode, setup: Setup, method: str, **values: str) -> Episode:
    """Begin an episode with the method's prompt."""
    template = setup.prompts[method]
    user = fill(template["user"], question=neutralize(episode.question, setup.tokenizer), **values)
    episode.read(prompt_ids(setup.tokenizer, fill(template["system"]), user))
    episode.prompt_tokens = len(episode.ids)
    return episode


def write_on(episodes: list[Episode], setup: Setup, max_tokens: int,
             stop: tuple[str, ...] = ()) -> list[str]:
    """Let the model continue every episode, greedily; returns what it wrote.

    An end-of-text token is left out: more follows, and the model should go on in the same reply."""
    sampling = Sampling(max_tokens, temperature=0.0, stop=stop)
    prompts, seeds = [e.ids for e in episodes], [setup.seed] * len(episodes)
    generations, texts = setup.generator.generate(prompts, sampling, seeds), []
    for episode, generation in zip(episodes, generations, strict=True):
        end = len(generation.ids) - (generation.stop_reason == "eos")
        episode.write(generation.ids[:end], generation.logprobs[:end])
        texts.append(setup.tokenizer.decode(generation.ids[:end]))
    return texts


def conclude(episodes: list[Episode], setup: Setup, method: str) -> list[Episode]:
    """Ask those who have not answered: after the method's cue, the rest of the line is it."""
    cue = encode(setup.tokenizer, setup.prompts[method]["cue"])
    open_ones = [e for e in episodes if e.answer is None and e.end != "failed"]
    for episode in open_ones:
        episode.end = "context"
    room = setup.limits.context_tokens - len(cue) - ANSWER_TOKENS
    open_ones = [e for e in open_ones if len(e.ids) <= room]
    for episode in open_ones:
        episode.read(cue)
    texts = write_on(open_ones, setup, ANSWER_TOKENS, stop=("\n",))
    for episode, text in zip(open_ones, texts, strict=True):
        episode.turns.append(Turn(text, "answer"))
        episode.answer, episode.end = text.strip().partition("\n")[0].strip(), "answered"
    return episodes


def agent(rows: Rows, setup: Setup) -> list[Episode]:
    """The policy under its own template. Without an engine it is R1."""
    search = setup.engine is not None
    episodes = [new_episode(row, 0, setup.tokenizer, setup.prompts, search) for row in rows]
    rollout(episodes, setup)
    return episodes


def direct(rows: Rows, setup: Setup) -> list[Episode]:
    """The answer at once, from what the model knows."""
    episodes = [read_prompt(blank_episode(row), setup, "direct") for row in rows]
    return conclude(episodes, setup, "direct")


def cot(rows: Rows, setup: Setup) -> list[Episode]:
    """Reasoning first, then the answer: zero-shot chain of thought (Kojima et al. 2022)."""
    episodes = [read_prompt(blank_episode(row), setup, "cot") for row in rows]
    texts = write_on(episodes, setup, setup.limits.tokens_per_turn)
    for episode, text in zip(episodes, texts, strict=True):
        episode.turns.append(Turn(text, "invalid"))
    return conclude(episodes, setup, "cot")


def rag(rows: Rows, setup: Setup) -> list[Episode]:
    """One search with the question itself; its documents stand in the prompt."""
    episodes = [blank_episode(row) for row in rows]
    for episode in episodes:
        episode.turns.append(Turn("", "search", episode.question, "useful"))
    search_turn(episodes, setup)
    for episode in episodes:
        documents = setup.tokenizer.decode(episode.ids).strip()  # as read: made safe, and cut
        episode.ids, episode.mask, episode.logprobs = [], [], []
        read_prompt(episode, setup, "rag", documents=documents)
    return conclude(episodes, setup, "rag")


REACT_ACTION = re.compile(r"(Search|Finish)\[(.*?)\]", re.DOTALL)


def ra_agent(rows: Rows, setup: Setup) -> list[Episode]:
    """ReAct (Yao et al. 2023): thought, action, observation; a cue when searches run out."""
    active = episodes = [read_prompt(blank_episode(row), setup, "ra_agent") for row in rows]
    for _ in range(setup.limits.max_searches):
        for episode in active:
            episode.read(encode(setup.tokenizer, "\nThought:"))
        texts = write_on(active, setup, setup.limits.tokens_per_turn, stop=("]",))
        for episode, text in zip(active, texts, strict=True):
            match = REACT_ACTION.search(text)
            content = match[2].strip() if match else ""
            episode.turns.append(Turn(text, "invalid"))
            if content and match[1] == "Finish":
                episode.turns[-1].action = "answer"
                episode.answer, episode.end = content, "answered"
            elif content:
                episode.turns[-1] = Turn(text, "search", content, "useful")
                episode.read(encode(setup.tokenizer, "\nObservation:"))
        searching = [e for e in active if e.turns[-1].action == "search"]
        search_turn(searching, setup)
        room = setup.limits.context_tokens - setup.limits.tokens_per_turn - ANSWER_TOKENS
        active = [e for e in active if e.end is None and len(e.ids) < room]
    return conclude(episodes, setup, "ra_agent")


class Condenser:
    """An engine whose documents the model itself condenses to what the question needs."""

    name = "condensed"

    def __init__(self, setup: Setup):
        self.setup = setup
        self.found: dict[tuple[str, str], list[str]] = {}  # (question, query) -> documents

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        setup, wording = self.setup, self.setup.prompts["search_o1"]
        results, prompts = setup.engine.search(requests), []
        for request, result in zip(requests, results, strict=True):
            self.found[request.question, request.query] = result.documents
            texts = (request.question, request.query, *result.documents)
            question, query, *documents = (neutralize(text, setup.tokenizer) for text in texts)
            values = {"question": question, "query": query}
            values["documents"] = format_documents(documents)
            prompts.append(prompt_ids(setup.tokenizer, fill(wording["condense_system"]),
                                      fill(wording["condense_user"], **values)))
        sampling = Sampling(setup.limits.tokens_per_turn, temperature=0.0)
        digests = setup.generator.generate(prompts, sampling, [setup.seed] * len(prompts))
        return [SearchResult([setup.tokenizer.decode(digest.ids, skip_special_tokens=True).strip()],
                             result.well_formed, result.prompt_tokens + len(prompt),
                             result.completion_tokens + len(digest.ids), result.error)
                for result, prompt, digest in zip(results, prompts, digests, strict=True)]


def search_o1(rows: Rows, setup: Setup) -> list[Episode]:
    """Search-o1 (Li et al. 2025): the agent's loop under its own template, on condensed documents.

    The condenser sees question, query and documents; the original also shows it the reasoning.
    What it reads and writes is counted with the simulator's tokens. A turn keeps the documents, the
    token ids hold the digest."""
    prompts = setup.prompts | {"policy": setup.prompts["policy"] | setup.prompts["search_o1"]}
    engine = Condenser(setup)
    episodes = [new_episode(row, 0, setup.tokenizer, prompts) for row in rows]
    rollout(episodes, replace(setup, engine=engine, prompts=prompts))
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


# ---------------------------------------------------------------- metrics

RESAMPLES = 10_000
Summary = dict[str, dict[str, float]]  # metric -> mean, low, high


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
    scores = answer_scores(record["answer"], record["golden_answers"])
    return {name: 100 * x for name, x in scores.items()}


def summarize(rows: list[dict[str, float]]) -> Summary:
    """Mean and 95 % interval of every column. The order of the rows changes no digit."""
    values = np.array([list(row.values()) for row in rows], dtype=np.float64)  # (N, M)
    values = values[np.lexsort(values.T)]
    low, high = np.percentile(bootstrap_means(values), [2.5, 97.5], axis=0)  # (M,), (M,)
    means = [math.fsum(column) / len(rows) for column in values.T]
    columns = zip(rows[0], means, low.tolist(), high.tolist())
    return {name: {"mean": mean, "low": lo, "high": hi} for name, mean, lo, hi in columns}


def bootstrap_means(values: np.ndarray) -> np.ndarray:
    """Means of resamples of the rows, one seed. (N, M) -> (RESAMPLES, M). Bootstrap, Efron 1979."""
    generator = np.random.default_rng(0)
    chunk = max(1, 2_000_000 // values.size)
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    draws = (generator.integers(len(values), size=(k, len(values))) for k in sizes)
    return np.concatenate([values[places].mean(axis=1) for places in draws])


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of paired differences (N,): a permutation test (Fisher 1935).

    How often random signs give a sum as far from 0 as theirs; every pattern where there are few."""
    differences = differences[differences != 0]
    n, observed = len(differences), abs(differences.sum()) - 1e-9
    if 2**n <= RESAMPLES:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2^n, n)
        return float(np.mean(np.abs(signs @ differences) >= observed))
    generator = np.random.default_rng(0)
    sums = [generator.choice((-1.0, 1.0), size=(100, n)) @ differences
            for _ in range(RESAMPLES // 100)]
    return float((1 + np.sum(np.abs(np.concatenate(sums)) >= observed)) / (1 + RESAMPLES))


# ---------------------------------------------------------------- run


@dataclass(frozen=True, kw_only=True)
class RunSettings(FolderSettings, SearchSettings, EpisodeSettings):
    """Options of `run`."""

    temperature: ClassVar[float] = 0.0  # greedy

    model: str = option(help='"smollm2" (embedded), a Hub id or a folder.')
    method: str = option("agent", "How the model is put to the question.", choices=METHODS)
    benchmark: str | None = option(None, f"{', '.join(BENCHMARKS)} or world.")
    data: Path | None = option(None, "Or a JSONL file with id, question, golden_answers.")
    failed_searches: int = option(0, "Searches that may fail; their questions are left out.", low=0,
                                  resumable=True)
    limit: int | None = option(None, "A random sample of so many questions, by --seed.", low=1)
    batch_size: int = option(64, "Questions at a time, over all processes.", low=1)

    def check(self) -> None:
        super().check()
        if (self.data is None) == (self.benchmark is None):
            raise UserError("name the questions: --benchmark NAME or --data FILE")
        if self.engine == "none" and self.method not in (*WITHOUT_SEARCH, "agent"):
            raise UserError(f"--method {self.method} searches: --engine none can't serve it")


@command(app, RunSettings)
def run(s: RunSettings) -> None:
    """Answer a benchmark's questions, greedily, and score the answers."""
    if s.method in WITHOUT_SEARCH:
        s = replace(s, engine="none")
    rows = sample_questions(read_questions(s.data or benchmark_file(s.benchmark)), s.limit, s.seed)
    ids = [str(row["id"]) for row in rows]
    if len(set(ids)) < len(ids):
        raise UserError(f"{s.data or s.benchmark}: an id occurs twice")
    state, prompts = PartialState(), load_prompts(s.prompts)
    reads = {"data": s.data or benchmark_file(s.benchmark),
             "corpus": s.corpus if s.engine == "bm25" else None}
    with RunFolder(s, prompts, state.is_main_process, **reads) as folder:
        # First the generator: vLLM, when it starts, trips over modules that bm25s imports.
        generator = load_generator(s.model, s.generator)
        setup = Setup(generator, ENGINES[s.engine].make(s), prompts, s, s.seed)
        folder.open()  # only now: all that can fail has loaded
        console.print(f"generation: {generator.name}")
        records = answer_all(rows, s, setup, state)
        if state.is_main_process:
            results = run_results(records, s)
            write_json(s.out / "results.json", results)
            title = f"{results['benchmark']}, {s.method}, {s.model}: {len(records)} questions"
            show_summary(title, results["metrics"])
        leave(state)


def answer_all(rows: Rows, s: RunSettings, setup: Setup, state: PartialState) -> Rows:
    """Records of all questions: of the batches that OUT holds, and of the others, appended."""
    predictions, ids = s.out / "predictions.jsonl", [str(row["id"]) for row in rows]
    records = whole_batches(predictions, ids, s.batch_size) if s.resume else []
    if s.resume and state.is_main_process:
        write_jsonl(predictions, records)
    with progress_bar() as bar:
        task = bar.add_task(s.method, total=len(rows), completed=len(records), info="")
        for start in range(len(records), len(rows), s.batch_size):
            asked = rows[start : start + s.batch_size]
            batch = answer_batch(asked, METHODS[s.method], setup, state)
            errors = [record.get("error") for record in records + batch]
            check_failures(errors, 0, s.failed_searches)
            if state.is_main_process:
                append_jsonl(predictions, batch)
                begun(s.out)
            records += batch
            matched = [record["scores"]["em"] for record in records if record["end"] != "failed"]
            bar.update(task, completed=len(records), info=f"EM {100 * np.mean(matched):.1f} %")
    return records


def answer_batch(rows: Rows, method: Callable, setup: Setup, state: PartialState) -> Rows:
    """Records of a batch in the order of its questions, each process having answered its share."""
    started = time.perf_counter()
    mine = rows[state.process_index :: state.num_processes]
    episodes = method(mine, setup) if mine else []
    for episode in episodes:
        if episode.end != "failed":
            episode.scores = answer_scores(episode.answer, episode.golden_answers)
    everyone = gather_object([episode.record() for episode in episodes])
    records = {record["id"]: record for record in everyone}
    seconds = (time.perf_counter() - started) / len(rows)
    ordered = [records[str(row["id"])] for row in rows]
    return [record | {"tokens": sum(record["mask"]), "seconds": seconds} for record in ordered]


def run_results(records: list[dict[str, Any]], s: RunSettings) -> dict[str, Any]:
    """What results.json holds: all from the records, so that a resumed run ends with the same."""
    failed = sum(r["end"] == "failed" for r in records)
    records = [r for r in records if r["end"] != "failed"]
    rows = [answer_row(r) | {n: float(r[n]) for n in ("searches", "tokens")} for r in records]
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
        "by_hops": {str(hops): {"n": len(part)} | summarize(part)
                    for hops, part in sorted(by_hops.items())},
        "seconds": math.fsum(record["seconds"] for record in records),
        "settings": s.record(),
    }


def show_summary(title: str, metrics: Summary) -> None:
    rows = [[name + ", %" * (name in PERCENT), f"{m['mean']:.2f}",
             f"{m['low']:.2f} to {m['high']:.2f}"]
            for name, m in metrics.items()]
    print_table(title, ["", "mean", "95 % interval"], rows)


# ---------------------------------------------------------------- score, compare


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(
        help="JSONL with question, golden_answers, answer; or a run folder.")],
    as_json: AsJson = False,
) -> None:
    """Compute the metrics from predictions alone, in percent, whatever the order of the lines."""
    rows = read_predictions(predictions)
    metrics = summarize([answer_row(row) for row in rows])
    if as_json:
        means = {name: m["mean"] for name, m in metrics.items()}
        intervals = {name: [m["low"], m["high"]] for name, m in metrics.items()}
        print(json.dumps({"n": len(rows), **means, "intervals": intervals}))
    else:
        show_summary(f"{predictions}: {len(rows)} answers", metrics)


def paired_difference(a: Path, b: Path) -> dict[str, Any]:
    """B minus A on the same questions, in points, with 95 % interval and sign-flip p-value."""
    scores = []
    for path in (a, b):
        rows = read_predictions(path, "id")
        scores.append({str(row["id"]): answer_row(row) for row in rows})
        if len(scores[-1]) < len(rows):
            raise UserError(f"{path}: an id occurs twice")
    of_a, of_b = scores
    if alone := sorted(of_a.keys() ^ of_b.keys()):
        raise UserError(f"{a} and {b} answer different questions: {len(alone)} ids are in one "
                        f"only, such as {alone[0]}")
    differences = [{name: of_b[i][name] - of_a[i][name] for name in COMPARED} for i in sorted(of_a)]
    result: dict[str, Any] = {"a": str(a), "b": str(b), "n": len(differences)}
    for name, d in summarize(differences).items():
        means = [math.fsum(row[name] for row in of.values()) / len(of) for of in scores]
        p = sign_flip_p(np.array([row[name] for row in differences]))
        result[name] = {"a": means[0], "b": means[1], "difference": d["mean"], "low": d["low"],
                        "high": d["high"], "p": p}
    return result


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Run folder or predictions file.")],
    b: Annotated[Path, typer.Argument(help="Another, on the same questions.")],
    as_json: AsJson = False,
) -> None:
    """Compare two runs question by question: B minus A, with 95 % interval and p-value."""
    result = paired_difference(a, b)
    if as_json:
        return print(json.dumps(result))
    rows = [[name, f"{d['a']:.2f}", f"{d['b']:.2f}", f"{d['difference']:+.2f}",
             f"{d['low']:+.2f} to {d['high']:+.2f}", f"{d['p']:.4f}"]
            for name, d in result.items() if name in COMPARED]
    title = f"A: {a}\nB: {b}\n{result['n']} questions, in percent"
    print_table(title, ["", "A", "B", "B - A", "95 % interval", "p"], rows)


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

PROMPTED = {"direct": "Direct Answer", "cot": "CoT", "rag": "RAG", "ra-agent": "RA-Agent",
            "search-o1": "Search-o1"}  # rows of table 3


@app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(
        help="Evaluation folders; those of one model and method form a row.")],
    paper_row: Annotated[str | None, typer.Option(
        help="The paper's row, such as table3/Qwen-2.5-3B/ZeroSearch-inst.")] = None,
    paper_model: Annotated[str | None, typer.Option(
        help="Or its model: prompted methods then stand beside their rows of table 3.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Exact match beside a row of the paper's tables, and the difference.

    +- is half of our 95 % interval; the paper's figure is taken as it stands."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for results in map(read_results, runs):
        group = groups.setdefault((results["method"], results["model"]), {})
        if results["benchmark"] in group:
            raise UserError(f"two runs of {results['method']} with {results['model']} "
                            f"on {results['benchmark']}")
        group[results["benchmark"]] = results
    known = {name for group in groups.values() for name in group}
    own = sorted(known.difference(BENCHMARKS))
    columns = [name for name in BENCHMARKS if name in known] + own + ["avg"]
    rows = []
    for (method, model), group in groups.items():
        label, theirs = published_row(paper_model, paper_row, method)
        ours = exact_matches(group)
        cells = {
            f"{method}, {model}": {c: f"{mean:.1f} ±{half:.1f}"
                                   for c, (mean, half) in ours.items()},
            f"  paper: {label}": {c: f"{value:.1f}" for c, value in theirs.items()},
            "  difference": {c: f"{ours[c][0] - theirs[c]:+.1f} ±{ours[c][1]:.1f}"
                             for c in ours if c in theirs},
        }
        rows += [[name, *(row.get(c, "-") for c in columns)] for name, row in cells.items()]
    if markdown:
        print(markdown_table(["EM, %", *columns], rows))
    else:
        print_table("Exact match, %, beside the paper", ["", *columns], rows)


def exact_matches(group: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and half interval of EM by benchmark; "avg" where all seven are there."""
    found = {}
    for name, results in group.items():
        em = results["metrics"]["em"]
        found[name] = (em["mean"], (em["high"] - em["low"]) / 2)
    if found.keys() >= set(BENCHMARKS):  # the mean of seven independent figures
        means, halves = zip(*(found[name] for name in BENCHMARKS))
        found["avg"] = (math.fsum(means) / 7, math.hypot(*halves) / 7)
    return found


def paper_rows() -> dict[str, dict[str, float]]:
    """Rows of the paper's tables 3 to 7: "table3/Qwen-2.5-3B/RAG" -> EM in percent by benchmark."""
    published = json.loads((ROOT / "data" / "paper.json").read_text(encoding="utf-8"))
    rows = {f"table3/{model}/{row}": figures for model, rows in published["table3_main"].items()
            for row, figures in rows.items()}
    rows |= {f"table4/{row}": figures
             for row, figures in published["table4_simulators"]["rows"].items()}
    for name, averages in (("table5", published["table5_algorithms"]["avg"]),
                           ("table7", published["table7_loss_masking"]["avg"]),
                           *((f"table6/{model.removesuffix('-Base')}", found)
                             for model, found in published["table6_curriculum"]["avg"].items())):
        rows |= {f"{name}/{row}": {"avg": average} for row, average in averages.items()}
    return rows


def published_row(model: str | None, row: str | None, method: str) -> tuple[str, dict[str, float]]:
    """Name and figures of the row that is asked for, else of a prompted method; else none."""
    rows = paper_rows()
    if row is None and (model is None or method not in PROMPTED):
        return "no row named", {}
    row = row or f"table3/{model}/{PROMPTED[method]}"
    if row not in rows:
        raise UserError(f"the paper has no row {row}; it has {', '.join(rows)}")
    return row, rows[row]


# ---------------------------------------------------------------- report


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Training runs and evaluations, in any mix.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and its figures.")],
) -> None:
    """Put runs on one page, from their metrics.jsonl and results.json."""
    names = run_names(runs)
    stages = {name: read_jsonl(run / "metrics.jsonl", ("step",)) for name, run in names.items()
              if (run / "metrics.jsonl").exists()}
    evaluations = {name: read_results(run) for name, run in names.items()
                   if (run / "results.json").exists()}
    if unknown := [str(run) for name, run in names.items() if name not in {*stages, *evaluations}]:
        raise UserError(f"neither metrics.jsonl nor results.json in {', '.join(unknown)}")
    trainings = {name: steps for name, steps in stages.items() if "reward/mean" in steps[0]}
    seconds = {name: math.fsum(step.get("time/step", math.nan) for step in steps)
               for name, steps in stages.items()}
    seconds |= {name: r.get("seconds", math.nan) for name, r in evaluations.items()}
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Report"]
    if evaluations:
        parts += evaluation_section(evaluations, paired_sentence(evaluations, names), out)
        parts += episodes_section([names[name] for name, r in evaluations.items()
                                   if r["method"] == "agent"])
    if trainings:
        folders = {name: names[name] for name in trainings}
        parts += training_section(trainings, read_held_out(folders), out)
        parts += simulator_section(folders)
        parts += cost_section(*run_bills({name: names[name] for name in trainings}), out)
    parts += time_section(seconds, out / "seconds.txt")
    parts += [f"Made by `{shlex.join(['python', 'evaluate.py', *sys.argv[1:]])}`."]
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    console.print(f"report: {out / 'report.md'}")


def run_names(runs: list[Path]) -> dict[str, Path]:
    """Each run by its folder's name, or by its path where another has the same name."""
    folders = [run.resolve().name for run in runs]
    return {str(run) if folders.count(folder) > 1 else folder: run
            for folder, run in zip(folders, runs)}


def paired_sentence(evaluations: dict[str, dict], names: dict[str, Path]) -> str | None:
    """The difference of two agents in words, or why there is none; None for one agent, or three."""
    agents = [name for name, r in evaluations.items() if r["method"] == "agent"]
    if len(agents) != 2:
        return None
    try:
        return difference_sentence(*agents, paired_difference(*(names[name] for name in agents)))
    except UserError as error:  # it alone needs predictions.jsonl
        return f"No paired difference of {agents[0]} and {agents[1]}: {error}."


def run_bills(runs: dict[str, Path]) -> tuple[dict[str, dict], list[str]]:
    """The bill of each training run for the page, and notes on those that have none."""
    bills, notes = {}, []
    for name, run_dir in runs.items():
        try:
            cost = costs.run_cost(run_dir)
        except UserError as error:
            notes.append(f"No cost for {name}: {error}.")
            continue
        usd = {f"searches at {costs.PAPER_API}": cost["api_usd"][costs.PAPER_API],
               "search side of the run": cost["bill"]["search_side"],
               "whole run": cost["bill"]["whole_run"]}
        bills[name] = {"searches": f"{cost['searches']:,.0f}",
                       "device": f"{cost['devices']} x {cost['device']}",
                       "bars": {kind: (x, costs.dollars(x)) for kind, x in usd.items()}}
    return bills, notes


# ---------------------------------------------------------------- show, ask


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Run folder, or a file of episodes or predictions.")],
    other: Annotated[Path | None, typer.Argument(
        help="A later run: questions on which the two differ, the greatest losses first.")] = None,
    id: Annotated[str | None, typer.Option(help="Episodes of this question alone.")] = None,
    step: Annotated[int | None, typer.Option(help="Episodes of this training step alone.")] = None,
    worst: Annotated[bool, typer.Option("--worst", help="Those of least reward first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
) -> None:
    """Print recorded episodes: what the policy wrote, the documents it read, the outcome."""
    found = [select(read_episodes(path), id=id, step=step, worst=worst)
             for path in (run, other) if path]
    texts = [[episode_text(record)] for record in found[0]]
    if other:
        texts = [["before:", episode_text(a), "after:", episode_text(b)]
                 for a, b in changed(*found)]
    if not texts:
        raise UserError(f"{run}: no episode to show")
    for number, parts in enumerate(texts[:limit], start=1):
        for text in [f"\n-------- {number} of {len(texts)}", *parts]:
            Console(highlight=False).print(coloured(text), soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class AskSettings(SearchSettings, EpisodeSettings):
    temperature: ClassVar[float] = 0.0  # greedy

    question: str = argument("What to ask.")
    model: str = option(help='"smollm2" (embedded), a Hub id or a folder.')


@command(app, AskSettings)
def ask(s: AskSettings) -> None:
    """Watch the agent answer a question: thoughts dim, searches blue, documents yellow."""
    generator = load_generator(s.model, s.generator)
    aloud = Aloud(generator, ENGINES[s.engine].make(s), generator.tokenizer)
    engine = aloud if aloud.engine else None
    setup = Setup(aloud, engine, load_prompts(s.prompts), s, s.seed)
    (episode,) = agent([{"id": "ask", "question": s.question, "golden_answers": []}], setup)
    answer = Text(f"\n{episode.answer or 'no answer'}", style="bold")
    Console().print(answer, Text(f"({episode.searches} searches)"))


if __name__ == "__main__":
    run_cli(app)
