"""What people look at: the sections of a report, and an episode while it is played."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from plumbing.cli import UserError, markdown_table, plain, print_table
from plumbing.engines import SearchEngine, SearchRequest, SearchResult
from plumbing.episodes import episode_text, read_episodes, simulated_samples, telling_pairs
from plumbing.files import read_jsonl
from plumbing.formats import published_row
from plumbing.generate import Generation, Generator, Sampling
from plumbing.report import draw_costs, draw_em, draw_hops, draw_training, with_interval
from plumbing.runfolder import is_run, read_config
from plumbing.text import neutralize


def show_summary(title: str, metrics: dict[str, dict[str, float]], counts: Sequence[str]) -> None:
    """Print the metrics of an evaluation. counts: those that are no percentages."""
    rows = [[name + ", %" * (name not in counts), str(m["n"]), f"{m['mean']:.2f}",
             f"{m['low']:.2f} to {m['high']:.2f}"]
            for name, m in metrics.items()]
    print_table(title, ["", "n", "mean", "95 % interval"], rows)


def show_probe(figures: dict[str, Any]) -> None:
    """Print what `probe` found of a simulator."""
    rows = [[kind, str(entry["n"]), f"{100 * entry['share']:.1f} %"]
            for kind, entry in figures["holds_answer"].items()]
    print_table("simulator", ["output", "n", "holds what the query asks"], rows)
    print(f"bridge queries answered with the question's answer: "
          f"{100 * figures['gives_away']['share']:.1f} %\n"
          f"parses into the documents asked for: {100 * figures['parses']:.1f} %\n"
          f"words per document: {figures['words_per_document']:.1f}")


PAPER_NOTE = """\
Cells: mean, 95 % interval (Wilson's of a proportion, else the bootstrap's), number of questions n.
The average's interval comes from the seven: the squared distances of their ends from their means
add up (Zou and Donner 2008).
The paper's figures are taken as they stand: of 500 questions a benchmark, Bamboogle's of 125
(prompted rows) or 72 (RL rows), as their digits tell.
em is equality after normalisation. The published code calls a substring match EM, so the paper's
rows of trained policies are probably cover_em (--metric cover_em): never below em, and 0.8 to 5.5
points above it on 5,375 published predictions of Search-R1 (GaurisankarJ/reason_over_search)."""


def print_beside_paper(results: list[dict], benchmarks: Sequence[str], metric: str = "em",
                       paper_row: str | None = None, paper_model: str | None = None,
                       markdown: bool = False) -> None:
    """Print results (of results.json) as rows by benchmark, each above the paper's row and the
    difference, which only a metric that the paper prints has."""
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for r in results:
        group = groups.setdefault((r["method"], r["model"]), {})
        if r["benchmark"] in group:
            raise UserError(f"two runs of {r['method']} with {r['model']} on {r['benchmark']}")
        if metric not in r["metrics"]:
            raise UserError(f"the results of {r['method']} on {r['benchmark']} lack {metric}")
        group[r["benchmark"]] = {"n": r["n"]} | r["metrics"][metric]
    known = {name for group in groups.values() for name in group}
    columns = [*(name for name in benchmarks if name in known),
               *sorted(known.difference(benchmarks)), "avg"]
    rows, joint = [], "<br>" if markdown else "\n"
    for (method, model), ours in groups.items():
        label, theirs = published_row(paper_model, paper_row, method)
        ours |= {"avg": average(ours, benchmarks)} if ours.keys() >= set(benchmarks) else {}
        shared = [c for c in ours if c in theirs and metric in ("em", "cover_em")]
        cells = {", ".join(filter(None, (method, model))): {c: cell(ours[c], joint) for c in ours}}
        if theirs:
            cells[f"  paper: {label}"] = {c: f"{value:.1f}" for c, value in theirs.items()}
            cells["  difference"] = {c: cell(ours[c], joint, theirs[c]) for c in shared}
        rows += [[name, *(row.get(c, "-") for c in columns)] for name, row in cells.items()]
    if markdown:
        print(markdown_table([f"{metric}, %", *columns], rows))
    else:
        print_table(f"{metric}, %, beside the paper", ["", *columns], rows)
    print("\n" * markdown + PAPER_NOTE)


def cell(m: dict[str, float], joint: str, paper: float | None = None) -> str:
    """Mean, 95 % interval and number of questions; or the difference from the paper's figure."""
    sign, less = ("", 0.0) if paper is None else ("+", paper)
    mean, low, high = (f"{m[key] - less:{sign}.1f}" for key in ("mean", "low", "high"))
    return joint.join((mean, f"{low} to {high}", f"n {m['n']}"))


