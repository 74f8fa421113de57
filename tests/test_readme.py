"""The README: its recipes run as they stand there; its commands, links, tests and figures exist."""

import re
import runpy
import shlex
import sys

import click
import pytest
import typer
from helpers import BUDGET, ROOT, data_script, question, read_lines

import costs
import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing.engines import ENGINES

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in
         (ROOT / "README.md", ROOT / "data/accelerate/README.md", ROOT / "data/world/README.md")}
RECIPES = {block.split(".py", 1)[0]: block
           for block in re.findall(r"```python\n# (\w+\.py: .*?)```", README, re.DOTALL)}
REGISTRIES = {"brief": (rl.REWARDS, []), "best": (rl.ALGORITHMS, ["--engine", "none"]),
              "grep": (ENGINES, [])}
CHAPTERS = {"sft_simulator.py": sim, "train_rl.py": rl, "evaluate.py": evaluate, "costs.py": costs}
COMMANDS = [line for page in PAGES.values()
            for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines() if ".py " in line]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_it_stands(name, jsonl, policy, monkeypatch, tmp_path):
    lines = [line for line in RECIPES[name].splitlines()[1:] if line.strip()]
    assert len(lines) <= 10
    registry, more = REGISTRIES[name]
    monkeypatch.setitem(registry, name, None)  # taken out again when the test ends
    corpus = tmp_path / "notes.txt"
    corpus.write_text("Lima is the capital of Peru.\n")
    script = tmp_path / f"{name}.py"
    script.write_text("# " + RECIPES[name])
    option = re.search(r"train (--\w+ \w+)", RECIPES[name])[1].split()
    data = jsonl("train.jsonl", [question(i) for i in range(4)])
    options = ["--data", data, "--model", policy, "--out", tmp_path / "run", "--kl-coef", 0,
               *(["--engine", "grep", "--corpus", corpus] if name == "grep" else
                 ["--engine", "none"]), *BUDGET, *more]
    monkeypatch.setattr(sys, "argv", [script.name, "train", *map(str, options), *option])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    episodes = read_lines(tmp_path / "run/episodes.jsonl")
    assert len(episodes) == 8
    if name == "brief":
        assert all(e["reward"] == pytest.approx(e["scores"]["f1"] - 0.05 * e["searches"])
                   for e in episodes)


def test_there_are_three_recipes():
    assert RECIPES.keys() == REGISTRIES.keys()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood_as_it_is_written(line):
    """Every option exists and takes its value. Nothing is run."""
    words = shlex.split(line, comments=True)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[place], words[place + 1 :]
    chapter = CHAPTERS.get(script) or data_script(script.removeprefix("data/")[: -len(".py")])
    app = typer.main.get_command(chapter.app)
    if isinstance(app, click.Group):
        app, arguments = app.commands[arguments[0]], arguments[1:]
    app.make_context(script, [word for word in arguments if word != "..."])


def test_there_are_commands():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("path", PAGES)
def test_every_file_that_a_page_links_to_is_there(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[path])
    assert not [link for link in links if not (path.parent / link).exists()]


def test_every_function_and_test_that_the_readme_names_is_there():
    """The reading path and the table of troubles."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 5 and not [name for name in named if f"\ndef {name}(" not in tests]
    path = README.split("## Read the method")[1].split("What any such kit")[0]
    named = re.findall(r"`(\w+)`", path)
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in CHAPTERS)
    assert len(named) >= 15
    assert not [n for n in named if not re.search(rf"^(def|class) {n}\b|^{n} = ", code, re.M)]


def test_the_headline_is_that_of_the_report():
    """Each figure of the first screen stands in results/demo/report.md."""
    report = (ROOT / "results/demo/report.md").read_text(encoding="utf-8")
    screen = README.split("## What happens")[0].split("Limits of this demo")[0]
    rows = re.findall(r"\| ([\d.]+ \([\d.]+ to [\d.]+\)) \|", screen)
    assert len(rows) == 4 and all(row in report for row in rows)
    gain = re.search(r"RL adds ([\d.]+) points \(paired, (.*?)\)", screen)
    assert f"EM +{gain[1]} points (95 % interval {gain[2]}: above 0" in report
    hops = re.search(r"from ([\d.]+) to\s+([\d.]+) %", screen)
    assert all(f"| {share} (" in report for share in hops.groups())
