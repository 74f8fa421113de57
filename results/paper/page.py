"""The page of the miniature: a row a claim, a row an arm, the curves; and the exercises.

    .venv/bin/python results/paper/page.py    # README.md, exercises.md, curves.png; in seconds

All comes from files: what run.py kept of each arm (config.json, metrics.jsonl, eval.jsonl,
clean.jsonl, noisy.jsonl), arms.toml, data/paper.json and data/prices.toml.
"""

import json
import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

# first: here `evaluate` is chapter 3, not the package
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import costs
import evaluate
from arms import HERE, Cell, Out, list_cells, read_arms
from plumbing.cli import console, make_app, markdown_table, run_cli
from plumbing.files import read_jsonl
from plumbing.intervals import paired_interval
from plumbing.report import COLOURS, panels, save_figure, with_interval
from plumbing.text import ROOT

app = make_app(__doc__)
PAPER = json.loads((ROOT / "data/paper.json").read_text(encoding="utf-8"))
LABELS = {"table3_main": "Table 3", "table4_simulators": "Table 4", "table5_algorithms": "Table 5",
          "table6_curriculum": "Table 6", "table7_loss_masking": "Table 7"}
# Student's t that 2.5 % of draws exceed, with 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Arms = dict[str, list[Cell]]  # an arm's seeds by its name


@app.command()
def main(out: Out = HERE) -> None:
    """Write README.md, exercises.md and curves.png from what is kept."""
    _, table = read_arms()
    by_arm: Arms = {}
    for cell in list_cells([], [], out):
        by_arm.setdefault(cell.arm.name, []).append(cell)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(by_arm, out / "curves.png")
    for name, parts in (("README.md", claims_page(table, by_arm, out)),
                        ("exercises.md", exercises_page(table, by_arm, out))):
        (out / name).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        console.print(f"written: {out / name}", soft_wrap=True)


def claims_page(table: dict[str, Any], by_arm: Arms, out: Path) -> list[str]:
    """The parts of README.md."""
    ours = out.resolve() == HERE
    arms, noisy, starts = (os.path.relpath(HERE / name, out)
                           for name in ("arms.toml", "noisy.py", "../demo/starts.md"))
    return [
        "# The paper in miniature",
        "The claims of the paper, run again on the demo's world with a model of 135M. "
        "`.venv/bin/python results/paper/page.py` makes this page from files: what `run.py` kept "
        f"of each run, and [arms.toml]({arms}), which has the arms, the claims and the "
        "rules; its head says what was fixed before the arms ran, and what came later. "
        f"{machines(by_arm)} **Students:** the [exercises](exercises.md) ask first and answer "
        "afterwards.",
        "## Claims", claims_table(table, by_arm),
        CLAIMS_NOTE.format(**table) + " " + yardstick(by_arm),
        "What a row does not show:", caveats(table, ours),
        "## Arms", arms_table(by_arm),
        ARMS_NOTE + standstills(by_arm) + SEEN_NOTE * ours,
        f"EM noisy: each document of a search is, with a chance of one half, replaced by one of a "
        f"deeper rank ([noisy.py]({noisy})). " + noisy_note(by_arm),
        "![Training reward and held-out reward of every arm](curves.png)",
        "Held-out questions are asked without noise and with the real engine, in every arm; also "
        "in `r1`, although it trains and is tested without a search engine.",
        "## What can't be tested at this size",
        "- Model sizes: the policy and the simulator are SmolLM2-135M.\n"
        "- Google: the real engine is BM25 over 3,129 passages, and misses little of what is "
        "asked for.\n- Seven benchmarks: all questions are of the demo's world.\n"
        "- Other starts: one warm start and one simulator serve all arms and seeds, and warm "
        f"starts differ much ([starts.md]({starts})).",
    ]


