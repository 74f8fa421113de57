"""Chapter 3: any model, method and engine on the question-answering benchmarks, beside the paper.

\b
    run      answer questions of benchmarks -> predictions.jsonl, results.json
    score    every metric from predictions: ours, FlashRAG's or Search-R1's
    compare  two runs on the same questions: difference, interval, p-value
    table    runs or predictions beside the rows of the paper's tables
    report   figures and tables of training runs and evaluations, on one page
    show     recorded episodes: by question, by step, the worst, what changed
    ask      one question, live: what the model thinks, searches and reads

A method is a function from questions to episodes. They are the same records as in training, so
that an evaluation on a real engine is also how trajectories are collected. `agent` is chapter 2's
rollout, greedy and without noise.

\b
    python evaluate.py run --benchmark world --model smollm2 --out runs/world
    python evaluate.py run --benchmark nq,hotpotqa --model smollm2 \\
        --corpus FILE --out runs/test
    python evaluate.py compare runs/demo/before-rl runs/demo/after-rl
    accelerate launch evaluate.py run ...  # a batch is split over processes

Exact match (em) is SQuAD's: equality after normalisation. Some published code, ZeroSearch's too,
calls a substring match by that name; here it is cover_em, so that old figures can be compared.
recall is the share of questions for which a document that the model's searches returned holds a
golden answer: where recall is low the search failed, where em is low beside it the reading did.
"""

import json
import math
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import typer
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

import costs
from plumbing.cli import (UserError, argument, check_value, command, console, leave, make_app,
                          option, plain, print_table, progress_bar, run_cli)
from plumbing.engines import ENGINES, SearchRequest, SearchResult, check_failures
from plumbing.episodes import changed, episode_text, read_episodes, select
from plumbing.files import (append_jsonl, draw_seed, keep_lines, read_jsonl, read_questions,
                            whole_batches, write_json)
from plumbing.formats import documents_read, read_paired, read_predictions, read_results
from plumbing.generate import Sampling
from plumbing.intervals import mean_interval, paired_interval, sign_flip_p
from plumbing.page import (Aloud, coloured, cost_section, episodes_section, evaluation_section,
                           paired_sentences, print_beside_paper, read_held_out, run_names,
                           show_summary, simulator_section, time_section, training_section)
from plumbing.runfolder import FolderSettings, RunFolder, begun, is_run
from plumbing.served import load_generator
from plumbing.text import (ROOT, contains_answer, cover_em, encode, exact_match, f1_score, fill,
                           load_prompts, neutralize, normalize_answer, prompt_ids)
from sft_simulator import MODEL_OR_SERVER, SearchSettings, format_documents
from train_rl import (Episode, EpisodeSettings, Setup, Turn, blank_episode, new_episode,
                      read_prompt, rollout, search_turn)

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


def prompted(row: dict[str, Any], setup: Setup, method: str) -> Episode:
    """An episode that holds the method's prompt alone."""
    return read_prompt(blank_episode(row), setup.tokenizer, setup.prompts[method])


def write_on(episodes: list[Episode], setup: Setup, max_tokens: int,
             stop: tuple[str, ...] = ()) -> list[str]:
    """Let the model continue every episode; returns what it wrote.

    An end-of-text token is left out: more follows, and the model should go on in the same reply."""
    sampling = Sampling(max_tokens, setup.limits.temperature, stop)
    prompts = [e.ids for e in episodes]
    seeds = [draw_seed("method", setup.seed, e.id, e.sample, len(e.ids)) for e in episodes]
    generations, texts = setup.generator.generate(prompts, sampling, seeds), []
    for episode, generation in zip(episodes, generations, strict=True):
        if generation.error:
            episode.end, episode.error = "failed", generation.error
            texts.append("")
            continue
        end = len(generation.ids) - (generation.stop_reason == "eos")
        episode.write(generation.ids[:end], generation.logprobs[:end])
        texts.append(setup.tokenizer.decode(generation.ids[:end]))
    return texts


