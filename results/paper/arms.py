"""The arms of the miniature, and the files that are kept of each: what run.py and page.py share."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from plumbing.cli import UserError

HERE = Path(__file__).resolve().parent
ARMS = HERE / "arms.toml"
Out = Annotated[Path, typer.Option(help="Where results are kept, and where the page goes.")]


@dataclass(frozen=True)
class Arm:
    """A row of arms.toml. `train`: settings that differ from the demo's; `method`: no training."""

    name: str
    title: str
    seeds: tuple[int, ...] = (0,)
    train: dict[str, Any] | None = None
    method: str | None = None
    model: str = "smollm2"
    searches: bool = True  # R1 is tested as it was trained: without an engine


def read_arms() -> tuple[dict[str, Arm], dict[str, Any]]:
    """The arms by name, and the whole table."""
    table = tomllib.loads(ARMS.read_text(encoding="utf-8"))
    arms = {name: Arm(name, **(row | {"seeds": tuple(row.get("seeds", (0,)))}))
            for name, row in table["arms"].items()}
    return arms, table


@dataclass(frozen=True)
class Cell:
    """An arm with a seed, its folder, and where its results are kept."""

    arm: Arm
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"

    @property
    def tests(self) -> list[str]:
        searches = self.arm.searches and self.arm.method not in ("direct", "cot")
        return ["clean", "noisy"] if searches else ["clean"]

    def kept(self, name: str) -> Path:
        return self.out / self.name / name

    def missing(self) -> list[str]:
        """The stages that have no result yet."""
        stages = [] if self.arm.method else ["train"]
        files = {"train": "metrics.jsonl"} | {test: f"{test}.jsonl" for test in self.tests}
        return [stage for stage in [*stages, *self.tests] if not self.kept(files[stage]).exists()]


def list_cells(names: list[str], seeds: list[int], out: Path) -> list[Cell]:
    """The arms that are asked for, with their seeds. Raises UserError for an unknown name."""
    arms, _ = read_arms()
    if unknown := [name for name in names if name not in arms]:
        raise UserError(f"unknown arm {', '.join(unknown)}: there are {', '.join(arms)}")
    chosen = [arms[name] for name in names or arms]
    return [Cell(arm, seed, out) for arm in chosen
            for seed in (seeds if seeds and not arm.method else arm.seeds)]
