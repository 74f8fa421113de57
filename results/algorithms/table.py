"""The four algorithms beside each other: run.sh trains and tests them, and calls this.

    python results/algorithms/table.py runs/algorithms/start runs/algorithms/grpo ...

Each folder holds dev/ (evaluate.py run) and, but for the policy they all start from, train/
(train_rl.py train).
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

# first: here `evaluate` is chapter 3, not the package
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
from plumbing.cli import make_app, markdown_table, run_cli
from plumbing.files import read_jsonl
from plumbing.report import with_interval

app = make_app(__doc__)
HEADER = ["", "steps", "episodes", "reward, first step", "last step", "EM on dev, %",
          "F1 on dev, %", "searches a question", "training, s"]


def row(folder: Path) -> list[str]:
    """One line: mean reward of a step's episodes; in brackets 95 % bootstrap intervals."""
    metrics = evaluate.read_results(folder / "dev")["metrics"]
    trained = ["-"] * 5
    if (folder / "train").exists():
        steps = read_jsonl(folder / "train" / "metrics.jsonl", ("reward/mean", "time/step"))
        episodes = len(read_jsonl(folder / "train" / "episodes.jsonl"))
        seconds = math.fsum(step["time/step"] for step in steps)
        rewards = [f"{steps[i]['reward/mean']:.3f}" for i in (0, -1)]
        trained = [str(len(steps)), str(episodes), *rewards, f"{seconds:.0f}"]
    digits = {"em": 1, "f1": 1, "searches": 2}
    scores = [with_interval(metrics[name], n) for name, n in digits.items()]
    return [folder.name, *trained[:4], *scores, trained[4]]


@app.command()
def main(folders: Annotated[list[Path], typer.Argument(help="One an algorithm.")]) -> None:
    """Print the table, as Markdown."""
    print(markdown_table(HEADER, [row(folder) for folder in folders]))


if __name__ == "__main__":
    run_cli(app)