def conclude(episodes: list[Episode], setup: Setup, method: str) -> list[Episode]:
    """Make the others answer: with the rest of the line after the method's cue."""
    cue = encode(setup.tokenizer, setup.prompts[method]["cue"])
    room = setup.limits.context_tokens - len(cue) - ANSWER_TOKENS
    open_ones = [e for e in episodes if e.answer is None and e.end != "failed"]
    for episode in open_ones:
        episode.end = "context" if len(episode.ids) > room else None
    open_ones = [e for e in open_ones if e.end is None]
    for episode in open_ones:
        episode.read(cue)
    texts = write_on(open_ones, setup, ANSWER_TOKENS, stop=("\n",))
    for episode, text in zip(open_ones, texts, strict=True):
        episode.turns.append(Turn(text, "answer"))
        if episode.end is None:
            episode.answer, episode.end = text.strip().partition("\n")[0].strip(), "answered"
    return episodes


def agent(rows: Rows, setup: Setup) -> list[Episode]:
    """The policy under its own template. Without an engine it is R1."""
    search = setup.engine is not None
    episodes = [new_episode(row, row.get("sample", 0), setup.tokenizer, setup.prompts, search)
                for row in rows]
    rollout(episodes, setup)
    return episodes


def direct(rows: Rows, setup: Setup) -> list[Episode]:
    """The answer at once, from what the model knows."""
    episodes = [prompted(row, setup, "direct") for row in rows]
    return conclude(episodes, setup, "direct")


def cot(rows: Rows, setup: Setup) -> list[Episode]:
    """Reasoning first, then the answer: zero-shot chain of thought (Kojima et al. 2022)."""
    episodes = [prompted(row, setup, "cot") for row in rows]
    texts = write_on(episodes, setup, setup.limits.tokens_per_turn)
    for episode, text in zip(episodes, texts, strict=True):
        episode.turns.append(Turn(text, "invalid"))
    return conclude(episodes, setup, "cot")


def rag(rows: Rows, setup: Setup) -> list[Episode]:
    """One search with the question itself; its documents stand in the prompt."""
    episodes = [blank_episode(row) for row in rows]
    for episode in episodes:
        episode.turns.append(Turn("", "search", episode.question))
    search_turn(episodes, setup)
    for episode in episodes:
        documents = setup.tokenizer.decode(episode.ids).strip()  # as read: made safe, and cut
        episode.ids, episode.mask, episode.logprobs = [], [], []
        read_prompt(episode, setup.tokenizer, setup.prompts["rag"], documents=documents)
    return conclude(episodes, setup, "rag")


REACT_ACTION = re.compile(r"(Search|Finish)\[(.*?)\]", re.DOTALL)


def ra_agent(rows: Rows, setup: Setup) -> list[Episode]:
    """ReAct (Yao et al. 2023): thought, action, observation; a cue when searches run out."""
    active = episodes = [prompted(row, setup, "ra_agent") for row in rows]
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
                episode.turns[-1] = Turn(text, "search", content)
                episode.read(encode(setup.tokenizer, "\nObservation:"))
        searching = [e for e in active if e.turns[-1].action == "search"]
        search_turn(searching, setup)
        room = setup.limits.context_tokens - setup.limits.tokens_per_turn - ANSWER_TOKENS
        active = [e for e in active if e.end is None and len(e.ids) < room]
    return conclude(episodes, setup, "ra_agent")


class Condenser:
    """An engine whose documents the model itself condenses to what the question needs."""

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
        sampling = Sampling(setup.limits.tokens_per_turn, setup.limits.temperature)
        digests = setup.generator.generate(prompts, sampling, [r.seed for r in requests])
        return [SearchResult([setup.tokenizer.decode(digest.ids, skip_special_tokens=True).strip()],
                             result.well_formed, result.prompt_tokens + len(prompt),
                             result.completion_tokens + len(digest.ids),
                             result.error or digest.error)
                for result, prompt, digest in zip(results, prompts, digests, strict=True)]


