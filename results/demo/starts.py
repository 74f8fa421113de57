"""How much the demo's warm start depends on seed and arithmetic, and what RL makes of each.

    .venv/bin/python results/demo/starts.py > results/demo/starts.md

starts/ARITHMETIC-SEED.jsonl is the eval.jsonl of an RL run from that start, -config.json its
settings; -before.jsonl and -after.jsonl are the predictions.jsonl of the tests before and after it,
without token ids, turns and documents. The demo's own are in results/paper.
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
it then makes differs from start to start: with the order of the trajectories (the seed), and with
the arithmetic, bfloat16 in the demo, float32 on a CPU without AVX-512, as in most laptops. The
policy announces the number in its first sentence, as in "I need 2 searches".

A row is one start and one RL run from it, with the demo's settings and seed 0; the simulator and RL
have the arithmetic of the start. Held-out reward and searches per question: the same {n} questions
of dev, greedy, with the real engine.

{held_out}

Exact match on the 300 test questions, in percent, before and after RL; then the difference in
points, paired by question, with its 95 % interval:

{test}

**RL is no sure gain.** Held-out reward is {before} before RL and {after} after it. From two
starts it gains, most where the start was weakest: on three hops in the demo, on two hops in float32
with seed 1. From the best start, float32 with seed 0, it loses: up to step 12 held-out reward stays
as high, then the policy makes one search for {few_after} of the 120 test questions of two hops
({few_before} before RL). `--keep-best` would have kept the policy of an earlier evaluation; the
demo does without. Where so short a run stops is a matter of luck, too, with a learning rate that
does not fall and noise that rises. So is the seed of RL: from the demo's start, three seeds end at
{three_hops} % on three hops.

**RL does not prevent needless searches.** In float32 with seed 1, the policy came to make two
searches for one-hop questions as well. Of the {alone} that the start answered after one search,
all rightly, {spoilt} are then wrong. Probably it learned this because a second search helps
two-hop questions more ({short} of 120 stopped after one, all wrong), and because a search costs
nothing: the reward counts the answer alone. (`brief`, a recipe in the README, charges for each
search; it was not tried here.)

The simulator hardly differs: the answer to a last query is in {float32[useful/final]} of its
useful outputs in float32 (bfloat16: {bfloat16[useful/final]}), and in
{float32[noisy/final]} of its noisy ones ({bfloat16[noisy/final]}).

Three starts are no distribution. `results/demo/run.sh starts`, after `make demo`, makes two more
in the arithmetic of your machine, with seeds 1 and 2, and runs RL and the tests from them.
"""


def main() -> None:
    named = {"demo": {"arithmetic": "bfloat16 (the demo)", "seed": "0",
                      "log": read_jsonl(HERE / "eval.jsonl"),
                      "before": read_jsonl(PAPER / "before-rl-0/clean.jsonl"),
                      "after": read_jsonl(PAPER / "zerosearch-0/clean.jsonl")}}
    for path in sorted(STARTS.glob("*-[0-9].jsonl")):
        arithmetic, _, seed = path.stem.rpartition("-")
        tests = {name: read_jsonl(path.with_name(f"{path.stem}-{name}.jsonl"))
                 for name in ("before", "after")}
        named[path.stem] = {"arithmetic": arithmetic, "seed": seed, "log": read_jsonl(path)} | tests
    starts, best, worst = list(named.values()), named["float32-0"], named["float32-1"]
    probes = {"bfloat16": HERE / "probe.json", "float32": STARTS / "float32-probe.json"}
    rewards = {name: [start["log"][at]["eval/reward"] for start in starts]
               for name, at in (("before", 0), ("after", -1))}
    print(TEXT.format(
        n=starts[0]["log"][0]["eval/n"], held_out=held_out_table(starts), test=test_table(starts),
        **{name: f"{min(values):.2f} to {max(values):.2f}" for name, values in rewards.items()},
        **second_search(worst["before"], worst["after"]),
        **{f"few_{name}": sum(row["hops"] == 2 and row["searches"] == 1 for row in best[name])
           for name in ("before", "after")},
        three_hops=", ".join(f"{np.mean(list(em(read_jsonl(path), (3,)).values())):.0f}"
                             for path in sorted(PAPER.glob("zerosearch-*/clean.jsonl"))),
        **{name: shares(path) for name, path in probes.items()}), end="")


def held_out_table(starts: list[dict]) -> str:
    """A row a start: mean reward at each evaluation; by hops at the first and at the last one."""
    rows = []
    for start in starts:
        log = start["log"]
        by_hops = [", ".join(f"{line[f'eval/{name}/hops_{hops}']:.2f}" for hops in HOPS)
                   for name in ("reward", "searches") for line in (log[0], log[-1])]
        rewards = [f"{line['eval/reward']:.3f}" for line in log]
        rows.append([start["arithmetic"], start["seed"], ", ".join(rewards), *by_hops])
    steps = ", ".join(str(line["step"]) for line in starts[0]["log"])
    header = ["arithmetic", "seed of the start", f"reward after {steps} steps of RL",
              "reward by 1, 2, 3 hops: before", "after", "searches by 1, 2, 3 hops: before",
              "after"]
    return markdown_table(header, rows)


def test_table(starts: list[dict]) -> str:
    """A row a start: EM before and after, and the paired difference, of all questions and by hops.
    """
    rows = [[start["arithmetic"], start["seed"],
             *(difference(start["before"], start["after"], hops)
               for hops in (HOPS, *((n,) for n in HOPS)))] for start in starts]
    return markdown_table(["arithmetic", "seed of the start", "all", "1 hop", "2 hops", "3 hops"],
                          rows)


def difference(before: list[dict], after: list[dict], hops: tuple[int, ...]) -> str:
    """EM before and after, and the difference with its interval: of questions with these hops."""
    scores = [em(rows, hops) for rows in (before, after)]
    x, y = (np.array([of[name] for name in sorted(of)]) for of in scores)
    low, high = paired_interval(x, y)
    return (f"{x.mean():.1f} to {y.mean():.1f}: {y.mean() - x.mean():+.1f} "
            f"({low:+.1f} to {high:+.1f})")


def em(rows: list[dict], hops: tuple[int, ...]) -> dict[str, float]:
    """EM of each question with so many hops, in percent."""
    questions = evaluate.question_scores([row for row in rows if row["hops"] in hops])
    return {name: scores["em"] for name, scores in questions.items()}


def second_search(before: list[dict], after: list[dict]) -> dict[str, int]:
    """alone, short: questions of one and of two hops that were answered after one search before RL;
    spoilt: those of one hop of which the answer is wrong after it."""
    alone, short = (em([row for row in before if row["searches"] == 1], (hops,))
                    for hops in (1, 2))
    assert set(alone.values()) == {100.0} and set(short.values()) == {0.0}  # as the text says
    later = em(after, (1,))
    return {"alone": len(alone), "short": len(short),
            "spoilt": sum(later[name] == 0 for name in alone)}


def shares(path: Path) -> dict[str, str]:
    """How many outputs of a probe hold what is asked, by quality and kind of query."""
    held = json.loads(path.read_text(encoding="utf-8"))["holds_answer"]
    return {kind: f"{100 * found['share']:.0f} %" for kind, found in held.items()}


if __name__ == "__main__":
    main()