CLAIMS_NOTE = """\
A difference is in points of exact match (EM) on the same {questions} questions of the demo's \
world, with the real engine (BM25), greedy; of several seeds, a question's scores are averaged \
first. Most differences are in three hops, a fifth of the questions; a policy that learns to plan \
three searches can lose on two hops, which count twice as much.

Rule "higher": agrees if the whole interval is above 0, disagrees if it is below, else can't tell \
(the interval allows both). "Not worse": the same with -{margin:g} in the place of 0; "but lower": \
within {margin:g} points, yet the whole interval is below 0. There are two intervals. The one over \
questions covers the choice of questions, and gives the verdict in bold, as was fixed before the \
arms ran (rows 1, 4 and 5 restate results of the demo that were known by then). The one over seeds \
(Student's t) covers chance in RL alone: warm start, simulator and questions are the same for all \
seeds. It was added later. All claims are tested without a correction for their number.

The paper's figures are averages over seven benchmarks, without intervals; its code accepts an \
answer that contains the golden one, ours must equal it. Its 34.47 is Qwen-2.5-3B trained with \
REINFORCE and a tuned simulator of 14B; our ZeroSearch is trained with GRPO. Its differences in \
Tables 3 (to Search-R1) to 7 are of 1.0 to 1.9 points, less than the width of our intervals."""

ARMS_NOTE = """\
A trained arm is the demo's RL run with the change that is named, from the same warm start. EM in \
percent with its 95 % interval over questions. An arm of one seed has seed 0: compare it with the \
first figure of zerosearch under "by seed", not with the mean. Noise: the share of training \
searches for which the simulator was asked for noisy documents. Training reward: the mean of the \
first and of the last fifth of the steps. It depends on the questions that a step draws and on \
the noise, so it does not measure progress; held-out reward does. Costs are of one run, the mean \
over seeds, at the prices of data/prices.toml (`costs.py run`). SerpApi: what the searches of \
training would cost there; search side: what answering them cost, a part of the whole run. A \
simulator is cheaper than an API, but not than local BM25, which is almost free. A bill is cores \
times seconds, and other work on the machine lengthens them; some runs had one core, the others \
two (`hardware` in config.json). So the bills of whole runs don't rank the algorithms."""


SEEN_NOTE = """ \
RA-Agent and Search-o1: the untuned model hardly searches with these prompts; that says nothing of \
the methods."""


def machines(by_arm: Arms) -> str:
    """Of which commits and machines the kept runs are."""
    runs = [cell.kept("metrics.jsonl") for cells in by_arm.values() for cell in cells
            if cell.kept("metrics.jsonl").exists()]
    if not runs:
        return "No arm has been trained yet."
    commits = {str(json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
                   .get("commit"))[:7] for path in runs}
    rates = [row["rate/update_tflops"] / row["rate/mfu"] for path in runs
             for row in read_jsonl(path) if row["rate/mfu"]]  # else nothing was trained
    return (f"Trained at commits {', '.join(sorted(commits))}, on machines whose large matrix "
            f"product runs at {min(rates):.2f} to {max(rates):.2f} TFLOP/s.")


# ---------------------------------------------------------------- claims


def scores_of(cells: list[Cell], test: str) -> dict[int, dict[str, float]]:
    """EM of each question in percent, by seed, of the cells that have been tested."""
    found = {}
    for cell in cells:
        path = cell.kept(f"{test}.jsonl")
        if path.exists():
            rows = [row for row in read_jsonl(path) if row["end"] != "failed"]
            found[cell.seed] = {name: scores["em"]
                                for name, scores in evaluate.question_scores(rows).items()}
    return found