def search_o1(rows: Rows, setup: Setup) -> list[Episode]:
    """Search-o1 (Li et al. 2025): the agent's loop under its own template, on condensed documents.

    The condenser sees question, query and documents; the original also shows it the reasoning.
    What it reads and writes is counted with the simulator's tokens. A turn keeps the documents, the
    token ids hold the digest."""
    prompts = setup.prompts | {"policy": setup.prompts["policy"] | setup.prompts["search_o1"]}
    engine = Condenser(setup)
    episodes = [new_episode(row, row.get("sample", 0), setup.tokenizer, prompts) for row in rows]
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

Scores = dict[str, float]  # metrics by name
Summary = dict[str, dict[str, float]]  # metric -> n, mean, low, high


def answer_scores(answer: str | None, golden_answers: list[str]) -> dict[str, float]:
    """The metrics of one answer, each in [0, 1]."""
    return {
        "em": exact_match(answer, golden_answers),
        "f1": f1_score(answer, golden_answers),
        "cover_em": cover_em(answer, golden_answers),
        "answered": float(bool(answer and answer.strip())),
    }


COMPARED = ("em", "f1", "cover_em")
COUNTS = ("searches", "tokens")  # of an episode; every other metric is a percentage


def record_scores(record: dict[str, Any], searched: bool) -> Scores:
    """The metrics of one record, each in [0, 1]. No recall for a yes-no question, whose answer
    stands in any text."""
    golden = record["golden_answers"]
    scores = answer_scores(record["answer"], golden)
    if searched and not {"yes", "no"} & set(map(normalize_answer, golden)):
        scores["recall"] = float(any(contains_answer(text, golden)
                                     for text in documents_read(record)))
    return scores


