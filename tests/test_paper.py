"""results/paper: every arm is a valid run, a killed driver goes on, the page is of the files."""

import importlib
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import BUDGET, ROOT, command, question, read_lines

import evaluate
import train_rl as rl
from plumbing.cli import UserError
from plumbing.engines import SearchRequest, SearchResult
from plumbing.files import write_json, write_jsonl
from plumbing.runfolder import Lock, read_config

FOLDER = ROOT / "results/paper"
ARMS = """
questions = 2
margin = 5.0
[arms.zero]
title = "a"
seeds = [0, 1]
[arms.real]
title = "b"
train = { engine = "bm25", algorithm = "ppo" }
[arms.direct]
title = "c"
method = "direct"
[[claims]]
says = "zero is better"
better = "zero"
than = "direct"
rule = "higher"
but = "of seeds"
seen = "Ours differ."
paper = ["table5_algorithms/avg/REINFORCE", "table5_algorithms/avg/GRPO"]
[[claims]]
says = "zero is not worse"
better = "zero"
than = "real"
rule = "not worse"
[[exercises]]
asks = "Does it?"
arm = "real"
beside = "direct"
look = "`reward/mean`"
reading = "It does."
"""


@pytest.fixture
def paper(monkeypatch, tmp_path):
    """The scripts with a table of arms, and a demo, of their own; commands run in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    scripts = {name: importlib.import_module(name) for name in ("arms", "run", "page", "noisy")}
    calls = []

    def call(arguments):
        calls.append(arguments)
        command({"train_rl.py": rl}.get(arguments[0], evaluate), *arguments[1:])

    (tmp_path / "arms.toml").write_text(ARMS, encoding="utf-8")
    monkeypatch.setattr(scripts["arms"], "ARMS", tmp_path / "arms.toml")
    monkeypatch.setattr(scripts["run"], "DEMO", tmp_path / "demo")
    monkeypatch.setattr(scripts["run"], "RUNS", tmp_path / "runs")
    monkeypatch.setattr(scripts["run"], "call", call)
    scripts["run"].calls = calls
    yield scripts
    for name in set(scripts) & set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def demo(tiny, tmp_path):
    """A demo's RL run: two steps of tiny models."""
    rows = [question(i, question="capital of Peru?") for i in range(2)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    command(rl, "train", "--data", tmp_path / "train.jsonl", "--model", tiny, "--simulator", tiny,
            "--generator", "hf", "--out", tmp_path / "demo/policy", *BUDGET)


def test_arms_and_claims_are_valid(paper, monkeypatch):
    """The real table: every arm is a run that starts, every claim names arms and figures."""
    monkeypatch.setattr(paper["arms"], "ARMS", FOLDER / "arms.toml")
    arms, table = paper["arms"].read_arms()
    settings = rl.TrainSettings(data=ROOT / "data/world/train.jsonl", out=ROOT / "runs/demo/policy",
                                simulator="smollm2").record()
    for arm in arms.values():
        if not arm.method:
            script, name, *options = paper["run"].train_command(arm, 3, ROOT / "x", settings)
            command(rl, name, *options, "--show-config")
            assert options[options.index("--seed") + 1] == "3"
        else:
            assert arm.method in evaluate.METHODS
    demo = (ROOT / "results/demo/run.sh").read_text(encoding="utf-8")
    assert f"--p-end {arms['falling'].train['p_start']}" in demo  # the rising noise, backwards
    assert f"--words {arms['prompted'].train['simulator_words']} " in demo
    for claim in table["claims"]:
        assert {claim["better"], claim["than"]} <= set(arms)
        assert paper["page"].verdict(claim["rule"], (1, 2), 5.0) == "agrees"
        assert all(paper["page"].published(path) > 0 for path in claim.get("paper", ()))
    assert len(table["exercises"]) == 10
    logged = "".join((ROOT / "plumbing" / name).read_text(encoding="utf-8")
                     for name in ("metrics.py", "episodes.py", "rates.py"))
    logged += "eval/reward reward/f1 reward/em"  # f"reward/{name}" there
    for exercise in table["exercises"]:
        assert arms[exercise["arm"]].train
        assert all(name in logged or name == "runs/demo"
                   for name in re.findall(r"`(\w+/\w+)", exercise["look"]))
        assert exercise.get("beside", "direct") in arms


@pytest.mark.parametrize(("name", "test", "engine"), [
    ("zerosearch", "clean", "bm25"), ("zerosearch", "noisy", "bm25-noisy"),
    ("r1", "clean", "none")])
def test_an_arm_is_tested_within_the_demos_limits(paper, monkeypatch, name, test, engine):
    monkeypatch.setattr(paper["arms"], "ARMS", FOLDER / "arms.toml")
    arm = paper["arms"].read_arms()[0][name]
    limits = {"top_k": 3, "max_searches": 4, "tokens_per_turn": 64, "context_tokens": 1024,
              "observation_tokens": 200, "generator": "hf"}
    _, _, *options = paper["run"].test_command(arm, test, "MODEL", ROOT / "x", limits)
    given = dict(zip(options[::2], options[1::2], strict=True))
    expected = {"--" + key.replace("_", "-"): str(value) for key, value in limits.items()}
    assert given == expected | {"--method": "agent", "--model": "MODEL", "--benchmark": "world",
                                "--engine": engine, "--limit": "300", "--out": str(ROOT / "x")}


def test_seeds_are_of_trained_arms(paper, tmp_path):
    cells = paper["arms"].list_cells([], [7], tmp_path)
    assert [cell.name for cell in cells] == ["zero-7", "real-7", "direct-0"]


def test_a_stopped_driver_goes_on_where_it_was(paper, demo, tmp_path, monkeypatch):
    run, out = paper["run"], tmp_path / "out"
    keep_test = run.keep_test

    def stop(*_):
        raise UserError("killed")

    monkeypatch.setattr(run, "keep_test", stop)
    with pytest.raises(UserError):
        command(run, "real", "--out", out)
    monkeypatch.setattr(run, "keep_test", keep_test)
    command(run, "real", "--out", out)
    done = [[arguments[0].rpartition("/")[2], "--resume" in arguments] for arguments in run.calls]
    assert done == [["train_rl.py", False], ["evaluate.py", False], ["evaluate.py", True],
                    ["noisy.py", False]]
    assert {path.name for path in out.iterdir()} == {"real-0"}
    kept = out / "real-0"
    assert len(read_lines(kept / "metrics.jsonl")) == 2
    for test in ("clean", "noisy"):
        rows = read_lines(kept / f"{test}.jsonl")
        assert len(rows) == 2 and "ids" not in rows[0]
    command(run, "real", "--out", out)
    assert len(run.calls) == 4  # nothing is missing


def test_an_arm_is_estimated_by_the_demo_on_this_machine(paper, demo, tmp_path, monkeypatch):
    """The kept runs, of any machine, say how much longer than the demo's an arm takes."""
    monkeypatch.setattr(paper["run"], "peak_flops", lambda device: 1e3)
    monkeypatch.setattr(paper["run"], "HERE", tmp_path / "kept")
    own = 2 * paper["run"].step_work(tmp_path / "demo/policy") / 1e3 / 3600  # hours of two steps
    assert own > 10
    real = paper["arms"].list_cells(["real"], [], tmp_path / "else")
    assert f"some {own:.1f} hours" in paper["run"].estimate(real, 2)  # nothing is kept
    for name, seconds, tflops in (("zero-0", 10.0, 0.9), ("real-0", 60.0, 0.3)):
        write_jsonl(tmp_path / "kept" / name / "metrics.jsonl", [
            {"time/step": seconds, "rate/update_tflops": tflops / 2, "rate/mfu": 0.5}] * 3)
    assert f"some {2 * own:.1f} hours" in paper["run"].estimate(real, 2)


def test_two_drivers_never_play_the_same_arm(paper, demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper["run"], "peak_flops", lambda device: 1e6)
    held = Lock(tmp_path / "out/zero-0.lock")
    command(paper["run"], "zero", "--out", tmp_path / "out")
    held.release()
    told = " ".join(capsys.readouterr().err.split())
    rows = read_lines(tmp_path / "demo/policy/metrics.jsonl")
    work = statistics.median(row["time/step"] * row["rate/update_tflops"] * 1e12 / row["rate/mfu"]
                             for row in rows)
    assert (f"2 arms and seeds: 2 optimisation steps, some {2 * work / 1e6 / 3600:.1f} hours at "
            "this machine's 0.00 TFLOP/s, and 4 tests") in told and work > 1e8
    assert "zero-0: " in told  # whose training the demo has done
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"zero-1"}