def difference(better: list[Cell], than: list[Cell], test: str) -> dict[str, Any] | None:
    """`better` minus `than`, paired by question: over the seeds that both have; an arm that was
    not trained is the same for every seed. None where an arm has no result."""
    of_better, of_than = scores_of(better, test), scores_of(than, test)
    if not (of_better and of_than):
        return None
    if than[0].arm.method:
        of_than = dict.fromkeys(of_better, of_than[0])
    seeds = sorted(of_better.keys() & of_than.keys())
    questions = sorted(set.intersection(
        *(set(scores[seed]) for scores in (of_better, of_than) for seed in seeds)))
    ours, base = (np.array([[scores[seed][question] for question in questions] for seed in seeds])
                  for scores in (of_better, of_than))  # (seeds, questions)
    low, high = paired_interval(base.mean(0), ours.mean(0))
    by_seed = (ours - base).mean(1).tolist()
    return {"n": len(questions), "difference": float((ours - base).mean()), "low": low,
            "high": high, "by_seed": by_seed, "over_seeds": seeds_interval(by_seed),
            "by_hops": hops_means((ours - base).mean(0), questions, better, test)}


def seeds_interval(values: list[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of the seeds' values. None for a single seed."""
    if len(values) < 2:
        return None
    half = (STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * statistics.stdev(values)
            / math.sqrt(len(values)))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def hops_means(values: np.ndarray, questions: list[str], cells: list[Cell],
               test: str) -> list[float]:
    """Means of the questions' values by number of hops, from the fewest on."""
    hops = {str(row["id"]): row["hops"] for row in tested_rows(cells, test)}
    of = np.array([hops[question] for question in questions])
    return [float(values[of == n].mean()) for n in np.unique(of)]


def verdict(rule: str, interval: tuple[float, float], margin: float) -> str:
    """What the interval of a difference says of a claim, by the rule fixed beforehand. "But lower":
    not worse by the margin, yet the whole interval is below 0."""
    (low, high), bound = interval, {"higher": 0.0, "not worse": -margin}[rule]
    found = "agrees" if low > bound else "disagrees" if high < bound else "can't tell"
    return f"{found}, but lower" if rule == "not worse" and bound < low and high < 0 else found


def published(path: str) -> float:
    """A figure of data/paper.json by its path."""
    value: Any = PAPER
    for key in path.split("/"):
        value = value[key]
    return value


def claims_table(table: dict[str, Any], by_arm: Arms) -> str:
    header = ["claim", "the paper's average, %", "here: difference (95 %)", "by 1, 2, 3 hops",
              "by seed (95 % over seeds)", "rule", "verdict", "over seeds"]
    rows = [claim_row(claim, by_arm, table["margin"]) for claim in table["claims"]]
    return markdown_table(header, rows, text_columns=len(header))


def claim_row(claim: dict[str, Any], by_arm: Arms, margin: float) -> list[str]:
    theirs = "-"
    if paths := claim.get("paper"):
        a, b = map(published, paths)
        theirs = f"{a} and {b} ({LABELS[paths[0].split('/')[0]]})"
    test, rule = claim.get("test", "clean"), claim["rule"]
    found = difference(by_arm[claim["better"]], by_arm[claim["than"]], test)
    if not found:
        return [claim["says"], theirs, "not run yet", "-", "-", rule, "-", "-"]
    engine = ", noisy engine" if test == "noisy" else ""
    ours = (f"{found['difference']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f}), "
            f"n {found['n']}{engine}")
    hops, seeds = (", ".join(f"{value:+.1f}" for value in found[key])
                   for key in ("by_hops", "by_seed"))
    over_seeds = "one seed"
    if interval := found["over_seeds"]:
        seeds += f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
        over_seeds = verdict(rule, interval, margin)
    judged = verdict(rule, (found["low"], found["high"]), margin)
    return [claim["says"], theirs, ours, hops, seeds, rule, f"**{judged}**", over_seeds]


def yardstick(by_arm: Arms) -> str:
    """How far the seeds of the first arm, the method itself, lie apart."""
    cells = next(iter(by_arm.values()))
    scores = list(scores_of(cells, "clean").values())
    if len(scores) < 2:
        return ""
    questions = sorted(set.intersection(*map(set, scores)))
    by_hops = np.array([hops_means(np.array([of[question] for question in questions]), questions,
                                   cells, "clean") for of in scores])  # (seeds, hops)
    means = [statistics.fmean(of.values()) for of in scores]
    return (f"A yardstick for rows of one seed: {len(scores)} seeds of {cells[0].arm.name} itself "
            f"span {max(means) - min(means):.1f} points, and "
            f"{', '.join(f'{span:.1f}' for span in np.ptp(by_hops, axis=0))} by hops. A difference "
            "of that order shows nothing, and a somewhat larger one may still be chance.")


def caveats(table: dict[str, Any], ours: bool) -> str:
    """What the claims' rows don't show. ours: with what was seen in the runs that are kept here."""
    said = [(claim["says"], claim.get("but", ""), claim.get("seen", "") if ours else "")
            for claim in table["claims"]]
    return "\n".join(f"- {says}: {' '.join(filter(None, texts))}" for says, *texts in said
                     if any(texts))


# ---------------------------------------------------------------- exercises


def exercises_page(table: dict[str, Any], by_arm: Arms, out: Path) -> list[str]:
    """The parts of exercises.md. An exercise compares an arm with the first one, the method."""
    claims = os.path.relpath(HERE / "README.md", out)
    return ["# Exercises", EXERCISES_NOTE.format(claims=claims),
            "\n".join(f"{number}. {exercise(row, by_arm, ours=out.resolve() == HERE)}"
                      for number, row in enumerate(table["exercises"], 1))]


EXERCISES_NOTE = """\
Each is one more run, from the root of the repository, after `make demo`: on two cores at 0.9 \
TFLOP/s 7 to 29 minutes of training (`run.py` says first how long it takes on yours; in float32, \
as on most laptops, four times as long), then one or two tests. What every arm is compared with, \
your demo's own policy and warm start, is tested once, in minutes:

```bash
.venv/bin/python results/paper/run.py zerosearch before-rl --seeds 0 --out runs/mine
```

(Don't compare with our runs: on another kind of CPU your simulator and warm start have slightly \
different weights. Delete runs/mine when you make the demo anew.) Write down what you expect, \
before you look at [the claims]({claims}). Then run the arm; `.venv/bin/python \
results/paper/page.py --out runs/mine` writes these pages about your runs. `.venv/bin/python \
evaluate.py show runs/mine/ARM-0 --step 15 --limit 64` prints the trajectories of the last \
training step, and each run's folder has metrics.jsonl and eval.jsonl. Answer with the two \
numbers that you compared, and why they differ. How far seeds differ (see the claims) tells which \
differences are too small to explain. In what the runs show, a → b are means over the first and \
the last fifth of the steps; five numbers are the five evaluations."""

METRICS = re.compile(r"`((?:reward|search|eval|loss|noise|tokens)(?:/\w+)+)`")


def exercise(row: dict[str, str], by_arm: Arms, ours: bool) -> str:
    """A question, its command, what to compare, and what the runs show: of seeds that the arm and
    the method share. ours: with our reading, which is of the runs that are kept here."""
    arm, method = by_arm[row["arm"]], next(iter(by_arm.values()))
    seeds = {cell.seed for cell in arm if cell.kept("clean.jsonl").exists()}
    shared = [cell for cell in method if cell.seed in seeds] or method
    others = [by_arm[row["beside"]]] if "beside" in row else []
    metrics = METRICS.findall(row["look"])
    shown = "<br>".join(tests_line(cells) + courses(cells, metrics)
                        for cells in (arm, *others, shared))
    if ours and "reading" in row:
        shown += f"<br>Our reading: {row['reading']}"
    to_run = " ".join(cells[0].arm.name for cells in (arm, *others))
    return (f"**{row['asks']}** `.venv/bin/python results/paper/run.py {to_run} --seeds 0 --out "
            f"runs/mine`<br>Compare: {row['look']}"
            f"<details><summary>What the runs show</summary>{shown}</details>")


def tests_line(cells: list[Cell]) -> str:
    """What the tests of an arm's kept runs show: EM and searches by number of hops."""
    arm = cells[0].arm
    clean, noisy = (tested_rows(cells, test) for test in ("clean", "noisy"))
    if not clean:
        return f"{arm.name} has not been run yet"
    hops = sorted({row["hops"] for row in clean})
    em, searches = ([mean_score([row for row in clean if row["hops"] == n], name) for n in hops]
                    for name in ("em", "searches"))
    seeds = sorted({row["sample"] for row in clean})
    said = (f"{arm.name}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: EM "
            f"{', '.join(f'{value:.0f}' for value in em)} with {', '.join(map(str, hops))} hops, "
            f"in {', '.join(f'{n:.1f}' for n in searches)} searches")
    return said + (f", EM {mean_score(noisy, 'em'):.0f} with the noisy engine" if noisy else "")


def mean_score(rows: list[dict[str, Any]], name: str) -> float:
    return evaluate.summarize(evaluate.question_scores(rows, evaluate.COUNTS).values())[name][
        "mean"]


def courses(cells: list[Cell], names: list[str]) -> str:
    """How metrics went in training: of the held-out questions each time, of a step's episodes the
    mean of the first and of the last fifth of the steps."""
    said = ""
    for name in names:
        if name.startswith("eval/"):
            columns = kept_columns(cells, "eval.jsonl", name)
            values = [statistics.fmean(times) for times in zip(*columns)]
        else:
            values = first_and_last(kept_columns(cells, "metrics.jsonl", name))
        if values:
            said += f", {name} " + " → ".join(
                f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in values)
    return said


def kept_columns(cells: list[Cell], log: str, name: str) -> list[list[float]]:
    """A metric over the steps, of each seed whose log has it."""
    columns = [[row[name] for row in read_jsonl(path) if name in row] for cell in cells
               if (path := cell.kept(log)).exists()]
    return [column for column in columns if column]


def first_and_last(columns: list[list[float]]) -> list[float]:
    """Means over the first and over the last fifth of each column, and over the columns."""
    fifths = [(column, max(1, len(column) // 5)) for column in columns]
    ends = [(statistics.fmean(column[:n]), statistics.fmean(column[-n:])) for column, n in fifths]
    return [statistics.fmean(values) for values in zip(*ends)]


# ---------------------------------------------------------------- arms


def tested_rows(cells: list[Cell], test: str) -> list[dict[str, Any]]:
    """The predictions of an arm's seeds, as samples of one question. Failed ones are left out."""
    return [row | {"sample": cell.seed} for cell in cells
            if (path := cell.kept(f"{test}.jsonl")).exists()
            for row in read_jsonl(path) if row["end"] != "failed"]


def arms_table(by_arm: Arms) -> str:
    header = ["arm", "what it is", "seeds", "EM clean", "by seed", "EM noisy",
              "searches per question", "noise, %", "training reward", "SerpApi", "search side",
              "whole run"]
    return markdown_table(header, [arm_row(cells) for cells in by_arm.values()], text_columns=2)


def noisy_note(by_arm: Arms) -> str:
    """A sentence on what the noisy test can show: do policies ask again, and what if they don't?"""
    pairs, changed, hops = 0, 0, {}
    for cells in by_arm.values():
        if cells[0].arm.method not in (None, "agent"):  # as RAG: one search, whatever it finds
            continue
        noisy = {(row["sample"], row["id"]): row for row in tested_rows(cells, "noisy")}
        for row in tested_rows(cells, "clean"):
            if other := noisy.get((row["sample"], row["id"])):
                pairs, changed = pairs + 1, changed + (other["searches"] != row["searches"])
                hops[row["id"]] = row["hops"]
    if not pairs:
        return ""
    expected = 100 * statistics.fmean(0.5**n for n in hops.values())
    return (f"Most facts stand in one document, so about half of the searches miss. Asking again "
            f"would help, for the next search is drawn anew; but of {pairs:,} pairs of a question "
            "with the clean and with the noisy engine, the number of searches differs in "
            f"{changed}. A policy that makes the right searches, each once, can expect "
            f"{expected:.1f} %: a half of the questions of one hop, a quarter of two, an eighth of "
            "three. All arms meet the same noise.")


def standstills(by_arm: Arms) -> str:
    """A sentence on the runs that were paused within a step: their bills are too high."""
    found = []
    for cell in [cell for cells in by_arm.values() for cell in cells]:
        path = cell.kept("metrics.jsonl")
        seconds = [row["time/step"] for row in read_jsonl(path)] if path.exists() else []
        if seconds and max(seconds) > 10 * statistics.median(seconds):
            found.append(f"{cell.name} ({max(seconds) / 60:.0f} minutes)")
    if not found:
        return ""
    return f" These runs were paused during a step, which inflates their bills: {', '.join(found)}."


def arm_row(cells: list[Cell]) -> list[str]:
    """An arm: means over its seeds, and the bill of one run."""
    arm, em, searches, by_seed = cells[0].arm, {"clean": "-", "noisy": "-"}, "-", "-"
    for test in em:
        if rows := tested_rows(cells, test):
            em[test] = with_interval(evaluate.summarize(
                evaluate.question_scores(rows).values())["em"])
    if rows := tested_rows(cells, "clean"):
        searches = f"{mean_score(rows, 'searches'):.2f}"
    if len(cells) > 1:
        by_seed = ", ".join(f"{statistics.fmean(scores.values()):.1f}"
                            for scores in scores_of(cells, "clean").values()) or "-"
    runs = [cell.kept("metrics.jsonl").parent for cell in cells
            if cell.kept("metrics.jsonl").exists()]
    noise, reward, bill = "-", "-", ["-", "-", "-"]
    if runs:
        ends = first_and_last(kept_columns(cells, "metrics.jsonl", "reward/mean"))
        reward = " → ".join(f"{value:.2f}" for value in ends)
        if shares := kept_columns(cells, "metrics.jsonl", "search/noisy"):
            noise = f"{100 * statistics.fmean(map(statistics.fmean, shares)):.1f}"
        bills = [costs.run_cost(run) for run in runs]
        bill = [costs.dollars(statistics.fmean(values)) for values in zip(*(
            (cost["api_usd"][costs.PAPER_API], cost["bill"]["search_side"],
             cost["bill"]["whole_run"]) for cost in bills))]
    seeds = f"{len(runs)} of {len(cells)}" if not arm.method else "-"
    return [arm.name, arm.title, seeds, em["clean"], by_seed, em["noisy"], searches, noise, reward,
            *bill]


def draw_curves(by_arm: Arms, path: Path) -> None:
    """A small panel an arm: each seed's training reward (line) and held-out reward (dots)."""
    runs = {name: folders for name, cells in by_arm.items()
            if (folders := [cell.kept("metrics.jsonl").parent for cell in cells
                            if cell.kept("metrics.jsonl").exists()])}
    if not runs:
        return
    rows = -(-len(runs) // 4)
    fig, axes = panels(rows, [1.9] * rows, columns=4, sharex=True, sharey=True)
    for ax, (name, folders) in zip(axes, runs.items()):
        for folder, colour in zip(folders, COLOURS):
            draw_curve(ax, folder / "metrics.jsonl", "reward/mean", color=colour, linewidth=1)
            draw_curve(ax, folder / "eval.jsonl", "eval/reward", color=colour, linestyle="",
                       marker="o", markersize=4)
        ax.set(title=name, ylim=(0, 1))
        ax.locator_params(axis="x", integer=True)
        ax.grid(axis="y")
    for ax in axes[max(0, len(runs) - 4) : len(runs)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    for ax in axes[len(runs):]:
        ax.set_axis_off()
    fig.supxlabel("step (lines: training; dots: held out)")
    fig.supylabel("mean reward")
    save_figure(fig, path)


def draw_curve(ax, log: Path, key: str, **style: Any) -> None:
    """A number of each line of a log over the step, if there is the log."""
    lines = read_jsonl(log) if log.exists() else []
    ax.plot([line["step"] for line in lines], [line[key] for line in lines], **style)


if __name__ == "__main__":
    run_cli(app)