def question_scores(records: list[dict[str, Any]], counts: Iterable[str] = ()) -> dict[str, Scores]:
    """Metrics by question, in percent: means over its samples and, of several, pass@k. counts: what
    else the records hold. recall is there if any record holds a document."""
    searched, samples = any(map(documents_read, records)), {}
    for number, record in enumerate(records):
        samples.setdefault(str(record.get("id", f"line {number}")), []).append(record)
    questions = {}
    for name, group in samples.items():
        n, scores = len(group), [record_scores(record, searched) for record in group]
        right = sum(score["em"] == 1 for score in scores)
        sizes = sorted({2**i for i in range(1, n.bit_length())} | ({n} - {1}))
        questions[name] = {key: 100 * math.fsum(score[key] for score in scores) / n
                           for key in scores[0]}
        questions[name] |= {f"pass@{k}": 100 * pass_at_k(n, right, k) for k in sizes}
        questions[name] |= {key: math.fsum(record[key] for record in group) / n for key in counts}
    return questions


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, of which n were drawn: unbiased (Chen et al. 2021,
    equation 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def summarize(rows: Iterable[Scores]) -> Summary:
    """Number of questions, mean and 95 % interval of every metric, over the questions that have it.
    Their order changes no digit.

    The interval is Wilson's where each question is right or wrong, else the bootstrap's."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    summary = {}
    for name, column in columns.items():
        values, mean = np.sort(column), math.fsum(column) / len(column)
        low, high = mean_interval(values, right_or_wrong=name not in COUNTS)
        summary[name] = {"n": len(values), "mean": mean, "low": low, "high": high}
    return summary


# ---------------------------------------------------------------- run


@dataclass(frozen=True, kw_only=True)
class RunSettings(FolderSettings, SearchSettings, EpisodeSettings):
    """Options of `run`."""

    model: str = option(help=f"{MODEL_OR_SERVER}.")
    method: str = option("agent", "How the model is put to the question.", choices=METHODS)
    benchmark: str | None = option(
        None, f"{', '.join(BENCHMARKS)} or world; several with commas; all: the paper's seven.")
    data: Path | None = option(None, "JSONL with id, question, golden_answers (--benchmark names "
                                     "it), or a folder with a NAME.jsonl of each benchmark.")
    temperature: float = option(0.0, "Of all that the model writes; 0 is greedy.", low=0)
    samples: int = option(1, "Answers to each question: their mean, and pass@k.", low=1)
    failed_searches: int = option(0, "Episodes that a server may fail; they are left out.", low=0,
                                  resumable=True)
    limit: int | None = option(None, "A random sample of so many questions, by --seed.", low=1)
    batch_size: int = option(64, "Answers at a time, over all processes.", low=1)

    def check(self) -> None:
        super().check()
        if self.benchmark is None and (self.data is None or self.data.is_dir()):
            folder = f"{self.data} is a folder: " * (self.data is not None)
            raise UserError(f"{folder}name the questions: --benchmark NAME or --data FILE")
        if len(self.names()) > 1 and self.data is not None and not self.data.is_dir():
            raise UserError("--data must be a folder for several benchmarks")
        if len(set(self.names())) < len(self.names()):
            raise UserError(f"--benchmark {self.benchmark}: one is named twice")
        if self.samples > 1 and self.temperature == 0:
            raise UserError("--samples are all alike at --temperature 0")
        if self.engine == "none" and self.method not in (*WITHOUT_SEARCH, "agent"):
            raise UserError(f"--method {self.method} searches: --engine none can't serve it")

    def unused(self) -> dict[str, str]:
        # Several methods often share a command's options: those that never search are let alone.
        return {} if self.method in WITHOUT_SEARCH else super().unused()

    def names(self) -> list[str]:
        """The benchmarks that are asked for."""
        if self.benchmark == "all":
            return list(BENCHMARKS)
        return self.benchmark.split(",") if self.benchmark else [self.data.stem]

    def jobs(self) -> list["RunSettings"]:
        """The settings of each benchmark's run: several have a folder each in `out`."""
        if len(self.names()) == 1:
            return [self]
        jobs = [replace(self, benchmark=name, out=self.out / name) for name in self.names()]
        if self.resume and any(is_run(job.out) for job in jobs):  # the others were never begun
            jobs = [replace(job, resume=is_run(job.out)) for job in jobs]
        return jobs

    def questions_file(self) -> Path:
        """The file of the one benchmark of a job."""
        if self.data is None:
            return benchmark_file(self.benchmark)
        return self.data / f"{self.benchmark}.jsonl" if self.data.is_dir() else self.data


@command(app, RunSettings)
def run(s: RunSettings) -> None:
    """Answer questions of one or several benchmarks with one model, and score the answers."""
    if s.method in WITHOUT_SEARCH:
        s = replace(s, engine="none")
    jobs = [(job, ask_for(job)) for job in s.jobs()]  # what can't be read costs no loading
    state, prompts = PartialState(), load_prompts(s.prompts)
    with ExitStack() as stack:
        folders = [stack.enter_context(RunFolder(job, prompts, state.is_main_process,
                                                 data=job.questions_file(), **s.files()))
                   for job, _ in jobs]
        # First the generator: vLLM, when it starts, trips over modules that bm25s imports.
        generator = load_generator(s.model, s.generator)
        setup = Setup(generator, ENGINES[s.engine].make(s), prompts, s, s.seed)
        for folder in folders:
            folder.open()  # only now: all that can fail has loaded
        console.print(f"generation: {generator.name}")
        results = [answer_all(rows, job, setup, state) for job, rows in jobs]
        if len(jobs) > 1 and state.is_main_process:
            print_beside_paper(results, BENCHMARKS)
        leave(state)


def ask_for(s: RunSettings) -> Rows:
    """The rows of a run: each question as often as it has samples. Raises UserError."""
    rows = read_questions(s.questions_file())
    if len({str(row["id"]) for row in rows}) < len(rows):
        raise UserError(f"{s.questions_file()}: an id occurs twice")
    return [row | {"sample": sample} for row in sample_questions(rows, s.limit, s.seed)
            for sample in range(s.samples)]


def answer_all(rows: Rows, s: RunSettings, setup: Setup, state: PartialState) -> dict[str, Any]:
    """Results of a run: of the batches that OUT holds, and of the others, which are appended."""
    predictions, ids = s.out / "predictions.jsonl", [str(row["id"]) for row in rows]
    records = whole_batches(predictions, ids, s.batch_size) if s.resume else []
    state.wait_for_everyone()
    if s.resume and state.is_main_process:
        keep_lines(predictions, len(records))
    with progress_bar() as bar:
        task = bar.add_task(f"{s.names()[0]}, {s.method}", total=len(rows), completed=len(records),
                            info="")
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
    results = run_results(records, s)
    if state.is_main_process:
        write_json(s.out / "results.json", results)
        title = f"{results['benchmark']}, {s.method}, {s.model}: {results['n']} questions"
        show_summary(title, results["metrics"], COUNTS)
    return results


def answer_batch(rows: Rows, method: Callable, setup: Setup, state: PartialState) -> Rows:
    """Records of a batch in the order of its questions, each process having answered its share."""
    started = time.perf_counter()
    mine = rows[state.process_index :: state.num_processes]
    episodes = method(mine, setup) if mine else []
    for episode in episodes:
        if episode.end != "failed":
            episode.scores = answer_scores(episode.answer, episode.golden_answers)
    everyone = gather_object([asdict(episode) for episode in episodes])
    records = {(record["id"], record["sample"]): record for record in everyone}
    seconds = (time.perf_counter() - started) / len(rows)
    ordered = [records[str(row["id"]), row["sample"]] for row in rows]
    return [record | {"tokens": sum(record["mask"]), "seconds": seconds} for record in ordered]


def run_results(records: list[dict[str, Any]], s: RunSettings) -> dict[str, Any]:
    """What results.json holds: all from the records, so that a resumed run ends with the same."""
    scored = [record for record in records if record["end"] != "failed"]
    questions = question_scores(scored, COUNTS)
    hops = {record["id"]: record["hops"] for record in scored if record["hops"]}
    by_hops = {str(h): [questions[name] for name in hops if hops[name] == h]
               for h in sorted(set(hops.values()))}
    return {
        "benchmark": s.names()[0],
        "method": s.method,
        "model": s.model,
        "engine": s.engine,
        "n": len(questions),
        "samples": s.samples,
        "failed": len(records) - len(scored),
        "metrics": summarize(questions.values()),
        "by_hops": {h: {"n": len(part)} | summarize(part) for h, part in by_hops.items()},
        "seconds": math.fsum(record["seconds"] for record in records),
        "settings": s.record(),
    }


# ---------------------------------------------------------------- score, compare


PREDICTIONS = ("JSONL with question, golden_answers, answer; FlashRAG's intermediate_data.json; "
               "Search-R1's generations as verl writes them; or a run folder.")


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help=PREDICTIONS)],
    as_json: AsJson = False,
) -> None:
    """Compute the metrics from predictions alone, in percent, whatever the order of the lines."""
    questions = question_scores(read_predictions(predictions))
    metrics = summarize(questions.values())
    if as_json:
        means = {name: m["mean"] for name, m in metrics.items()}
        intervals = {name: [m["low"], m["high"]] for name, m in metrics.items()}
        print(json.dumps({"n": len(questions), **means, "intervals": intervals}))
    else:
        show_summary(f"{predictions}: {len(questions)} questions", metrics, COUNTS)


