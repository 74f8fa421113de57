"""The four algorithms beside each other: `make algorithms` trains and tests them and prints this table to a file.

    python results/algorithms.py runs/algorithms/start runs/algorithms/grpo ... > results/algorithms.md

Each folder holds dev/ (evaluate.py run) and, but for the policy they all start from, train/ (train_rl.py train).
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # first: here `evaluate` is chapter 3, not the package
import evaluate
from sft_simulator import read_jsonl, run_cli

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
HEADER = ["", "steps", "episodes", "reward, first step", "last step", "EM on dev, %", "F1 on dev, %", "searches a question",
          "training, s"]  # fmt: skip


def row(folder: Path) -> list[str]:
    """One line: rewards are the means of a step's episodes, in brackets stand 95 % bootstrap intervals."""
    metrics = evaluate.read_results(folder / "dev")["metrics"]
    trained = ["-"] * 5
    if (folder / "train").exists():
        steps = read_jsonl(folder / "train" / "metrics.jsonl", ("reward/mean", "time/step"))
        episodes = len(read_jsonl(folder / "train" / "episodes.jsonl"))
        seconds = math.fsum(step["time/step"] for step in steps)
        trained = [str(len(steps)), str(episodes), *(f"{steps[i]['reward/mean']:.3f}" for i in (0, -1)), f"{seconds:.0f}"]
    scores = [evaluate.with_interval(metrics[name], digits) for name, digits in (("em", 1), ("f1", 1), ("searches", 2))]
    return [folder.name, *trained[:4], *scores, trained[4]]


@app.command()
def main(folders: Annotated[list[Path], typer.Argument(help="One an algorithm.")]) -> None:
    """Print the table, as Markdown."""
    print(evaluate.markdown_table(HEADER, [row(folder) for folder in folders]))


if __name__ == "__main__":
    run_cli(app)