def average(ours: dict[str, dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    """The mean of several benchmarks, and its interval from theirs: squared distances of
    independent figures add up, below and above apart (Zou and Donner 2008)."""
    parts = [ours[name] for name in names]
    mean = math.fsum(m["mean"] for m in parts) / len(parts)
    below, above = (math.hypot(*(m["mean"] - m[end] for m in parts)) / len(parts)
                    for end in ("low", "high"))
    return {"mean": mean, "low": mean - below, "high": mean + above,
            "n": sum(m["n"] for m in parts)}


def run_names(runs: list[Path]) -> dict[str, Path]:
    """Each run by its folder's name, or by its path where another has the same name. The folders
    before-rl, after-rl and after-rl-1 are called before RL, after RL, and after RL, seed 1."""
    folders = [run.resolve().name for run in runs]
    folders = [re.sub(r"^(before|after)-rl$", r"\1 RL", name) for name in folders]
    folders = [re.sub(r"^after-rl-(\d+)$", r"after RL, seed \1", name) for name in folders]
    return {str(run) if folders.count(folder) > 1 else folder: run
            for folder, run in zip(folders, runs)}


def evaluation_section(evaluations: dict[str, dict], differences: list[str],
                       out: Path) -> list[str]:
    """Tables by run and by hops, sentences on paired differences, and the bars.

    evaluations: results.json by the run's name."""
    header = ["run", "benchmark", "method", "engine", "n", "EM, %", "F1, %", "cover-EM, %",
              "searches a question"]
    rows = []
    for name, r in evaluations.items():
        scores = [with_interval(r["metrics"][metric]) for metric in ("em", "f1", "cover_em")]
        searches = with_interval(r["metrics"]["searches"], 2)
        kind = [r["benchmark"], r["method"], r["engine"], str(r["n"])]
        rows.append([name, *kind, *scores, searches])
    parts = ["## Test", "Answers against the golden ones; in brackets the 95 % interval: Wilson's "
             "of a proportion, else the bootstrap's.",
             markdown_table(header, rows, text_columns=4)]
    parted = {name: r["by_hops"] for name, r in evaluations.items() if r.get("by_hops")}
    hops = sorted({hop for by_hops in parted.values() for hop in by_hops})
    for title, metric, digits in (("EM, %", "em", 1), ("searches", "searches", 2)):
        rows = [[name, *(f"{with_interval(found[hop][metric], digits)}, n {found[hop]['n']}"
                         if metric in found.get(hop, {}) else "-" for hop in hops)]
                for name, found in parted.items()]
        if any(cell != "-" for _, *cells in rows for cell in cells):
            parts.append(markdown_table([f"{title}, by number of hops", *hops], rows))
    draw_em(evaluations, out / "em.png")
    parts += [*differences, "![Exact match by method](em.png)"]
    agents = {name: by_hops for name, by_hops in parted.items()
              if evaluations[name]["method"] == "agent"}
    if agents and all("searches" in part for found in agents.values() for part in found.values()):
        draw_hops(agents, out / "hops.png")
        parts.append("![Exact match and searches by number of hops](hops.png)")
    return parts


def paired_sentences(evaluations: dict[str, dict], names: dict[str, Path],
                     paired_difference: Callable[[Path, Path], dict]) -> list[str]:
    """The difference of each later agent from the first one in words, or why there is none."""
    agents = [name for name, r in evaluations.items() if r["method"] == "agent"]
    sentences = []
    for b in agents[1:]:
        a = agents[0]
        try:
            result = paired_difference(names[a], names[b])
        except UserError as error:  # it alone needs predictions.jsonl
            sentences.append(f"No paired difference of {a} and {b}: {error}.")
            continue
        em, f1 = (f"{d['difference']:+.1f} points (95 % interval {d['low']:+.1f} to "
                  f"{d['high']:+.1f}, p = {d['p']:.4f}: {d['verdict']})"
                  for d in (result["em"], result["f1"]))
        sentences.append(f"The same {result['n']} questions, **{b}** minus **{a}**: "
                         f"EM {em}, F1 {f1}.")
    return sentences


def episodes_section(agents: list[Path]) -> list[str]:
    """Whole episodes of the same questions in two runs, one of them a failure if there is any.

    agents: folders of evaluations; of more than two, the first two. If there are not two, with
    their predictions: no section."""
    agents = agents[:2]
    if len(agents) < 2 or not all((run / "predictions.jsonl").exists() for run in agents):
        return []
    parts = []
    for kind, pair in telling_pairs(*map(read_episodes, agents)).items():
        texts = [f"{when}:\n\n```\n{episode_text(record)}\n```"
                 for when, record in zip(("Before", "After"), pair)]
        parts += [f"### {kind}", *texts]
    return ["## The same questions, before and after", *parts] if parts else []


def simulator_section(runs: dict[str, Path]) -> list[str]:
    """What each simulator wrote, asked for useful and for noisy documents, in the first training
    run with it."""
    parts, shown = [], set()
    for name, run in runs.items():
        settings = read_config(run)["settings"] if is_run(run) else {}
        simulator = settings.get("simulator")
        if (settings.get("engine") != "simulator" or simulator in shown
                or not (run / "episodes.jsonl").exists()):
            continue
        shown.add(simulator)
        for quality, samples in simulated_samples(read_episodes(run)).items():
            if samples:
                text = "\n\n".join(samples)
                parts.append(f"{name}, asked for {quality} documents:\n\n```\n{text}\n```")
    return ["## What the simulator wrote", *parts] if parts else []


def read_held_out(runs: dict[str, Path]) -> dict[str, list[dict]]:
    """Lines of eval.jsonl by training run, of those that have evaluated."""
    files = {name: run / "eval.jsonl" for name, run in runs.items()}
    return {name: read_jsonl(file, ("step",)) for name, file in files.items() if file.exists()}


def training_section(trainings: dict[str, list[dict]], held_out: dict[str, list[dict]],
                     out: Path) -> list[str]:
    """First and last tenth of each training run, and the curves.

    trainings, held_out: lines of metrics.jsonl and of eval.jsonl by run."""
    rows = []
    for name, steps in trainings.items():
        tenth = max(1, len(steps) // 10)
        rows.append([name, str(len(steps))])
        for key in ("reward/mean", "search/per_episode", "noise/p"):
            parts = (steps[:tenth], steps[-tenth:])
            first, last = (np.mean([step.get(key, math.nan) for step in part]) for part in parts)
            known = key in steps[0]  # there is no noise with a real engine
            rows[-1].append(f"{first:.2f} to {last:.2f}" if known else "-")
        curve = [line["eval/reward"] for line in held_out.get(name, [])]
        rows[-1].append(f"{curve[0]:.2f} to {curve[-1]:.2f}" if curve else "-")
    draw_training(trainings, held_out, out / "training.png")
    header = ["run", "steps", "reward", "searches an episode", "noise p", "held-out reward"]
    return ["## Training", "From the mean over the first tenth of the steps to that over the last; "
            "the held-out reward (greedy, no noise) before the first step and after the last.",
            markdown_table(header, rows), "![Reward, searches and noise over steps](training.png)"]


def cost_section(bills: dict[str, dict], notes: list[str], out: Path) -> list[str]:
    """bills: by run its searches, its device, and its bars {kind: (dollars, text)}."""
    if bills:
        kinds = list(next(iter(bills.values()))["bars"])
        rows = [[name, bill["searches"], *(text for _, text in bill["bars"].values()),
                 bill["device"]] for name, bill in bills.items()]
        draw_costs({name: bill["bars"] for name, bill in bills.items()}, out / "costs.png")
        table = markdown_table(["run", "searches", *kinds, "device"], rows)
        notes = [table, *notes, "![Cost](costs.png)"]
    return ["## Cost", "What the searches would have cost at an API, and what the run cost, at the "
            "prices of data/prices.toml.", *notes]


def time_section(seconds: dict[str, float], trainings: dict[str, list[dict]],
                 written: Path) -> list[str]:
    """Seconds of every stage, those that make has written, else those of steps and answers; and
    how fast the machine was: a step's FLOPs per second over the share of the peak that they are."""
    parts = ["Spent in training steps and in answering; loading is not counted."]
    rows = [[name, "-" if math.isnan(s) else f"{s:,.0f} s"] for name, s in seconds.items()]
    if written.exists():
        lines = written.read_text(encoding="utf-8").splitlines()
        parts, rows = [], [line.rsplit(": ", 1) for line in lines]
    peaks = {name: step["rate/update_tflops"] / step["rate/mfu"]
             for name, (step, *_) in trainings.items() if step.get("rate/mfu")}
    parts += [f"The machine's rate when {name} began, a large matrix product: {peak:.2f} TFLOP/s."
              for name, peak in peaks.items()]
    return ["## Time", *parts, markdown_table(["stage", "time"], rows)]


SEGMENTS = {"think": "dim", "search": "bold cyan", "answer": "bold green"}


def coloured(text: str) -> Text:
    """A text with the policy's blocks in their colours, documents (indented lines) in yellow."""
    shown = plain(text)
    for tag, style in SEGMENTS.items():
        shown.highlight_regex(re.compile(rf"<{tag}>.*?(</{tag}>|$)", re.DOTALL), style)
    shown.highlight_regex(re.compile(r"^    \d+\. .*$", re.M), "yellow")
    return shown


class Aloud:
    """A generator and an engine that print all that passes through them."""

    concurrent = False

    def __init__(self, generator: Generator, engine: SearchEngine | None, tokenizer):
        self.generator, self.engine, self.tokenizer = generator, engine, tokenizer

    def generate(self, prompts: list[list[int]], sampling: Sampling,
                 seeds: list[int]) -> list[Generation]:
        generations = self.generator.generate(prompts, sampling, seeds)
        for generation in generations:
            if generation.error:
                raise UserError(generation.error)
            text = self.tokenizer.decode(generation.ids, skip_special_tokens=True).strip()
            Console().print(coloured(text))
        return generations

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        results = self.engine.search(requests)
        for result in results:
            if result.error:
                raise UserError(result.error)
            documents = [neutralize(document, self.tokenizer) for document in result.documents]
            lines = [f"{n}. {document}" for n, document in enumerate(documents, start=1)]
            lines = lines or ["nothing found"]
            Console().print(plain("\n".join(lines)), style="yellow")
        return results