def test_runs_for_oneself_leave_those_of_the_page_alone(paper, tmp_path):
    for out, folder in ((FOLDER, tmp_path / "runs/zero-0"),
                        (tmp_path / "mine", tmp_path / "mine/zero-0.work")):
        (cell,) = paper["arms"].list_cells(["zero"], [0], out)
        assert paper["run"].work_folder(cell) == folder


def test_the_demos_run_is_the_arm_without_a_change(paper, demo, tmp_path):
    """Trained once: the driver keeps its files and tests its model."""
    out = tmp_path / "out"
    command(paper["run"], "zero", "--seeds", 0, "--out", out)
    assert [arguments[0].rpartition("/")[2] for arguments in paper["run"].calls] == [
        "evaluate.py", "noisy.py"]
    assert all(str(tmp_path / "demo/policy/model") in arguments for arguments in paper["run"].calls)
    made = tmp_path / "demo/policy"
    kept = out / "zero-0"
    for name in ("episodes.jsonl", "metrics.jsonl"):
        assert (kept / name).read_bytes() == (made / name).read_bytes()
    config = read_config(made)
    assert Path(config["settings"]["corpus"]).is_absolute()
    corpus = str(Path(config["settings"]["corpus"]).relative_to(ROOT))
    assert read_config(kept) == config | {"settings": config["settings"] | {"corpus": corpus}}
    assert (made / "model").is_dir()


