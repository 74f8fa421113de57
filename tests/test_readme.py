"""The README's recipes, run as they stand there, and the files that it names."""

import re
import runpy
import sys

import pytest
from helpers import BUDGET, ROOT, question, read_lines

import train_rl as rl
from plumbing.engines import ENGINES

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = {block.split(".py", 1)[0]: block
           for block in re.findall(r"```python\n# (\w+\.py: .*?)```", README, re.DOTALL)}
REGISTRIES = {"brief": (rl.REWARDS, []), "best": (rl.ALGORITHMS, ["--engine", "none"]),
              "grep": (ENGINES, [])}


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


def test_every_file_that_the_readme_links_to_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).exists()]