def paired_difference(a: Path, b: Path) -> dict[str, Any]:
    """B minus A on the same questions, in points, with 95 % interval and sign-flip p-value.

    verdict: "higher" or "lower" where the interval and the test (p < 0.05) both say so, else "can't
    tell": computed differently, interval and test can disagree at the margin."""
    of_a, of_b = map(question_scores, read_paired(a, b))
    result: dict[str, Any] = {"a": str(a), "b": str(b), "n": len(of_a)}
    for name in COMPARED:
        x, y = (np.array([of[i][name] for i in sorted(of_a)]) for of in (of_a, of_b))
        (low, high), p = paired_interval(x, y), sign_flip_p(y - x)
        means = [math.fsum(values) / len(values) for values in (x, y)]
        side = "higher" if low > 0 else "lower" if high < 0 else None
        result[name] = {"a": means[0], "b": means[1], "difference": math.fsum(y - x) / len(x),
                        "low": low, "high": high, "p": p,
                        "verdict": side if side and p < 0.05 else "can't tell"}
    return result


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Run folder or predictions, as for score.")],
    b: Annotated[Path, typer.Argument(help="Another, on the same questions.")],
    as_json: AsJson = False,
) -> None:
    """Compare two runs question by question: B minus A, with 95 % interval and p-value.

    B is called higher or lower where interval and p-value agree on it."""
    result = paired_difference(a, b)
    if as_json:
        return print(json.dumps(result))
    rows = [[name, f"{d['a']:.2f}", f"{d['b']:.2f}", f"{d['difference']:+.2f}",
             f"{d['low']:+.2f} to {d['high']:+.2f}", f"{d['p']:.4f}", d["verdict"]]
            for name, d in result.items() if name in COMPARED]
    title = f"A: {a}\nB: {b}\n{result['n']} questions, in percent"
    print_table(title, ["", "A", "B", "B - A", "95 % interval", "p", "B is"], rows)


