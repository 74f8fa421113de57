"""The README: its recipes run as they stand there; its commands, links, tests and figures exist."""

import json
import re
import runpy
import shlex
import subprocess
import sys

import click
import pytest
import typer
from helpers import (BUDGET, ROOT, FakeGenerator, command, data_script, plug_generators, question,
                     read_lines)

import costs
import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing.engines import ENGINES

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in
         (ROOT / "README.md", ROOT / "data/accelerate/README.md", ROOT / "data/world/README.md")}
RECIPES = re.search(r"```python\n(# mine\.py: .*?)```", README, re.DOTALL)[1]
REGISTRIES = {"--reward brief": rl.REWARDS, "--engine grep": ENGINES,
              "--algorithm best": rl.ALGORITHMS}
CHAPTERS = {"sft_simulator.py": sim, "train_rl.py": rl, "evaluate.py": evaluate, "costs.py": costs}
COMMANDS = [line for page in PAGES.values()
            for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines() if ".py " in line]


@pytest.mark.parametrize("chosen", REGISTRIES)
def test_the_recipes_run_as_they_stand(chosen, jsonl, policy, monkeypatch, tmp_path):
    assert chosen in RECIPES.splitlines()[0]
    *_, first, second, third = RECIPES.split("\n\n")
    assert all(len(part.strip().splitlines()) <= 10 for part in (first, second, third))
    for option, registry in REGISTRIES.items():
        monkeypatch.setitem(registry, option.split()[1], None)  # taken out when the test ends
    corpus = tmp_path / "notes.txt"
    corpus.write_text("Lima is the capital of Peru.\n")
    script = tmp_path / "mine.py"
    script.write_text(RECIPES)
    engine = ["--corpus", corpus] if "grep" in chosen else ["--engine", "none"]
    data = jsonl("train.jsonl", [question(i) for i in range(4)])
    options = ["--data", data, "--model", policy, "--out", tmp_path / "run", "--kl-coef", 0,
               *engine, *BUDGET, *chosen.split()]
    monkeypatch.setattr(sys, "argv", [script.name, "train", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    episodes = read_lines(tmp_path / "run/episodes.jsonl")
    assert len(episodes) == 8
    if "brief" in chosen:
        assert all(e["reward"] == pytest.approx(e["scores"]["f1"] - 0.05 * e["searches"])
                   for e in episodes)


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


def test_a_corpus_of_ones_own_goes_through_all_stages(jsonl, policy, tmp_path, monkeypatch,
                                                       tokenizer):
    """50 passages and 20 questions, by the commands as they stand there on a small budget; what the
    models write is scripted."""
    jsonl("passages.jsonl", [{"title": f"Town {i}", "text": f"The town {i} has the river R{i}."}
                             for i in range(50)])
    for name, numbers in (("train", range(12)), ("dev", range(12, 16)), ("test", range(16, 20))):
        jsonl(f"{name}.jsonl", [{"id": f"q{i}", "golden_answers": [f"R{i}"],
                                 "question": f"Which river has town {i}?"} for i in numbers])

    def agent(prompt: str, seed: int) -> str:
        town = re.search(r"has town (\d+)", prompt)[1]
        if "<information>\n1." in prompt:
            return f"<answer> R{town} </answer>"
        return f"<search> river of town {town} </search>"

    simulator = FakeGenerator(tokenizer, lambda *_: "\n".join(f"{n}. R{n}" for n in range(1, 6)))
    policies = (str(policy), "runs/policy/model")
    plug_generators(monkeypatch, {name: FakeGenerator(tokenizer, agent) for name in policies}
                    | {"runs/simulator/model": simulator})
    monkeypatch.chdir(tmp_path)
    budget = {"train_rl.py": ["--steps", 1, "--prompts-per-step", 2, "--rollouts", 2,
                              "--eval-limit", 2]}
    block = next(block for block in README.split("```bash\n") if block.startswith("# 1. collect"))
    for line in block.split("```")[0].replace("\\\n", " ").splitlines():
        if ".py " in line:
            _, script, *words = shlex.split(line)
            words = [str(policy) if word.startswith("Qwen/") else word for word in words]
            command(CHAPTERS[script], *words, *budget.get(script, []))
    pairs = read_lines(tmp_path / "runs/pairs.jsonl")
    assert {pair["quality"] for pair in pairs} == {"useful", "noisy"} and len(pairs) > 10
    assert len(read_lines(tmp_path / "runs/policy/eval.jsonl")) == 2
    assert [r["scores"]["em"] for r in read_lines(tmp_path / "runs/test/predictions.jsonl")] == [
        1, 1, 1, 1]


@pytest.mark.parametrize("path", PAGES)
def test_every_file_that_a_page_links_to_is_there(path):
    links = re.findall(r"(?:\]\(|src=\")(?!https?:|#)([^)#\"]+)", PAGES[path])
    assert not [link for link in links if not (path.parent / link).exists()]


def test_every_function_and_test_that_the_readme_names_is_there():
    """The reading path and the table of troubles."""
    assert len(COMMANDS) >= 10  # nothing was overlooked
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 5 and not [name for name in named if f"\ndef {name}(" not in tests]
    path = README.split("## Read the method")[1].split("What any such kit")[0]
    named = re.findall(r"`(\w+)`", path)
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in CHAPTERS)
    assert len(named) >= 15
    defined = r"^(?:def|class) (\w+)|^(\w+)(?:: .*)? = "
    assert set(named) <= {a or b for a, b in re.findall(defined, code, re.MULTILINE)}


def test_the_headline_is_that_of_the_report():
    """Each figure of the first screen stands in results/demo/report.md."""
    report = (ROOT / "results/demo/report.md").read_text(encoding="utf-8")
    screen = README.split("## What happens")[0].split("**Limits of this demo")[0]
    rows = re.findall(r"\| ([\d.]+ \([\d.]+ to [\d.]+\)) \|", screen)
    assert len(rows) == 4 and all(row in report for row in rows)
    gains = re.findall(r"([+-][\d.]+) points? \(([+-][\d.]+ to [+-][\d.]+)\)",
                       " ".join(screen.split()))
    said = [f"EM {gain} points (95 % interval {interval}, p" for gain, interval in gains]
    assert len(said) == 3 == report.count("minus **before RL**")  # all seeds
    assert all(difference in report for difference in said)
    by_hops = report.split("by number of hops")[1].split("\n\n")[0]
    shares = [re.findall(r"\| (\d+\.\d) \(", line) for line in by_hops.splitlines()[2:]]
    said = re.findall(r"\| (\d+, \d+, \d+) \|", screen)
    assert said == [", ".join(f"{float(share):.0f}" for share in row) for row in shares[:4]]
    more = json.loads((ROOT / "results/demo/more-imitation.json").read_text(encoding="utf-8"))
    assert f"[{more['metrics']['em']['mean']:.1f} %](results/demo/more-imitation.json)" in README
    page = (ROOT / "results/paper/README.md").read_text(encoding="utf-8")
    real, simulated = (re.search(rf"^\| {arm} \|[^|]*\| 3 of 3 \| ([\d.]+) \(", page, re.M)[1]
                       for arm in ("search-r1", "zerosearch"))
    assert f"({real} against {simulated}, three seeds each)" in " ".join(README.split())


def test_the_page_of_warm_starts_is_of_its_files():
    script = ROOT / "results/demo/starts.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == script.with_suffix(".md").read_text(encoding="utf-8")
    held_out, tests = ([line.split(" | ") for line in part.splitlines()
                        if line.startswith(("| bfloat16", "| float32"))]
                       for part in done.stdout.split("\nExact match on the"))
    logs = sorted((ROOT / "results/demo/starts").glob("*-[0-9].jsonl"))
    assert len(held_out) == 1 + len(logs) >= 3
    for row, log in zip(held_out[1:], logs):
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        assert last["step"] == 16 and row[2].endswith(f", {last['eval/reward']:.3f}")
    all_hops, *by_hops = tests[0][2:]  # the demo's, as the README has them
    assert all_hops == "77.3 to 90.7: +13.3 (+9.1 to +17.8)"
    assert "RL adds +13.3 points (+9.1 to +17.8)" in README
    for row, moved in zip(tests[1:], ("fell", "rose")):
        whole, two = (row[column].split(":")[0] for column in (2, 4))
        two = " to ".join(f"{float(share):.0f}" for share in two.split(" to "))
        assert f" {moved} from {whole} %, two hops from {two}" in " ".join(README.split())
    assert [cell.split(":")[0] for cell in by_hops] == ["96.7 to 100.0", "94.2 to 94.2",
                                                      "5.0 to 65.0"]
