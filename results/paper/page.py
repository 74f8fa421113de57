"""The page of the miniature: a row a claim, a row an arm, the curves.

    python results/paper/page.py    # writes README.md and curves.png beside it, in seconds

All comes from files in the results folder: metrics.jsonl, eval.jsonl and predictions of each arm.
"""

import json
import math
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


@app.command()
def main(out: Out = HERE) -> None:
    """Write README.md and curves.png from what is kept."""
    _, table = read_arms()
    by_arm: dict[str, list[Cell]] = {}
    for cell in (everything := list_cells([], [], out)):
        by_arm.setdefault(cell.arm.name, []).append(cell)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(by_arm, out / "curves.png")
    parts = [
        "# The paper in miniature",
        "Made by `python results/paper/page.py` from the files beside it, which `run.py` kept. "
        "Arms, claims and rules stand in [arms.toml](arms.toml) and were fixed before the arms "
        "ran; the demo's own runs (zerosearch, before-rl) were known by then. "
        + machines(everything),
        "## Claims", claims_table(table, by_arm),
        f"Differences are points of exact match (EM) on the same {table['questions']} questions of "
        "the demo's world, with the real engine (BM25), greedy; of several seeds, a question's "
        "scores are averaged first. Questions of one and two hops are near the ceiling: what "
        "differs is nearly always three hops, a fifth of the questions. The 95 % interval covers "
        'the choice of questions, not that of seeds: see "by seed"; with one seed, a verdict may '
        "be luck, and twelve claims are tested without a correction for their number. Rule "
        '"higher": agrees if the whole interval is above 0, disagrees if it is below, else can\'t '
        f"tell. \"Not worse\": the same with {-table['margin']:g} in the place of 0; "
        '"but lower": the whole interval is below 0 all the same. '
        "The paper's figures are averages over seven benchmarks, without intervals (34.47: "
        "Qwen-2.5-3B, REINFORCE); its differences in Tables 4 to 7 are smaller than our intervals.",
        "What a row does not show:", caveats(table),
        "## Arms", arms_table(by_arm),
        "A trained arm is the demo's RL run with the change that is named, from the same warm "
        "start. EM in percent with its 95 % interval: clean, and with noise: each document of a "
        "search is, with a chance of one half, replaced by one of a deeper rank "
        "([noisy.py](noisy.py)). Most facts stand in one document, so about half of the searches "
        "miss; the next one is drawn anew, so asking again helps. Searches: a question of the "
        "clean test. Training reward: the mean of the first and of the last fifth of the steps; "
        "it falls where noise rises, and can't be compared between arms. SerpApi: what the "
        "searches of training would cost there, of all seeds; search side: what answering them "
        "cost, a part of the whole run; at the prices of data/prices.toml (`costs.py run`). BM25 "
        "is local and almost free: a simulator is cheaper than an API, not than that. A bill is "
        "cores times seconds, and other work on the machine lengthens them."
        + standstills(everything),
        "![Training reward and held-out reward of every arm](curves.png)",
        "Held-out questions are asked without noise and with the real engine, in every arm, "
        "`r1` too, which trains and is tested without one.",
        "## Exercises",
        "Each is one more run, from the root of the repository, after `make demo`: 10 to 20 "
        "minutes on two cores at 0.9 TFLOP/s (`run.py` says first how long it takes on yours). "
        "First write down what you expect. Then compare your `runs/mine/ARM-0` with the method "
        "itself: `cp -r results/paper/zerosearch-0 runs/mine`, and `.venv/bin/python "
        "results/paper/page.py --out runs/mine` writes this page about both, runs/mine/README.md. "
        "`.venv/bin/python evaluate.py show runs/mine/ARM-0 --step 15` prints trajectories of the "
        "last training step (of the method: `runs/demo/policy`). An answer is two figures and a "
        "reason; how far one arm's seeds differ tells how large a difference must be.",
        exercise_list(table, by_arm),
        "## What can't be tested at this size",
        "- Model sizes: the policy and the simulator are SmolLM2-135M.\n"
        "- Google: the real engine is BM25 over 3,129 passages, and misses little of what is "
        "asked for.\n- Seven benchmarks: all questions are of the demo's world.",
    ]
    (out / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    console.print(f"written: {out / 'README.md'}")


def machines(cells: list[Cell]) -> str:
    """Of which commits and machines the kept runs are."""
    configs = [json.loads(path.read_text(encoding="utf-8")) for cell in cells
               if (path := cell.kept("config.json")).exists()]
    commits = sorted({str(config.get("commit"))[:7] for config in configs})
    logs = [read_jsonl(path) for cell in cells if (path := cell.kept("metrics.jsonl")).exists()]
    # A step in which nothing was trained has no rate.
    rates = [row["rate/update_tflops"] / row["rate/mfu"] for log in logs
             for row in [row for row in log if row["rate/mfu"]][:1]]
    if not rates:
        return "No arm has been trained yet."
    return (f"Trained at {', '.join(commits)}, on machines whose large matrix product runs at "
            f"{min(rates):.2f} to {max(rates):.2f} TFLOP/s.")


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
    a, b = scores_of(than, test), scores_of(better, test)
    if not (a and b):
        return None
    if than[0].arm.method:
        a = dict.fromkeys(b, a[0])
    seeds = sorted(a.keys() & b.keys())
    questions = sorted(set.intersection(*(set(of[seed]) for of in (a, b) for seed in seeds)))
    of_a, of_b = (np.array([[of[seed][q] for q in questions] for seed in seeds]) for of in (a, b))
    low, high = paired_interval(of_a.mean(0), of_b.mean(0))
    return {"n": len(questions), "difference": float((of_b - of_a).mean()), "low": low,
            "high": high, "by_seed": (of_b - of_a).mean(1).tolist(),
            "by_hops": hops_means((of_b - of_a).mean(0), questions, better, test)}


def hops_means(values: np.ndarray, questions: list[str], cells: list[Cell],
               test: str) -> list[float]:
    """Means of the questions' values by number of hops, from the fewest on."""
    hops = {str(row["id"]): row["hops"] for row in tested_rows(cells, test)}
    of = np.array([hops[question] for question in questions])
    return [float(values[of == n].mean()) for n in np.unique(of)]


def verdict(rule: str, low: float, high: float, margin: float) -> str:
    """What the interval of a difference says of a claim, by the rule fixed beforehand."""
    bound = {"higher": 0.0, "not worse": -margin}[rule]
    return "agrees" if low > bound else "disagrees" if high < bound else "can't tell"


def published(path: str) -> float:
    """A figure of data/paper.json by its path."""
    value: Any = PAPER
    for key in path.split("/"):
        value = value[key]
    return value


def claims_table(table: dict[str, Any], by_arm: dict[str, list[Cell]]) -> str:
    rows = []
    for claim in table["claims"]:
        theirs = "-"
        if paths := claim.get("paper"):
            a, b = map(published, paths)
            theirs = f"{a} and {b} ({LABELS[paths[0].split('/')[0]]})"
        test = claim.get("test", "clean")
        found = difference(by_arm[claim["better"]], by_arm[claim["than"]], test)
        ours, hops, seeds, judged = "not run yet", "-", "-", "-"
        if found:
            ours = (f"{found['difference']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f}), "
                    f"n {found['n']}{', noisy engine' * (test == 'noisy')}")
            hops, seeds = (", ".join(f"{value:+.1f}" for value in found[key])
                           for key in ("by_hops", "by_seed"))
            judged = f"**{verdict(claim['rule'], found['low'], found['high'], table['margin'])}**"
            judged += ", but lower" * (claim["rule"] == "not worse" and found["high"] < 0)
            judged += f" ({len(found['by_seed'])} seed{'s' * (len(found['by_seed']) > 1)})"
        rows.append([claim["says"], theirs, ours, hops, seeds, claim["rule"], judged])
    header = ["claim", "the paper's average EM, %", "here: difference (95 %)", "by hops", "by seed",
              "rule", "verdict"]
    return markdown_table(header, rows, text_columns=7)


def caveats(table: dict[str, Any]) -> str:
    return "\n".join(f"- {claim['says']}: {claim['but']}" for claim in table["claims"]
                     if "but" in claim)


# ---------------------------------------------------------------- exercises


def exercise_list(table: dict[str, Any], by_arm: dict[str, list[Cell]]) -> str:
    """An exercise compares an arm with the first one, the method itself."""
    lines, method = [], next(iter(by_arm.values()))
    for number, row in enumerate(table["exercises"], 1):
        names = re.findall(r"`(\w+/\w+)`", row["look"])
        shown = "; ".join(one_line(cells) + courses(cells, names)
                          for cells in (by_arm[row["arm"]], method))
        our_reading = f" Our reading of the kept runs: {row['reading']}" if "reading" in row else ""
        lines.append(
            f"{number}. **{row['asks']}** `.venv/bin/python results/paper/run.py {row['arm']} "
            f"--seeds 0 --out runs/mine`<br>Compare: {row['look']}"
            f"<details><summary>What the runs show</summary>{shown}.{our_reading}</details>")
    return "\n".join(lines)


def one_line(cells: list[Cell]) -> str:
    """What the tests of an arm's kept runs show: EM and searches by number of hops."""
    arm, tests = cells[0].arm, [tested_rows(cells, test) for test in ("clean", "noisy")]
    if not tests[0]:
        return f"{arm.name} has not been run yet"
    hops = sorted({row["hops"] for row in tests[0]})
    em, searches = ([
        evaluate.summarize(evaluate.question_scores(
            [row for row in tests[0] if row["hops"] == n], evaluate.COUNTS).values())[name]["mean"]
        for n in hops] for name in ("em", "searches"))
    said = (f"{arm.name}: EM {', '.join(f'{value:.0f}' for value in em)} with "
            f"{', '.join(map(str, hops))} hops, in {', '.join(f'{n:.1f}' for n in searches)} "
            "searches")
    if tests[1]:
        noisy = evaluate.summarize(evaluate.question_scores(tests[1]).values())["em"]["mean"]
        said += f", {noisy:.0f} with the noisy engine"
    return said


def courses(cells: list[Cell], names: list[str]) -> str:
    """How metrics went in training: means of the first and of the last fifth of the steps."""
    said = ""
    for name in names:
        log = "eval.jsonl" if name.startswith("eval/") else "metrics.jsonl"
        if ends := first_and_last(cells, log, name):
            start, end = (f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in ends)
            said += f", {name} {start} → {end}"
    return said


def first_and_last(cells: list[Cell], log: str, name: str) -> tuple[float, float] | None:
    """A metric's means over the first and over the last fifth of a log's lines, over the seeds
    whose log has it."""
    columns = [[row[name] for row in read_jsonl(path) if name in row] for cell in cells
               if (path := cell.kept(log)).exists()]
    ends = [(statistics.fmean(column[:fifth]), statistics.fmean(column[-fifth:]))
            for column in columns if column for fifth in [max(1, len(column) // 5)]]
    return tuple(map(statistics.fmean, zip(*ends))) if ends else None


# ---------------------------------------------------------------- arms


def tested_rows(cells: list[Cell], test: str) -> list[dict[str, Any]]:
    """The predictions of an arm's seeds, as samples of one question. Failed ones are left out."""
    return [row | {"sample": cell.seed} for cell in cells
            if (path := cell.kept(f"{test}.jsonl")).exists()
            for row in read_jsonl(path) if row["end"] != "failed"]


def arms_table(by_arm: dict[str, list[Cell]]) -> str:
    header = ["arm", "what it is", "seeds", "EM clean", "EM noisy", "searches a question",
              "training reward", "SerpApi", "search side", "whole run"]
    return markdown_table(header, [arm_row(cells) for cells in by_arm.values()], text_columns=2)


def standstills(cells: list[Cell]) -> str:
    """A sentence on the runs that were halted within a step: their bills are too high."""
    found = []
    for cell in cells:
        path = cell.kept("metrics.jsonl")
        seconds = [row["time/step"] for row in read_jsonl(path)] if path.exists() else []
        if seconds and max(seconds) > 10 * statistics.median(seconds):
            found.append(f"{cell.name} ({max(seconds) / 60:.0f} minutes)")
    return f" Halted within a step, so that their bills are too high: {', '.join(found)}." * bool(
        found)


def arm_row(cells: list[Cell]) -> list[str]:
    """An arm: means over its seeds, and the bill of all of them."""
    arm, tested = cells[0].arm, {}
    for test in ("clean", "noisy"):
        if rows := tested_rows(cells, test):
            questions = evaluate.question_scores(rows, evaluate.COUNTS)
            tested[test] = evaluate.summarize(questions.values())
    em = [with_interval(tested[test]["em"]) if test in tested else "-"
          for test in ("clean", "noisy")]
    searches = f"{tested['clean']['searches']['mean']:.2f}" if "clean" in tested else "-"
    runs = [cell.kept("metrics.jsonl").parent for cell in cells
            if cell.kept("metrics.jsonl").exists()]
    reward, bill = "-", ["-", "-", "-"]
    if runs:
        ends = first_and_last(cells, "metrics.jsonl", "reward/mean")
        reward = " → ".join(f"{value:.2f}" for value in ends)
        bills = [costs.run_cost(run) for run in runs]
        bill = [costs.dollars(math.fsum(values)) for values in zip(*(
            (cost["api_usd"][costs.PAPER_API], cost["bill"]["search_side"],
             cost["bill"]["whole_run"]) for cost in bills))]
    seeds = f"{len(runs)} of {len(cells)}" if not arm.method else "-"
    return [arm.name, arm.title, seeds, *em, searches, reward, *bill]


def draw_curves(by_arm: dict[str, list[Cell]], path: Path) -> None:
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