# ---------------------------------------------------------------- table

@app.command()
def table(
    runs: Annotated[list[str], typer.Argument(
        help="Evaluation folders; those of one model and method form a row. Or predictions as for "
             "score, with their benchmark: nq=FILE, or ROW/nq=FILE to name their row.")],
    paper_row: Annotated[str | None, typer.Option(
        help="The paper's row, such as table3/Qwen-2.5-3B/ZeroSearch-inst.")] = None,
    paper_model: Annotated[str | None, typer.Option(
        help="Or its model: prompted methods then stand beside their rows of table 3.")] = None,
    metric: Annotated[str, typer.Option(help="em; f1; recall; cover_em: the published EM.")] = "em",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """EM, or another metric, beside a row of the paper's tables, and the difference."""
    check_value("--metric", metric, {"choices": (*COMPARED, "recall")})
    results = [given_results(argument) for argument in runs]
    print_beside_paper(results, BENCHMARKS, metric, paper_row, paper_model, markdown)


def given_results(argument: str) -> dict[str, Any]:
    """The results that an argument of `table` names: a folder's, or those of predictions."""
    label, equals, path = argument.partition("=")
    if Path(argument).is_file():
        raise UserError(f"{argument} is a file: name its benchmark, such as nq={argument}")
    if not equals or Path(argument).exists():
        return read_results(Path(argument))
    row, _, benchmark = label.rpartition("/")
    if (Path(path) / "results.json").exists():
        results = read_results(Path(path))
        return results | {"benchmark": benchmark, "method": row or results["method"]}
    questions = question_scores(read_predictions(Path(path)))
    return {"benchmark": benchmark, "method": row or "predictions", "model": "",
            "n": len(questions), "metrics": summarize(questions.values())}


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
        differences = paired_sentences(evaluations, names, paired_difference)
        parts += evaluation_section(evaluations, differences, out)
        parts += episodes_section([names[name] for name, r in evaluations.items()
                                   if r["method"] == "agent"])
    if trainings:
        folders = {name: names[name] for name in trainings}
        parts += training_section(trainings, read_held_out(folders), out)
        parts += simulator_section(folders)
        parts += cost_section(*costs.run_bills({name: names[name] for name in stages}), out)
    parts += time_section(seconds, trainings, out / "seconds.txt")
    parts += [f"Made by `{shlex.join(['python', 'evaluate.py', *sys.argv[1:]])}`."]
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    console.print(f"report: {out / 'report.md'}")


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
    model: str = option(help=f"{MODEL_OR_SERVER}.")
    answer: list[str] = option((), "simulator: the true answer (repeatable), as in training.")


@command(app, AskSettings)
def ask(s: AskSettings) -> None:
    """Watch the agent answer a question: thoughts dim, searches blue, documents yellow."""
    generator = load_generator(s.model, s.generator)
    aloud = Aloud(generator, ENGINES[s.engine].make(s), generator.tokenizer)
    engine = aloud if aloud.engine else None  # it stands for the generator and for the engine
    setup = Setup(aloud, engine, load_prompts(s.prompts), s, s.seed)
    row = {"id": "ask", "question": s.question, "golden_answers": list(s.answer)}
    (episode,) = agent([row], setup)
    Console().print(plain(f"\n{episode.answer or 'no answer'}"), style="bold", end=" ")
    Console().print(f"({episode.searches} searches)")


if __name__ == "__main__":
    run_cli(app)
