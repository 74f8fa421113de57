"""How much the demo's warm start depends on seed and arithmetic, and what RL makes of each.

    .venv/bin/python results/demo/starts.py > results/demo/starts.md

starts/ARITHMETIC-SEED.jsonl is the eval.jsonl of an RL run from that start, -before.jsonl and
-after.jsonl are the test before and after it. The demo's own are those of the miniature.
"""

import json
import sys
from pathlib import Path

import numpy as np

# first: here `evaluate` is chapter 3, not the package
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
from plumbing.cli import markdown_table
from plumbing.files import read_jsonl
from plumbing.intervals import paired_interval

HERE = Path(__file__).resolve().parent
STARTS, PAPER = HERE / "starts", HERE.parent / "paper"
HOPS = (1, 2, 3)

TEXT = """\
# The warm start is a matter of luck

    .venv/bin/python results/demo/starts.py > results/demo/starts.md

Before RL, the demo's policy imitates 319 scripted trajectories (the warm start). How many searches
it then plans hangs on one word that it writes ("I need 2 searches"), and the word hangs on the seed
of the imitation, which orders the trajectories, and on the arithmetic: bfloat16 in the demo,
float32 on a CPU without AVX-512, as in most laptops. Each row is one start, and an RL run from it
with the demo's settings and seed 0.

Held-out reward and searches a question: the same {n:.0f} questions of dev, greedy, with the real
engine.

{held_out}

Exact match on the 300 test questions, in percent, before and after RL; then the difference in
points, paired by question, with its 95 % interval:

{test}

RL evens the starts out: held-out reward is {before} before it and {after} after it.
It mends what the start got wrong: three hops in the demo, two hops in float32 with seed 1; and it
adds least where there is least to mend. So which hops gain, and how much, depends on the start.

It is no guard against searching too much. From seed 1 in float32 it learned to make two searches
for one-hop questions as well, since the reward counts the answer alone, and a second search costs
little: 92 % of them are then right in the test. (Before RL, all 103 that were answered after one
search were.) The reward `brief`, a recipe in the README, charges for each search.

The simulator, tuned in float32 as well, hardly differs. The answer to a last query is in
{probe[useful/final]} of its useful outputs (bfloat16: {kept[useful/final]}), and in
{probe[noisy/final]} of its noisy ones ({kept[noisy/final]}).

Three starts are no distribution. `results/demo/run.sh starts`, after `make demo`, makes two more,
with seeds 1 and 2, and runs RL and the tests from them.
"""


def main() -> None:
    demo = {"arithmetic": "bfloat16 (the demo)", "seed": "0", "log": HERE / "eval.jsonl",
            "before": PAPER / "before-rl-0/clean.jsonl",
            "after": PAPER / "zerosearch-0/clean.jsonl"}
    starts = [demo]
    for path in sorted(STARTS.glob("*-[0-9].jsonl")):
        arithmetic, _, seed = path.stem.rpartition("-")
        starts.append({"arithmetic": arithmetic, "seed": seed, "log": path,
                       "before": path.with_name(f"{path.stem}-before.jsonl"),
                       "after": path.with_name(f"{path.stem}-after.jsonl")})
    probes = {name: {kind: f"{100 * held['share']:.0f} %" for kind, held in json.loads(
        path.read_text(encoding="utf-8"))["holds_answer"].items()} for name, path in (
            ("kept", HERE / "probe.json"), ("probe", STARTS / "float32-probe.json"))}
    logs = [read_jsonl(start["log"]) for start in starts]
    ranges = {name: spread([log[at]["eval/reward"] for log in logs])
              for name, at in (("before", 0), ("after", -1))}
    print(TEXT.format(n=logs[0][0]["eval/n"], held_out=held_out_table(starts),
                      test=test_table(starts), **ranges, **probes), end="")


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def held_out_table(starts: list[dict]) -> str:
    """A row a start: mean reward at each evaluation; by hops before RL and at the last one."""
    rows = []
    for start in starts:
        log = read_jsonl(start["log"])
        rewards = ", ".join(f"{line['eval/reward']:.3f}" for line in log)
        steps = ", ".join(str(line["step"]) for line in log)
        rows.append([start["arithmetic"], start["seed"], f"{rewards} ({steps})",
                     by_hops(log[0], "reward"), by_hops(log[-1], "reward"),
                     by_hops(log[0], "searches"), by_hops(log[-1], "searches")])
    header = ["arithmetic", "seed of the start", "reward (after so many steps of RL)",
              "with 1, 2, 3 hops before", "at the end", "searches before", "at the end"]
    return markdown_table(header, rows)


def by_hops(line: dict, name: str) -> str:
    return ", ".join(f"{line[f'eval/{name}/hops_{hops}']:.2f}" for hops in HOPS)


def test_table(starts: list[dict]) -> str:
    """A row a start whose tests are kept: EM before and after, and the paired differences."""
    rows = []
    for start in starts:
        if not (start["before"].exists() and start["after"].exists()):
            continue
        before, after = (read_jsonl(start[name]) for name in ("before", "after"))
        cells = [difference(before, after, hops) for hops in (HOPS, *((n,) for n in HOPS))]
        rows.append([start["arithmetic"], start["seed"], *cells])
    header = ["arithmetic", "seed of the start", "all", *(f"{n} hop{'s' * (n > 1)}" for n in HOPS)]
    return markdown_table(header, rows)


def difference(before: list[dict], after: list[dict], hops: tuple[int, ...]) -> str:
    """EM before and after, and the difference with its interval: of questions with these hops."""
    of_before, of_after = (evaluate.question_scores([row for row in rows if row["hops"] in hops])
                           for rows in (before, after))
    x, y = (np.array([of[name]["em"] for name in sorted(of_before)])
            for of in (of_before, of_after))
    low, high = paired_interval(x, y)
    return (f"{x.mean():.1f} to {y.mean():.1f}: {y.mean() - x.mean():+.1f} "
            f"({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