def test_the_other_seeds_of_the_demo_are_arms_too(paper, demo, tmp_path):
    config = read_config(tmp_path / "demo/policy")
    (tmp_path / "demo/policy-1/model").mkdir(parents=True)
    write_json(tmp_path / "demo/policy-1/config.json",
               config | {"settings": config["settings"] | {"seed": 1}})
    cells = [*paper["arms"].list_cells(["zero"], [0, 1, 2], tmp_path),
             *paper["arms"].list_cells(["real"], [0], tmp_path)]
    found = [paper["run"].demo_run(cell) for cell in cells]
    assert [run and run.name for run in found] == ["policy", "policy-1", None, None]


def keep(out, cell, right, test="clean", questions=10):
    rows = [question(i, answer="Lima" if i in right else "Rome", hops=1, end="answered", searches=1,
                     tokens=5, seconds=0.1) for i in range(questions)]
    rows.append(question(questions, answer=None, hops=1, end="failed", searches=0, tokens=0,
                         seconds=0.1))  # says nothing of the policy
    write_jsonl(out / cell / f"{test}.jsonl", rows)


def test_the_page_is_of_the_files_and_always_the_same(paper, tmp_path):
    out = tmp_path / "out"
    keep(out, "zero-0", range(10))
    keep(out, "zero-1", range(8))
    keep(out, "direct-0", range(1))
    for cell, rewards in (("zero-0", (0.2, 0.8)), ("zero-1", (0.4, 1.0))):
        write_json(out / cell / "config.json", {
            "settings": {"engine": "simulator"}, "commit": "abcdef123",
            "hardware": {"device": "cpu", "name": "x", "count": 2}})
        write_jsonl(out / cell / "metrics.jsonl", [
            {"step": i, "reward/mean": reward, "search/noisy": 0.25, "cost/searches": 30,
             "time/step": 10.0,  # in step 0 nothing was trained
             "rate/update_tflops": 0.2 * i, "rate/mfu": 0.5 * i}
            for i, reward in enumerate(rewards)])
    pages, names = [], ("README.md", "exercises.md", "curves.png")
    for _ in range(2):
        command(paper["page"], "--out", out)
        pages.append([(out / name).read_bytes() for name in names])
        for name in names:
            (out / name).unlink()
    assert pages[0] == pages[1]
    lines = pages[0][0].decode().splitlines()
    (better,) = [line for line in lines if line.startswith("| zero is better")]
    assert "34.47 and 33.17 (Table 5)" in better and "+80.0 (" in better and ", n 10 " in better
    assert "| +80.0 | +90.0, +70.0 (-47.1 to +207.1) | higher | **agrees** | can't tell |" in better
    (other,) = [line for line in lines if line.startswith("| zero is not worse")]
    assert "| not run yet | - | - | not worse | - | - |" in other
    assert "- zero is better: of seeds" in lines
    (arm,) = [line for line in lines if line.startswith("| zero |")]
    # means of two seeds: EM, the first and the last step's rewards, 60 searches at $275/30,000
    assert "| 2 of 2 | 90.0 (" in arm
    assert "| 100.0, 80.0 | - | 1.00 | 25.0 | 0.30 → 0.90 | $0.55 |" in arm
    assert "2 seeds of zero itself span 20.0 points, and 20.0 by hops" in pages[0][0].decode()
    lines_of = pages[0][1].decode().splitlines()
    (exercise,) = [line for line in lines_of if line.startswith("1. **Does it?** `.venv/bin/pyth")]
    assert "results/paper/run.py real direct --seeds 0 --out runs/mine`" in exercise
    assert ("real has not been run yet<br>direct, seed 0: EM 10 with 1 hops, in 1.0 searches<br>"
            "zero, seeds 0, 1: EM 90 with 1 hops, in 1.0 searches, "
            "reward/mean 0.3 → 0.9") in exercise
    assert any("abcdef1" in line and "0.40 to 0.40 TFLOP/s" in line for line in lines)


