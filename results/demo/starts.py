"""How much the demo's warm start depends on seed and arithmetic, and what RL makes of each.

    .venv/bin/python results/demo/starts.py > results/demo/starts.md

A file of starts/ is the eval.jsonl of an RL run from that start; the first row, of the demo itself,
is in eval.jsonl beside this file.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.cli import markdown_table
from plumbing.files import read_jsonl

HERE = Path(__file__).resolve().parent

TEXT = """\
# The warm start is a matter of luck

    .venv/bin/python results/demo/starts.py > results/demo/starts.md

How many searches the warm start plans hangs on one word that it writes ("I need 2 searches"), and
the word hangs on the seed of the imitation (the order of its 319 trajectories) and on the
arithmetic. The demo's is bfloat16; a CPU without AVX-512, as in most laptops, takes float32.
Held-out reward and searches of the same {n:.0f} questions of dev, greedy, with the real engine,
before RL and after steps of it. RL has the demo's settings and seed 0.

{table}

The simulator, tuned in float32 as well, hardly differs. The answer to a last query is in
{probe[useful/final]} of its useful outputs (bfloat16: {kept[useful/final]}), and in
{probe[noisy/final]} of its noisy ones ({kept[noisy/final]}).

So the gain that the demo shows is that of its start. Where the start plans three searches
already, RL has less to add; where it plans one search too few for questions of two hops, RL mends
that first (the runs in float32 were stopped after 4 steps). Three starts are no distribution:
`results/demo/run.sh starts`, after `make demo`, makes two more and RL runs from them
(runs/demo/start-1-policy, start-2-policy). Their eval.jsonl go into results/demo/starts/, named
after arithmetic and seed."""


def main() -> None:
    files = [HERE / "eval.jsonl", *sorted((HERE / "starts").glob("*.jsonl"))]
    rows = []
    for file in files:
        arithmetic, _, seed = file.stem.rpartition("-")
        for line in read_jsonl(file):
            by_hops = (", ".join(f"{line[f'eval/{name}/hops_{hops}']:.2f}" for hops in (1, 2, 3))
                       for name in ("reward", "searches"))
            rows.append([arithmetic or "bfloat16 (the demo)", seed if arithmetic else "0",
                         str(line["step"]), f"{line['eval/reward']:.3f}", *by_hops])
    header = ["arithmetic", "seed of the start", "steps of RL", "held-out reward",
              "with 1, 2, 3 hops", "searches with 1, 2, 3 hops"]
    probes = {name: {kind: f"{100 * held['share']:.0f} %" for kind, held in json.loads(
        path.read_text(encoding="utf-8"))["holds_answer"].items()} for name, path in (
            ("kept", HERE / "probe.json"), ("probe", HERE / "starts/float32-probe.json"))}
    print(TEXT.format(n=line["eval/n"], table=markdown_table(header, rows), **probes))


if __name__ == "__main__":
    main()