def test_an_exercise_compares_runs_of_the_same_seeds(paper, tmp_path):
    for cell, right in (("zero-0", 10), ("zero-1", 5), ("real-0", 7)):
        keep(tmp_path, cell, range(right))
    command(paper["page"], "--out", tmp_path)
    said = (tmp_path / "exercises.md").read_text(encoding="utf-8")
    assert "real, seed 0: EM 70 with 1 hops" in said and "zero, seed 0: EM 100 with" in said


def test_what_was_seen_in_our_runs_stands_on_our_page_alone(paper, tmp_path, monkeypatch):
    seen = {"README.md": ("- zero is better: of seeds Ours differ.", "RA-Agent and Search-o1:"),
            "exercises.md": ("<br>Our reading: It does.</details>",)}
    for ours in (False, True):
        monkeypatch.setattr(paper["page"], "HERE", tmp_path if ours else FOLDER)
        command(paper["page"], "--out", tmp_path)
        for name, texts in seen.items():
            page = (tmp_path / name).read_text(encoding="utf-8")
            assert all((text in page) == ours for text in texts)


def test_the_page_says_whether_noise_makes_policies_ask_again(paper, tmp_path):
    keep(tmp_path, "zero-0", range(10))
    keep(tmp_path, "zero-0", range(5), test="noisy")
    for test in ("clean", "noisy"):  # no agent: it can't ask again
        keep(tmp_path, "direct-0", range(1), test=test)
    rows = read_lines(tmp_path / "zero-0/noisy.jsonl")
    write_jsonl(tmp_path / "zero-0/noisy.jsonl", [rows[0] | {"searches": 2}, *rows[1:]])
    command(paper["page"], "--out", tmp_path)
    said = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "of 10 pairs" in said and "the number of searches differs in 1." in said
    assert "can expect 50.0 %" in said  # all are of one hop


def test_a_run_that_was_halted_is_named(paper, jsonl):
    even, held = [SimpleNamespace(name=name, kept=lambda _, path=path: path) for name, path in (
        ("even-0", jsonl("even.jsonl", [{"time/step": 60.0}, {"time/step": 200.0}] * 3)),
        ("held-0", jsonl("held.jsonl", [{"time/step": 60.0}] * 4 + [{"time/step": 1380.0}])))]
    assert paper["page"].standstills({"a": [even, held]}).endswith(" bills: held-0 (23 minutes).")
    assert paper["page"].standstills({"a": [even]}) == ""


@pytest.mark.parametrize(("rule", "interval", "said"), [
    ("higher", (0.1, 3), "agrees"), ("higher", (-3, -0.1), "disagrees"),
    ("higher", (-1, 3), "can't tell"), ("not worse", (-4.9, -1), "agrees, but lower"),
    ("not worse", (-4.9, 1), "agrees"),
    ("not worse", (-9, -5.1), "disagrees"), ("not worse", (-9, 3), "can't tell")])
def test_verdicts(paper, rule, interval, said):
    assert paper["page"].verdict(rule, interval, 5.0) == said


def test_half_of_a_noisy_engines_results_are_of_deeper_ranks(paper):
    class Ranked:
        def search(self, requests):
            return [SearchResult([f"rank {i}" for i in range(13)]) for _ in requests]

    requests = [SearchRequest("q", seed=seed) for seed in range(200)]
    results = [paper["noisy"].NoisyEngine(Ranked(), 3).search(requests) for _ in range(2)]
    assert results[0] == results[1]  # a function of the request
    ranks = [[int(text.split()[1]) for text in result.documents] for result in results[0]]
    assert all(rank % 10 == place for found in ranks for place, rank in enumerate(found))
    assert 250 < sum(rank >= 10 for found in ranks for rank in found) < 350  # of 600


def test_without_a_demo_one_line_says_what_comes_first(paper):
    with pytest.raises(UserError, match="make demo comes first"):
        command(paper["run"], "zero")
